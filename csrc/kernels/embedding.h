// Arguments of the kernels that read rows of weights of 2 to 8 bits (formats/intx_tiles.h).
#pragma once

#include <cstdint>

#include "formats/intx_tiles.h"
#include "kernels/types.h"

namespace torchquant {

enum class BagMode : int { kSum, kMean, kMax };

// out[i] = row index[i] of the weight; or out[b] = the sum, mean or maximum of the rows of bag b, those of the indices
// offset[b] to offset[b + 1].
struct EmbeddingArgs {
  IntxShape shape;
  const uint8_t* packed;
  const int64_t* index;
  FloatType out_type;
  void* out;  // [rows or bags, k]
  const int64_t* offset;
  const float* weight;  // of each index; or null
  BagMode mode;
  int64_t padding;  // the index that is left out, or -1
};

}  // namespace torchquant
