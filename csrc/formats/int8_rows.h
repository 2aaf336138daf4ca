// The packed weight on an accelerator: rows, as tensor cores read them (int8 products want both operands with K
// contiguous), in a tensor of its own shape. `.to(device)` of a layer goes through the canonical int8 [N, K].
//
//             K64 bytes
//   row 0     w w w w ... w 0 0     K64 = K rounded up to a multiple of 64 (csrc/formats/int8_tiles.h), zeros behind K:
//   row 1     w w w w ... w 0 0     16-byte aligned rows for the tensor memory accelerator and for ATen's _int_mm
//   ...
//   row N-1   w w w w ... w 0 0
//   ...       0 0 0 0 ... 0 0 0     zero rows up to N16, N rounded up to a multiple of 16
//   tail      int32 sum_k W[n, k] for n < N16, in as many rows as that takes; zeros behind them
//
// The shape says N and K64. K itself cannot be checked without waiting for the device; layers know their own.
#pragma once

#include <ATen/ATen.h>

#include "formats/int8_tiles.h"

namespace torchquant {

constexpr int64_t padded_n(int64_t n) { return num_tiles(n) * kTileN; }
constexpr int64_t tail_rows(int64_t n, int64_t k) { return ceil_div(4 * padded_n(n), padded_k(k)); }
constexpr int64_t layout_rows(int64_t n, int64_t k) { return padded_n(n) + tail_rows(n, k); }

inline at::Tensor packed_weight(const at::Tensor& packed, int64_t n) {  // int8 [N16, K64]
  return packed.narrow(0, 0, padded_n(n));
}
inline at::Tensor packed_sums(const at::Tensor& packed, int64_t n) {  // int32 [N16]
  const int64_t rows = packed.size(0) - padded_n(n);
  return packed.narrow(0, padded_n(n), rows).reshape({-1}).narrow(0, 0, 4 * padded_n(n)).view(at::kInt);
}

}  // namespace torchquant
