// fork() after threads were used.
//
// GNU's OpenMP keeps the threads of a parallel region for the next one. A child of fork() inherits the list of these
// threads but none of the threads, and its first parallel region, ours or torch's, waits for them for ever. Therefore
// the threads of the thread that forks are released just before the fork: parent and child start new ones when they
// next need them. That costs about 100 us for each fork in the parent, and nothing if no thread was started. (LLVM's
// and Intel's runtimes do this themselves, and so does OpenBLAS with its own threads.)
//
// The function is looked up by name because not every libgomp that torch ships has it; if it is missing, call
// torch.set_num_threads(1) in the child. subprocess calls vfork and is not affected.
#if defined(_OPENMP) && defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>

namespace torchquant {
namespace {

using PauseFn = int (*)(int);
PauseFn pause_threads = nullptr;

void before_fork() {
  constexpr int kSoft = 1;     // omp_pause_soft: releases threads, keeps settings
  (void)pause_threads(kSoft);  // refused inside a parallel region; there nested calls are serial anyway
}

[[maybe_unused]] const bool registered = [] {
  const bool is_gnu = dlsym(RTLD_DEFAULT, "GOMP_parallel") && !dlsym(RTLD_DEFAULT, "__kmpc_fork_call");
  pause_threads = reinterpret_cast<PauseFn>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  return is_gnu && pause_threads && pthread_atfork(before_fork, nullptr, nullptr) == 0;
}();

}  // namespace
}  // namespace torchquant
#endif
