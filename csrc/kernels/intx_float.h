// Arguments of the product of float rows and weights of 2 to 8 bits (formats/intx_tiles.h).
#pragma once

#include <cstdint>

#include "formats/intx_tiles.h"
#include "kernels/types.h"

namespace torchquant {

// A panel of floats: blocks of `panel_rows` rows, in a block the inputs in order, for each input the rows side by side.
// (Rows at a stride of K = 4096 would all be on the same cache sets.)
//
//   block of rows 0 .. H-1:   | k = 0: row 0, row 1, ..., row H-1 | k = 1: row 0, ... | ...
constexpr int64_t float_panel_elements(int64_t rows, int64_t k, int64_t panel_rows) {
  return ceil_div(rows, panel_rows) * panel_rows * k;
}

// Rows of any float type -> the blocks of such a panel.
struct FloatRowsArgs {
  const void* x;
  FloatType x_type;
  int64_t x_stride, m, k;
  float* panel;
  int64_t panel_rows;
};

// C[m, n] = out(activation(sum over g of (sum over k in g of x[m,k] (W[n,k] - weight_zero[n,g])) weight_scale[n,g] +
// bias)) in the order of functional/intx.py
struct IntxFloatArgs {
  const float* x;  // the panel
  int64_t panel_rows;
  IntxShape shape;
  const uint8_t* packed;
  const float* bias;  // [n] or null
  Activation activation;
  OutType out_type;  // of floats
  void* c;
  int64_t ldc;
};

}  // namespace torchquant
