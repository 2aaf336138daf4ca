// Large tensors are worked on in parts, so that temporaries (fp32 of an int8 result, float64 of a fused multiply-add) take
// at most a few hundred megabytes, whatever the tensors' size.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstddef>

namespace torchquant {

inline constexpr int64_t kBlockElements = int64_t{1} << 22;

// Calls run(parts) with corresponding parts of the tensors. The first tensor is cut into parts of at most kBlockElements,
// the others at the same places. All have as many dimensions as the first, of its sizes or 1 (broadcast); undefined
// tensors stay undefined.
template <size_t N, class Run>
void in_blocks(const std::array<at::Tensor, N>& tensors, const Run& run) {
  const at::Tensor& whole = tensors[0];
  if (whole.numel() <= kBlockElements) return run(tensors);
  int64_t longest = 0;
  for (int64_t d = 1; d < whole.dim(); ++d)
    if (whole.size(d) > whole.size(longest)) longest = d;
  const int64_t size = whole.size(longest), half = size / 2;
  const auto part = [&](int64_t first, int64_t length) {
    std::array<at::Tensor, N> parts = tensors;
    for (at::Tensor& t : parts)
      if (t.defined() && t.size(longest) > 1) t = t.narrow(longest, first, length);
    in_blocks(parts, run);
  };
  part(0, half);
  part(half, size - half);
}

}  // namespace torchquant
