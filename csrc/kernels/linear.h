// Arguments of the linear kernels: integer rows into a panel, and the product with everything that follows it.
#pragma once

#include <cstdint>

#include "formats/int8_panel.h"
#include "kernels/types.h"

namespace torchquant {

// Rows of int8 or uint8 -> rows of a panel; shift is added modulo 256.
struct CopyRowsArgs {
  const uint8_t* x;
  int64_t x_stride, k;
  bool x_signed;  // whether x is int8; the panel's values are x + shift
  int32_t shift;
  uint8_t* q;  // the panel, padded with zeros
  int64_t panel_rows;
  const int32_t* row_zero;  // [m], in units of the panel
  int32_t* row_term;        // [m] or null
};

// A tensor that is added to the result before its activation: floats, or int8 (q - zero) * scale.
struct Residual {
  const void* data;  // null: none
  int64_t stride;    // elements from row to row
  bool is_int8;
  float scale;
  int32_t zero;
};

// C[m, n] = out(activation((sum_k (A[m,k] - row_zero[m]) (W[n,k] - weight_zero[n]) + bias_i32[n]) row_scale
// weight_scale + bias + residual))
struct GemmArgs {
  const uint8_t* a;  // the panel
  int64_t panel_rows, k, n;
  const int8_t* packed;
  const float* row_scale;      // [m]
  const int32_t* row_zero;     // [m]
  bool same_row_zero;          // all of them are equal
  const int32_t* row_term;     // [m] or null
  const float* weight_scale;   // [n]
  const float* tile_scale;     // [16] of the tile at hand, instead of weight_scale; or null
  const int32_t* weight_zero;  // [n] or null
  const float* bias;           // [n] or null
  const int32_t* bias_i32;     // [n] or null: makes the sum 64-bit
  Residual residual;
  Activation activation;
  OutType out_type;
  float inv_out_scale;   // int8 and uint8 output: q = clamp(rint(y * inv), lo, hi) + zero
  float out_lo, out_hi;  // qmin - zero, qmax - zero
  int32_t out_zero;
  void* c;
  int64_t ldc;
};

// An int32 accumulator can hold this many products of any unsigned by signed byte: 255 * 128 * 65,793 < 2^31. With zero
// points on both sides the *final* value fits as long as 255 * 255 * K does.
inline constexpr int64_t kMaxProductK = 65793;
inline constexpr int64_t kMaxChunkK = 65728;  // a multiple of 64
inline constexpr int64_t kMaxExactK = 33025;

}  // namespace torchquant
