// Arguments of the fake quantization kernels: values, masks, gradients of a learned step, ranges.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace torchquant {

// A run of elements that share a scale, or (by_element) that each have their own, quantized and dequantized again:
// steps = clamp(rint((x - real_zero) * inverse), lo, hi); out = steps * scale + real_zero, NaN where x is NaN.
struct FakeQuantizeArgs {
  const void* x;
  void* out;      // of x's type, or null
  uint8_t* bits;  // one bit an element: the rounded value lies in [lo, hi]; or null
  int64_t bit;    // position of the first element's bit in the first byte; the bits below it are kept
  int64_t n;
  FloatType type;
  bool by_element;  // the five pointers below hold n values instead of 1
  const float* scale;
  const float* inverse;  // 1 / scale
  const float* real_zero;
  const float* lo;
  const float* hi;
};

// The backward pass of a learned step over a run. With v = x / scale, inside where lo < v < hi (strictly):
//   grad_x = inside ? grad : 0;  offset_sum += inside ? 0 : grad
//   scale_sum += grad * (inside ? rint(v) - v : clamp(v, lo, hi) + zero)
struct LearnedBackwardArgs {
  const void* grad;
  const void* x;
  void* grad_x;
  int64_t n;
  FloatType type;
  bool by_element;  // all pointers below hold n values instead of 1; the sums are added to
  const float* scale;
  const float* inverse;
  const float* zero;
  const float* lo;
  const float* hi;
  float* scale_sum;
  float* offset_sum;
};

// Bit i % 8 of byte i / 8 belongs to element i.
struct MaskArgs {
  const void* x;
  void* out;      // mask_span: x where the bit is set, else +0
  uint8_t* bits;  // positive_span: x > 0
  int64_t n;
  FloatType type;
};

struct MinMaxArgs {
  const void* x;
  int64_t n;
  FloatType type;
  bool by_element;  // least and greatest hold n values instead of 1
  float* least;     // updated with the finite elements
  float* greatest;
  int64_t* nonfinite;  // the others, counted
};

}  // namespace torchquant
