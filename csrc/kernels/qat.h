// Arguments of the kernel that quantizes and packs a float weight, as each training step does.
#pragma once

#include <cstdint>

#include "formats/int8_tiles.h"
#include "kernels/types.h"

namespace torchquant {

// Rows of a float weight [n, k] -> tiles of the packed layout (int8_tiles.h), quantized on the way. The scale
// of an output channel comes from the range of its row, or from `scale`.
struct QuantizePackArgs {
  const void* w;  // rows w_stride elements apart, contiguous within a row
  FloatType w_type;
  int64_t w_stride, n, k;
  RowMode mode;  // kStatic: with the scales in `scale`, zero point 0
  int32_t qmin, qmax;
  int8_t* packed;
  float* scale;   // [n]; NaN where the outputs of the row must be NaN; its q are 0 then
  int32_t* zero;  // [n]
};

}  // namespace torchquant
