// Rows of quantized activations, arranged for weights of 2 to 8 bits (kernels/intx.h). The arrangement depends on the
// inputs and the groups of a weight and not on its bits: layers that share these share a panel.
#pragma once

#include <algorithm>

#include "core/convert.h"
#include "core/torchquant_intx.h"
#include "kernels/kernel_table.h"

namespace torchquant::intx {

struct Panel {
  int8_t* a;
  int64_t block_rows;
  IntxPanel kind;
  int8_t* q;  // [rows, k]
  float* row_scale;
  int32_t* row_zero;
  int32_t* sums;
  IntxRest* rests;
  int64_t bytes;  // of all these
};

// Whether rows may have zero points.
inline bool has_zero_rows(const tq_row_quantization& how) {
  return how.mode == TQ_ASYMMETRIC || (how.mode == TQ_STATIC && how.zero_point != 0);
}

// `ones` are a row of each block.
inline int64_t block_rows_of(int64_t rows, int64_t most, bool ones) {
  return ones ? balanced(rows, most - 1) + 1 : balanced(rows, most);
}

// A panel in memory from `base` on (64-byte aligned; null: only its size): plain, or cut with room for ones, which it
// gets if its lists are too long.
inline Panel place_panel(const KernelTable& table, const IntxShape& shape, int64_t rows, bool zero_rows,
                         uint8_t* base) {
  const auto lines = [](int64_t bytes) { return ceil_div(bytes, 64) * 64; };
  const bool cut = zero_rows && table.intx_cut;
  const int64_t block_rows = block_rows_of(rows, table.intx_panel_rows, false), columns = intx_columns(shape);
  int64_t a = panel_bytes(rows, columns, block_rows), rests = 0;
  if (cut) {
    const int64_t height = block_rows_of(rows, table.intx_panel_rows, true);
    a = std::max(a, panel_bytes(ceil_div(rows, height - 1) * height, columns, height));
    rests = lines(rows * (intx_most_rests(shape.k) + 1) * static_cast<int64_t>(sizeof(IntxRest)));
  }
  a = lines(a);
  const int64_t q = lines(rows * shape.k), array = lines(rows * 4), sums = lines(rows * shape.groups() * 4);
  Panel panel{};
  panel.block_rows = block_rows;
  panel.kind = cut ? IntxPanel::kCut : IntxPanel::kPlain;
  panel.bytes = a + q + 2 * array + sums + rests;
  if (!base) return panel;
  uint8_t* tail = base + a + q;
  panel.a = reinterpret_cast<int8_t*>(base);
  panel.q = reinterpret_cast<int8_t*>(base + a);
  panel.row_scale = reinterpret_cast<float*>(tail);
  panel.row_zero = reinterpret_cast<int32_t*>(tail + array);
  panel.sums = reinterpret_cast<int32_t*>(tail + 2 * array);
  panel.rests = cut ? reinterpret_cast<IntxRest*>(tail + 2 * array + sums) : nullptr;
  return panel;
}

inline bool has_many_rests(const Panel& panel, int64_t rows, int64_t k) {
  for (int64_t m = 0; panel.rests && m < rows; ++m)
    if (panel.rests[m * (intx_most_rests(k) + 1)].quad == kIntxManyRests) return true;
  return false;
}

// Rows [m0, m1) of the input -> plain integers [rows, k], which begin with row `first`.
inline void quantize(const KernelTable& table, const tq_rows& rows, const tq_row_quantization& how, const Panel& panel,
                     int64_t m0, int64_t m1, int64_t first) {
  QuantizeRowsArgs q{};
  q.x = element_at(rows.x, rows.type, first * rows.stride);
  q.x_type = float_type(rows.type);
  q.x_stride = rows.stride;
  q.k = rows.k;
  q.mode = row_mode(how.mode);
  q.scale = how.scale;
  q.zero_point = how.zero_point;
  q.qmin = how.qmin;
  q.qmax = how.qmax;
  q.offset = 0;
  q.q = reinterpret_cast<uint8_t*>(panel.q);
  q.panel_rows = 0;
  q.row_scale = panel.row_scale;
  q.row_zero = panel.row_zero;
  table.quantize_rows(q, m0 - first, m1 - first);
}

// Rows [m0, m1) of the integers -> the same rows of the panel.
inline void arrange(const KernelTable& table, const IntxShape& shape, const Panel& panel, int64_t m0, int64_t m1) {
  table.intx_rows({panel.q, shape, panel.row_zero, panel.a, panel.block_rows, panel.kind, panel.sums, panel.rests}, m0,
                  m1);
}

// The panel of `rows` rows with ones instead of lists that are too long.
inline void take_ones(const KernelTable& table, int64_t rows, Panel& panel) {
  panel.kind = IntxPanel::kOnes;
  panel.block_rows = block_rows_of(rows, table.intx_panel_rows, true);
}

// The product of the panel's rows, of which the first is row `first` of the call.
inline IntxArgs product_args(const Panel& panel, const tq_intx_part& part, bool zero_rows, int64_t first) {
  IntxArgs g{};
  g.a = panel.a;
  g.panel_rows = panel.block_rows;
  g.kind = panel.kind;
  g.sums = panel.sums;
  g.row_scale = panel.row_scale;
  g.row_zero = panel.row_zero;
  g.zero_rows = zero_rows;
  g.rests = panel.rests;
  g.shape = intx_shape_of(part.shape);
  g.packed = part.packed;
  g.bias = part.bias;
  g.activation = activation_of(part.activation);
  g.out_type = out_type(part.out_type);
  g.c = element_at(part.out, part.out_type, first * part.out_stride);
  g.ldc = part.out_stride;
  return g;
}

}  // namespace torchquant::intx
