// Sums of floats in the specification's order (torchquant/functional/norms.py): element i belongs to lane i mod 16, a
// lane adds its elements in turn, and the lanes are added 8 apart, then 4, 2, 1.
#pragma once

#include <ATen/ATen.h>

#include "common/arithmetic.h"

namespace torchquant {

// The sums [..., 1] of fp32 [..., K] over the last dimension. squares: sums of squares, each step a fused multiply-add.
inline at::Tensor sum_in_lanes(const at::Tensor& terms, bool squares) {
  constexpr int64_t kLanes = 16;
  const int64_t k = terms.size(-1), padded = (k + kLanes - 1) / kLanes * kLanes;
  const at::Tensor x = padded == k ? terms : at::constant_pad_nd(terms, {0, padded - k});
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = kLanes;
  at::Tensor lanes = at::zeros(sizes, x.options());
  for (int64_t i = 0; i < padded; i += kLanes) {
    const at::Tensor part = x.narrow(-1, i, kLanes);
    lanes = squares ? fmaf(part, part, lanes) : lanes + part;
  }
  for (int64_t half = kLanes / 2; half >= 1; half /= 2)
    lanes = lanes.narrow(-1, 0, half) + lanes.narrow(-1, half, half);
  return lanes;
}

}  // namespace torchquant
