// The first use of torch's threads in a child of fork(); see fork.cpp.
#pragma once

#include <atomic>

namespace torchquant {

extern std::atomic<bool> just_forked;

// Prepares torch's threads in a child of fork() once; other threads of the child wait for it.
void threads_after_fork();

}  // namespace torchquant
