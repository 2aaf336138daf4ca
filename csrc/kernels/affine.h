// Arguments of the affine kernels: float to int8 and back.
#pragma once

#include <cstdint>

#include "formats/int8_panel.h"
#include "kernels/types.h"

namespace torchquant {

// Rows of float activations -> rows of a panel. Byte = q + offset, where q is the int8 value of the specification
// and the offset depends on the instruction set (128 for those that multiply unsigned by signed bytes).
struct QuantizeRowsArgs {
  const void* x;  // [m, k], rows x_stride elements apart, contiguous within a row
  FloatType x_type;
  int64_t x_stride, k;
  RowMode mode;
  float scale;  // static mode: the tensor's scale and zero point
  int32_t zero_point;
  int32_t qmin, qmax;  // of q; a symmetric row's scale is its greatest |x| over qmax
  int32_t offset;      // added to every q
  uint8_t* q;          // the panel (int8_panel.h); from k on it is padded with the offset (q = 0)
  int64_t panel_rows;  // 0: no panel but plain [m, k], not padded
  float* row_scale;    // [m]; NaN marks a row whose outputs must be NaN
  int32_t* row_zero;   // [m]: zero point + offset, in units of the panel
  int32_t* row_term;   // [m] or null: sum_k panel - k * row_zero, needed only with weight zero points
};

// A run of elements that share a scale, or (scales by element) a run along the channel axis.
// q = int(clamp(rint((x - real_zero) / scale), lo, hi)) + zero ; x' = float(q - zero) * scale + real_zero
struct SpanArgs {
  const void* in;
  void* out;
  int64_t n;
  FloatType float_type;  // of x (quantize: in, dequantize: out)
  bool q_signed;         // int8 or uint8
  bool by_element;       // the five pointers below hold n values instead of 1
  const float* scale;    // quantize: the reciprocal 1 / scale
  const float* real_zero;
  const int32_t* zero;
  const float* lo;
  const float* hi;
};

}  // namespace torchquant
