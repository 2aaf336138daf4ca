// A packed weight of 2 to 8 bits on devices other than the CPU. A row is the canonical one: its integers as a string of
// bits, then its scales (float32), then its zero points (int8).
//
//   row n:  | bits of k = 0, 1, ...; the lowest first, two's complement | scales, 4 bytes each | zero points, 1 byte each |
#pragma once

#include <ATen/ATen.h>

#include "formats/intx_tiles.h"

namespace torchquant::intx {

inline int64_t bit_bytes(const IntxShape& s) { return ceil_div(s.k * s.bits, 8); }
inline int64_t row_bytes(const IntxShape& s) { return bit_bytes(s) + s.groups() * (s.has_zero ? 5 : 4); }

inline at::Tensor places(const at::Tensor& like, int64_t count) {
  return at::arange(count, like.options().dtype(at::kByte));
}

// uint8 [N, bytes] -> int8 [N, K]
inline at::Tensor from_bits(const at::Tensor& bytes, const IntxShape& s) {
  const at::Tensor bits = bytes.unsqueeze(-1).bitwise_right_shift(places(bytes, 8)).bitwise_and(1);
  const at::Tensor integers = bits.reshape({s.n, -1}).narrow(1, 0, s.k * s.bits).reshape({s.n, s.k, s.bits});
  const at::Tensor u = integers.bitwise_left_shift(places(bytes, s.bits)).sum(-1, false, at::kByte);
  const int64_t middle = s.middle();  // of two's complement: (u ^ middle) - middle
  return u.bitwise_xor(middle).to(at::kShort).sub_(middle).to(at::kChar);
}

struct Weight {
  at::Tensor q, scale, zero;  // int8 [N, K], float32 and int8 [N, groups]
};

inline Weight unpacked(const at::Tensor& packed, const IntxShape& s) {
  const int64_t at = bit_bytes(s), groups = s.groups();
  // A copy: floats must begin at a multiple of four bytes, and of a single row contiguous() would be the row itself.
  const at::Tensor scale = packed.narrow(1, at, 4 * groups).clone(at::MemoryFormat::Contiguous).view(at::kFloat);
  const at::Tensor zero = s.has_zero ? packed.narrow(1, at + 4 * groups, groups).contiguous().view(at::kChar)
                                     : at::zeros({s.n, groups}, packed.options().dtype(at::kChar));
  return {from_bits(packed.narrow(1, 0, at), s), scale, zero};
}

}  // namespace torchquant::intx
