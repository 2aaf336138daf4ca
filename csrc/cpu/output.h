// Output tensors. malloc maps a large one anew on every call, and the operating system then provides one 4 KB page at a
// time, each with a trap: 1024 x 11008 floats cost 10 ms to touch, more than the product itself. A request for 2 MB
// pages (Linux, where transparent huge pages are "madvise" or "always") reduces that to 3.5 ms; it has no effect
// elsewhere.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torchquant {

inline void ask_for_huge_pages(void* memory, size_t bytes) {  // advice to the system: a refusal costs nothing
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kWorthwhile = size_t{4} << 20;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

inline at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor out = at::empty(sizes, options);
  ask_for_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

}  // namespace torchquant
