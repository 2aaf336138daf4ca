// fork() after threads were used.
//
// GNU's OpenMP keeps the threads of a parallel region for the next one. A child of fork() inherits the list of these
// threads but none of the threads, and its first parallel region, ours or torch's, waits for them for ever. Therefore
// the threads of the thread that forks are released just before the fork: parent and child start new ones when they
// next need them. That costs about 100 us for each fork in the parent, and nothing if no thread was started. (LLVM's
// and Intel's runtimes do this themselves, and so does OpenBLAS with its own threads.)
//
// torch has a race of its own: the first threads of a child that call it make one pool of threads anew, without a lock,
// and one of them may read the pool before it exists ("Invalid thread pool!"). The first call of ours in a child therefore
// makes the pool while other calls wait (threads_after_fork).
//
// A child inherits mutexes that other threads had locked, and none of these threads unlocks them. The mutex of programs
// is therefore locked by the thread that forks, and unlocked in parent and child.
//
// The function is looked up by name because not every libgomp that torch ships has it; if it is missing, call
// torch.set_num_threads(1) in the child. subprocess calls vfork and is not affected.
#include "cpu/fork.h"

#include <mutex>

namespace torchquant {

std::mutex& program_mutex() {
  static std::mutex& mutex = *new std::mutex;  // also for threads that run while the process ends
  return mutex;
}

}  // namespace torchquant

#if defined(__linux__)
#include <pthread.h>

namespace torchquant {
namespace {

// Registered on its own: handlers of a fork run in the opposite order before it.
[[maybe_unused]] const bool guards_mutex =
    pthread_atfork([] { program_mutex().lock(); }, [] { program_mutex().unlock(); },
                   [] { program_mutex().unlock(); }) == 0;

}  // namespace
}  // namespace torchquant
#endif

#if defined(_OPENMP) && defined(__linux__)
#include <ATen/Parallel.h>
#include <dlfcn.h>

namespace torchquant {

std::atomic<bool> just_forked{false};

void threads_after_fork() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!just_forked.load()) return;
  at::init_num_threads();
  just_forked.store(false);
}

namespace {

using PauseFn = int (*)(int);
PauseFn pause_threads = nullptr;

void before_fork() {
  constexpr int kSoft = 1;     // omp_pause_soft: releases threads, keeps settings
  (void)pause_threads(kSoft);  // refused inside a parallel region; there nested calls are serial anyway
}

void in_child() { just_forked.store(true); }

[[maybe_unused]] const bool registered = [] {
  const bool is_gnu = dlsym(RTLD_DEFAULT, "GOMP_parallel") && !dlsym(RTLD_DEFAULT, "__kmpc_fork_call");
  pause_threads = reinterpret_cast<PauseFn>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  const bool pauses = is_gnu && pause_threads;
  return pthread_atfork(pauses ? before_fork : nullptr, nullptr, in_child) == 0;
}();

}  // namespace
}  // namespace torchquant
#else
namespace torchquant {
std::atomic<bool> just_forked{false};
void threads_after_fork() {}
}  // namespace torchquant
#endif
