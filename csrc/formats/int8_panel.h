// Activations are quantized into a panel, in the order in which a register tile reads them: blocks of H rows, in a
// block K in steps of 64, in a step the rows one after the other.
//
//   block of rows 0 .. H-1:   k = 0..63                      k = 64..127
//                            +----------+----------+-- ... --+----------+-- ...
//                            | row 0    | row 1    |         | row 0    |            64 bytes each, padded up to K64
//                            +----------+----------+-- ... --+----------+-- ...
//
// The operands of a register tile are one ascending stream, whatever K is. (Rows at a stride of K = 4096 would all be
// on the same cache sets.) H, `panel_rows`, is at most the panel_rows of the kernel table, and all blocks have about
// the same number of rows: 9 rows are 5 and 4, not 8 and 1.
#pragma once

#include "formats/int8_tiles.h"

namespace torchquant {

constexpr int64_t balanced(int64_t count, int64_t most) { return ceil_div(count, ceil_div(count, most)); }
constexpr int64_t panel_row_bytes(int64_t k) { return padded_k(k); }
constexpr int64_t panel_bytes(int64_t rows, int64_t k, int64_t panel_rows) {
  return ceil_div(rows, panel_rows) * panel_rows * panel_row_bytes(k);
}
constexpr int64_t panel_at(int64_t row, int64_t k, int64_t panel_rows) {  // of the row's first byte
  return row / panel_rows * panel_rows * panel_row_bytes(k) + row % panel_rows * kAlignK;
}

}  // namespace torchquant
