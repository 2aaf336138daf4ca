// Arguments of the convolution kernels. The product is that of the linear layers (linear.h).
#pragma once

#include <cstdint>

#include "formats/int8_panel.h"

namespace torchquant {

// Output pixels -> rows of a panel: for each pixel the values of the image that the kernel covers, in the order of
// int8_conv.h.
struct GatherArgs {
  const int8_t* x;  // the first channel of the group
  int64_t h, w, c;  // c: channels of the group
  int64_t image_stride, row_stride, pixel_stride;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t out_h, out_w;
  int64_t first;  // the panel's row 0 is this output pixel, counted through all images
  int32_t shift;  // the panel's values are x + shift
  uint8_t* q;     // the panel, padded with zeros
  int64_t panel_rows;
  const int32_t* row_zero;  // [m], in units of the panel: what lies outside of the image
};

// What the product with an int8 output needs about each channel, for whole tiles of 16:
//
//   q = clamp(rint(((start + sum_k A[m, k] W[n, k]) scale + bias + residual) inv_out_scale) + out_zero,
//             least, greatest)
//
// start = -row_zero sum_k W[n, k], scale = row_scale weight_scale[n]: all rows have one scale and one zero point. The
// activation is none, or one that only moves `least` and `greatest`. No value before the conversion to an integer
// exceeds 2^30 (the caller makes sure of that), none is NaN. A residual is int8.
struct Int8Channels {
  const int32_t* start;
  const float* scale;
  const float* bias;
  int8_t least, greatest;
  bool fetch;  // the weights are not in the second-level cache: their lines are fetched in time
};

// Where the arrays of Int8Channels come from: the `n` channels of one group.
struct Int8ChannelsArgs {
  const int8_t* packed;
  int64_t k, n;
  int32_t row_zero;
  float input_scale;
  const float* weight_scale;
  const float* bias;  // or null
  int32_t* start;     // for whole tiles; what lies beyond n is 0
  float *scale, *bias_of_tiles;
};

}  // namespace torchquant
