// Arguments of the kernels of weights of 2 to 8 bits (formats/intx_tiles.h).
#pragma once

#include <cstdint>

#include "formats/int8_panel.h"
#include "formats/intx_tiles.h"
#include "kernels/types.h"

namespace torchquant {

// A panel (int8_panel.h) of signed bytes whose columns are the inputs of the weight's blocks: group g begins at column
// 32 * g * group_blocks(), and behind the inputs of a group are zeros up to its last block.
inline int64_t intx_columns(const IntxShape& shape) { return shape.all_blocks() * kIntxBlock; }

// Rows of plain int8 [m, k] -> rows of such a panel, and the sums of their groups.
struct IntxRowsArgs {
  const int8_t* q;  // [m, k]
  IntxShape shape;
  const int32_t* row_zero;  // [m]
  int8_t* panel;
  int64_t panel_rows;
  int32_t* sums;  // [m, groups]: sum of (q - row_zero) over the group
};

// C[m, n] = out(activation(sum over g of (sum over k in g of (q[m,k] - row_zero[m]) (W[n,k] - weight_zero[n,g]))
// weight_scale[n,g] * row_scale[m] + bias)) in the order of functional/intx.py
struct IntxArgs {
  const int8_t* a;  // the panel
  int64_t panel_rows;
  const int32_t* sums;      // [m, groups]
  const float* row_scale;   // [m]
  const int32_t* row_zero;  // [m]
  bool zero_rows;           // whether a row_zero may differ from 0
  IntxShape shape;
  const uint8_t* packed;
  const float* bias;  // [n] or null
  Activation activation;
  OutType out_type;  // of floats
  void* c;
  int64_t ldc;
};

}  // namespace torchquant
