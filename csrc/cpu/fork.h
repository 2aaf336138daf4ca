// The first use of torch's threads in a child of fork(); see fork.cpp.
#pragma once

#include <atomic>
#include <mutex>

namespace torchquant {

extern std::atomic<bool> just_forked;

// Of what programs remember (program.h). It is free in a child of fork(), whatever other threads did.
std::mutex& program_mutex();

// Prepares torch's threads in a child of fork() once; other threads of the child wait for it.
void threads_after_fork();

}  // namespace torchquant
