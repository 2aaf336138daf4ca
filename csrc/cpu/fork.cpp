// fork() after threads were used.
//
// GNU's OpenMP keeps the threads of a parallel region for the next one. A child of fork() inherits that list but none
// of the threads on it, and its first parallel region, ours or torch's, waits for them for ever. So the threads of the
// thread that forks are given back just before: parent and child start new ones when they next need them. That costs a
// fork some 100 us in the parent, and nothing where no thread was started. (LLVM's and Intel's runtimes do it alone, and
// OpenBLAS does the same with the threads of its own.)
//
// Looked up by name because not every libgomp that torch ships has the function; without it all is as it was:
// torch.set_num_threads(1) in the child. subprocess does not come here, it calls vfork.
#if defined(_OPENMP) && defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>

namespace torchquant {
namespace {

using PauseFn = int (*)(int);
PauseFn pause_threads = nullptr;

void before_fork() {
  constexpr int kSoft = 1;     // omp_pause_soft: threads go, settings stay
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
