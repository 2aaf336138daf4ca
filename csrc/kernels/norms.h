// Arguments of the norm kernels.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace torchquant {

// Rows over their root mean square, or (centered) over their standard deviation about their mean.
struct NormArgs {
  const void* x;         // [m, k], rows x_stride elements apart
  const void* residual;  // added to x first, or null
  const void* weight;    // [k] or null
  const void* bias;      // [k] or null
  void* out;             // [m, k], contiguous
  int64_t x_stride, residual_stride, k;
  FloatType type;  // of x, residual and out
  FloatType weight_type, bias_type;
  float eps;
  bool centered, cast_before_weight;  // cast: to the type of x, before the weight multiplies
};

}  // namespace torchquant
