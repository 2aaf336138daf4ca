// Arguments of the depthwise kernel: one image, rows of its result.
#pragma once

#include <cstdint>

#include "formats/int8_depthwise.h"
#include "kernels/image.h"

namespace torchquant {

struct DepthwiseArgs {
  const uint8_t* in;      // the image's first pixel
  const uint8_t* in_end;  // behind its last byte: nothing from there on is read
  int64_t h, w, row_step, column_step;
  int64_t multiplier;  // output channels of an input channel
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  const int8_t* packed;  // formats/int8_depthwise.h
  float scale;           // of the image; NaN: all its outputs are NaN
  int32_t zero;
  const float* weight_scale;  // [channels]
  const float* bias;          // [channels] or null
  Activation activation;      // none where result.lo and hi stand for it
  const void* residual;       // floats, or int8 with scale and zero; or null
  bool residual_int8;
  float residual_scale;
  int32_t residual_zero;
  int64_t residual_row, residual_pixel;  // strides in elements
  ResultArgs result;
  void* out;
  int64_t channels, out_w, out_row, out_pixel;
  uint8_t* scratch;      // depthwise_scratch bytes, aligned to 64
  int64_t strip_pixels;  // of a row of the result that are computed together
};

// A strip of the image as the kernel reads it: quads of the kernel's rows for all columns under `pixels` pixels of the
// result. Some instruction sets split every quad into two halves of 16-bit numbers.
constexpr int64_t strip_columns(int64_t pixels, int64_t stride_w, int64_t kernel_w, int64_t dilation_w) {
  return (pixels - 1) * stride_w + (kernel_w - 1) * dilation_w + 1;
}
inline constexpr int64_t kStripQuadBytes = 2 * kDepthwiseChannels * kQuadRows;

// Rows of the result that use one strip: as many as its quads have rows for.
constexpr int64_t depthwise_strip_rows(int64_t kernel_h, int64_t stride_h, int64_t dilation_h) {
  return dilation_h == 1 ? (depthwise_quads(kernel_h) * kQuadRows - kernel_h) / stride_h + 1 : 1;
}
constexpr int64_t depthwise_scratch(int64_t columns, int64_t kernel_h, int64_t kernel_w) {  // at most kQuadRows rows
  return (columns + kQuadRows * kernel_w) * depthwise_quads(kernel_h) * kStripQuadBytes;
}

}  // namespace torchquant
