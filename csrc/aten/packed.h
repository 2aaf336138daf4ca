// A weight in int8_rows.h: checks (those of the tiles are in checks.h) and the parts that are not weights.
#pragma once

#include "aten/rows.h"
#include "common/checks.h"
#include "formats/packed_weight.h"

namespace torchquant {

// The packed weight of an out_features x in_features layer. Its shape gives N up to a multiple of 16 and K up to a multiple of
// 64; nothing else can be checked without waiting for the device.
inline void check_packed_rows(const char* op, const at::Tensor& packed, int64_t n, int64_t k) {
  check_features(op, packed, n, k);
  const PackedShape shape = packed_shape(PackedFormat::kInt8Rows, n, k);
  TORCH_CHECK_VALUE(
      packed.dim() == 2 && packed.size(0) == shape.rows && packed.size(1) == shape.columns && packed.is_contiguous(),
      op, ": packed must be the int8 [", shape.rows, ", ", shape.columns, "] result of pack_weight on ",
      packed.device(), " for out_features = ", n, " and in_features = ", k, ", got ", describe(packed),
      "; the last dimension of input must be in_features, and a weight packed on another type of device "
      "goes through unpack_weight there and pack_weight here");
}

inline at::Tensor empty_packed(const at::Tensor& like, int64_t n, int64_t k) {
  const PackedShape shape = packed_shape(PackedFormat::kInt8Rows, n, k);
  return at::empty({shape.rows, shape.columns}, like.options().dtype(at::kChar));
}
inline at::Tensor packed_weight(const at::Tensor& packed, int64_t n) {  // int8 [N16, K64]
  return packed.narrow(0, 0, padded_n(n));
}
inline at::Tensor packed_sums(const at::Tensor& packed, int64_t n) {  // int32 [N16]
  const int64_t rows = packed.size(0) - padded_n(n);
  return packed.narrow(0, padded_n(n), rows).reshape({-1}).narrow(0, 0, 4 * padded_n(n)).view(at::kInt);
}
inline at::Tensor weights_of(const at::Tensor& packed, int64_t n, int64_t k) {
  return packed.narrow(0, 0, n).narrow(1, 0, k);
}

// Writes everything but the weights themselves, which are in their place already.
inline void complete_packed(const at::Tensor& packed, int64_t n, int64_t k) {
  if (k < packed.size(1)) packed.narrow(0, 0, n).narrow(1, k, packed.size(1) - k).zero_();
  packed.narrow(0, n, packed.size(0) - n).zero_();
  packed_sums(packed, n).narrow(0, 0, n).unsqueeze(1).copy_(row_sums(packed.narrow(0, 0, n)));
}

}  // namespace torchquant
