// Arguments of the kernel that quantizes and packs a float weight of 2 to 8 bits, as each training step does.
#pragma once

#include <cstdint>

#include "formats/intx_tiles.h"
#include "kernels/types.h"

namespace torchquant {

// Rows of a float weight [n, k] -> tiles of the packed layout (intx_tiles.h), quantized on the way. The scale of a group
// comes from the range of its weights, or from `scale`.
struct QuantizePackIntxArgs {
  const void* w;  // rows w_stride elements apart, contiguous within a row
  FloatType w_type;
  int64_t w_stride;
  IntxShape shape;
  RowMode mode;  // kStatic: with the scales in `scale`, zero point 0
  int32_t qmin, qmax;
  uint8_t* packed;
  float* scale;  // [n, groups]; NaN where the outputs of the row must be NaN; the group's q are 0 then
  int8_t* zero;  // [n, groups]
};

}  // namespace torchquant
