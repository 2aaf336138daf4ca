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

// What follows from a shape by divisions, computed once for all tiles.
struct IntxLayout {
  int64_t groups, tile_bytes, zeros_at;
  int64_t group_blocks, last_blocks;  // of all groups but the last, of the last
  int64_t columns;                    // of the panel

  explicit IntxLayout(const IntxShape& s)
      : groups(s.groups()),
        tile_bytes(s.tile_bytes()),
        zeros_at(s.zeros_at()),
        group_blocks(s.group_blocks()),
        last_blocks(s.blocks(groups - 1)),
        columns(intx_columns(s)) {}
};

// A kernel may want no sums of weights for the rows' zero points (intx_cut in its table). Its panel holds q - zero, cut
// to a byte, which cuts few values: those at the far end of the longer side. What is cut off is listed row by row, four
// inputs (a quad of the panel's columns) an entry, and behind the last entry is one whose quad is kIntxNoQuad.
struct IntxRest {
  int32_t quad;
  int8_t values[4];  // (q - zero) - the panel's value, or a part of it
};
inline constexpr int32_t kIntxNoQuad = INT32_MAX;
inline constexpr int32_t kIntxManyRests = -1;  // the quad of the first entry of a row that has too many
constexpr int64_t intx_most_rests(int64_t k) { return 4 + k / 64; }

// What a panel holds: q; or q - zero, cut, with lists; or q, and in each block ones before the rows. A block has
// panel_rows rows with the ones.
enum class IntxPanel { kPlain, kCut, kOnes };
constexpr int64_t intx_row_at(int64_t row, int64_t columns, int64_t panel_rows, IntxPanel kind) {
  if (kind != IntxPanel::kOnes) return panel_at(row, columns, panel_rows);
  const int64_t rows = panel_rows - 1;
  return panel_at(row / rows * panel_rows + row % rows + 1, columns, panel_rows);
}

// Rows of plain int8 [m, k] -> rows of such a panel, and their sums.
struct IntxRowsArgs {
  const int8_t* q;  // [m, k]
  IntxShape shape;
  const int32_t* row_zero;  // [m]
  int8_t* panel;
  int64_t panel_rows;
  IntxPanel kind;
  int32_t* sums;    // [m, groups]: sum of (q - row_zero) over the group
  IntxRest* rests;  // [m, intx_most_rests(k) + 1] if the panel is cut
};

// C[m, n] = out(activation(sum over g of (sum over k in g of (q[m,k] - row_zero[m]) (W[n,k] - weight_zero[n,g]))
// weight_scale[n,g] * row_scale[m] + bias)) in the order of functional/intx.py
struct IntxArgs {
  const int8_t* a;  // the panel
  int64_t panel_rows;
  IntxPanel kind;
  const int32_t* sums;      // [m, groups]
  const float* row_scale;   // [m]
  const int32_t* row_zero;  // [m]
  bool zero_rows;           // whether a row_zero may differ from 0
  const IntxRest* rests;    // those of a cut panel
  IntxShape shape;
  const uint8_t* packed;
  const float* bias;  // [n] or null
  Activation activation;
  OutType out_type;  // of floats
  void* c;
  int64_t ldc;
};

}  // namespace torchquant
