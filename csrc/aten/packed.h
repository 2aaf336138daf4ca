// A weight in int8_rows.h: checks (those of the tiles are in checks.h) and the parts that are not weights.
#pragma once

#include "aten/rows.h"
#include "common/checks.h"
#include "formats/int8_rows.h"

namespace torchquant {

// The packed weight of an out_features x in_features layer. Its shape says N (to 16) and K (to 64), not more.
inline void check_packed_rows(const char* op, const at::Tensor& packed, int64_t n, int64_t k) {
  check_features(op, packed, n, k);
  TORCH_CHECK_VALUE(packed.dim() == 2 && packed.size(0) == layout_rows(n, k) && packed.size(1) == padded_k(k) &&
                        packed.is_contiguous(),
                    op, ": packed must be the int8 [", layout_rows(n, k), ", ", padded_k(k),
                    "] result of pack_weight on ", packed.device(), " for out_features = ", n, " and in_features = ", k,
                    ", got ", describe(packed),
                    "; the last dimension of input must be in_features, and a weight packed on another type of device "
                    "goes through unpack_weight there and pack_weight here");
}

inline at::Tensor empty_packed(const at::Tensor& like, int64_t n, int64_t k) {
  return at::empty({layout_rows(n, k), padded_k(k)}, like.options().dtype(at::kChar));
}
inline at::Tensor weights_of(const at::Tensor& packed, int64_t n, int64_t k) {
  return packed.narrow(0, 0, n).narrow(1, 0, k);
}

// All of the layout but the weights themselves, which are in their place already.
inline void complete_packed(const at::Tensor& packed, int64_t n, int64_t k) {
  if (k < padded_k(k)) packed.narrow(0, 0, n).narrow(1, k, padded_k(k) - k).zero_();
  packed.narrow(0, n, packed.size(0) - n).zero_();
  packed_sums(packed, n).narrow(0, 0, n).unsqueeze(1).copy_(row_sums(packed.narrow(0, 0, n)));
}

}  // namespace torchquant
