// Checks of a weight in int8_rows.h; the tiles' are in checks.h.
#pragma once

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

}  // namespace torchquant
