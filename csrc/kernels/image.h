// Arguments of the kernels on images: pixels of int8 channels (core/torchquant_core.h: tq_image).
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace torchquant {

// How a real number becomes an element of the result: as it is, or q = clamp(rint(y * inv), lo, hi) + zero.
struct ResultArgs {
  OutType type;  // a float type or kI8
  float inv, lo, hi;
  int32_t zero;
};

// Pixels of floats <-> pixels of int8. The int8 channels are contiguous; floats have any strides.
struct ImageConvertArgs {
  const void* in;
  void* out;
  FloatType float_type;
  int64_t pixels, channels;
  int64_t x_pixel, x_channel, q_pixel;  // strides in elements
  float scale;                          // quantize: the reciprocal
  int32_t zero;
  float lo, hi;         // quantize
  bool* has_nonfinite;  // quantize: becomes true where a float is NaN or infinite
};

// out = activation(a + b) or activation(a * b), `rows` runs of `length` elements.
struct ImageCombineArgs {
  const uint8_t* a;
  const uint8_t* b;
  void* out;
  int64_t rows, length;
  int64_t a_row, b_row, out_row;  // strides in elements
  float a_scale, b_scale;
  int32_t a_zero, b_zero;
  bool multiply;
  Activation activation;  // none where result.lo and hi stand for it
  ResultArgs result;
};

// out = activation((a * gain + shift) op b), `rows` runs of `length` elements: a by itself, then with numbers of the
// channels, then with a second image. a and b are floats, or bytes (q - zero) * scale.
struct ImageBlendArgs {
  const void* a;
  const void* b;       // or null
  const float* gain;   // [length] or null: 1
  const float* shift;  // [length] or null: 0; with a gain in one fused operation
  void* out;
  int64_t rows, length;
  int64_t a_row, b_row, out_row;  // strides in elements
  bool a_float, b_float;
  float a_scale, b_scale;
  int32_t a_zero, b_zero;
  bool multiply;  // by b, otherwise b is added
  Activation activation;
  ResultArgs result;
};

// out[c] = in[index[c]] for each pixel.
struct ImageChannelsArgs {
  const void* in;
  void* out;
  const int32_t* index;  // [channels]
  int64_t pixels, channels;
  int64_t in_pixel, out_pixel;  // strides in elements
  int64_t interleaved;          // not 0: index is that of a channel shuffle of so many groups
  bool floats;
};

// out = table[byte] for bytes as unsigned numbers: the second half of the specification's table comes first.
struct ImageMapArgs {
  const uint8_t* in;
  void* out;
  int64_t rows, length;
  int64_t in_row, out_row;  // strides in elements
  const uint8_t* bytes;     // [256], or null
  const float* floats;      // [256] where bytes is null
};

// The columns of a pool's window that are inside the image.
struct PoolColumns {
  int64_t first;    // element from the row's start
  int64_t taps;     // how many
  int64_t counted;  // average: how many the quotient counts, the padding's among them or not
};

// One row of a pool's result: pixel i is that of the window of `rows` rows and the columns columns[i].
struct ImagePoolArgs {
  const void* in;  // the first of the rows
  const PoolColumns* columns;
  void* out;
  int64_t pixels, channels, out_pixel;
  int64_t rows, row_step, column_step;  // from tap to tap, in elements
  float scale;                          // average: y = sum of (q - zero) * (scale * (1 / count))
  int32_t zero;
  int64_t divisor;       // average: the count where it is not 0
  int64_t counted_rows;  // average: otherwise the count is counted_rows * columns[i].counted
  ResultArgs result;
};

}  // namespace torchquant
