// The packed weight on an accelerator: rows, as tensor cores read them (both operands of an int8 product have K
// contiguous), in a tensor whose shape differs from that of the tiles. `.to(device)` of a layer goes through the
// canonical int8 [N, K].
//
//             K64 bytes
//   row 0     w w w w ... w 0 0     K64 = K rounded up to a multiple of 64 (csrc/formats/int8_tiles.h), zeros beyond K:
//   row 1     w w w w ... w 0 0     16-byte aligned rows for the tensor memory accelerator and for ATen's _int_mm
//   ...
//   row N-1   w w w w ... w 0 0
//   ...       0 0 0 0 ... 0 0 0     zero rows up to N16, N rounded up to a multiple of 16
//   tail      int32 sum_k W[n, k] for n < N16, in as many rows as they need; then zeros
//
// The shape determines N up to a multiple of 16 and K64. K itself cannot be checked without waiting for the device; a
// layer stores its own K.
#pragma once

#include "formats/int8_tiles.h"

namespace torchquant {

constexpr int64_t padded_n(int64_t n) { return num_tiles(n) * kTileN; }
constexpr int64_t tail_rows(int64_t n, int64_t k) { return ceil_div(4 * padded_n(n), padded_k(k)); }
constexpr int64_t layout_rows(int64_t n, int64_t k) { return padded_n(n) + tail_rows(n, k); }

// Rows of activations that are multiplied by such a weight have the same length and alignment.
constexpr int64_t padded_row(int64_t k) { return padded_k(k); }

}  // namespace torchquant
