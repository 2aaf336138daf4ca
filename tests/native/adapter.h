// The kernels' argument structs and the panel's layout are used in this file only: when they change, this file changes
// and the tests of single kernels stay.
#pragma once

#include <cstdint>

#include "isa.h"
#include "kernels/kernel_table.h"
#include "formats/int8_panel.h"

namespace native {

using torchquant::Activation;
using torchquant::FloatType;
using torchquant::KernelTable;
using torchquant::OutType;
using torchquant::RowMode;

inline constexpr Activation kActivations[] = {Activation::kNone,        Activation::kRelu,     Activation::kGelu,
                                              Activation::kGeluTanh,    Activation::kSilu,     Activation::kTanh,
                                              Activation::kSigmoid,     Activation::kRelu6,    Activation::kHardswish,
                                              Activation::kHardsigmoid, Activation::kLeakyRelu};
inline constexpr int kNumActivations = sizeof(kActivations) / sizeof(kActivations[0]);

// A linear layer's call in plain terms.
struct Linear {
  int64_t m = 0, n = 0, k = 0;
  bool float_input = true;
  const void* x = nullptr;  // rows x_stride elements apart
  int64_t x_stride = 0;
  FloatType x_type = FloatType::kF32;  // float input: how it is quantized
  RowMode mode = RowMode::kSymmetric;
  float scale = 1.0f;  // static mode
  int32_t zero_point = 0, qmin = -128, qmax = 127;
  bool x_signed = true;  // integer input, and its scales and zero points by row
  const float* in_scale = nullptr;
  const int32_t* in_zero = nullptr;

  const int8_t* packed = nullptr;
  const float* weight_scale = nullptr;
  const int32_t* weight_zero = nullptr;  // or null
  const float* bias = nullptr;           // or null
  const int32_t* bias_i32 = nullptr;     // or null

  Activation activation = Activation::kNone;
  OutType out_type = OutType::kF32;
  float out_scale = 1.0f;  // integer output
  int32_t out_zero = 0, out_qmin = -128, out_qmax = 127;
  void* c = nullptr;
  int64_t ldc = 0;
};

struct Panel {
  uint8_t* q;
  float* row_scale;
  int32_t *row_zero, *row_term;  // row_term: null without weight zero points
};

inline int64_t panel_rows(const KernelTable& table, int64_t m) { return torchquant::balanced(m, table.panel_rows); }
inline int64_t panel_size(const KernelTable& table, int64_t m, int64_t k) {
  return torchquant::panel_bytes(m, k, panel_rows(table, m));
}
inline int64_t tile_unit(const KernelTable& table) { return table.tile_block; }  // threads share tiles in this unit
// q as the specification defines it, of a panel that was filled from floats.
inline int32_t as_value(const KernelTable& table, uint8_t byte) {
  return table.panel_offset ? static_cast<int32_t>(byte) - table.panel_offset : static_cast<int8_t>(byte);
}
inline int32_t panel_value(const KernelTable& table, const Linear& l, const Panel& p, int64_t row, int64_t k) {
  const int64_t rows = panel_rows(table, l.m);
  return as_value(table, p.q[torchquant::panel_at(row, l.k, rows) + k / 64 * rows * 64 + k % 64]);
}

inline torchquant::QuantizeRowsArgs rows_of(const KernelTable& table, const Linear& l, const Panel& p) {
  torchquant::QuantizeRowsArgs a{};
  a.x = l.x;
  a.x_type = l.x_type;
  a.x_stride = l.x_stride;
  a.k = l.k;
  a.mode = l.mode;
  a.scale = l.scale;
  a.zero_point = l.zero_point;
  a.qmin = l.qmin;
  a.qmax = l.qmax;
  a.offset = table.panel_offset;
  a.q = p.q;
  a.panel_rows = panel_rows(table, l.m);
  a.row_scale = p.row_scale;
  a.row_zero = p.row_zero;
  a.row_term = p.row_term;
  return a;
}

// Per token, to plain int8 [m, k]: p.q is no panel.
inline void make_plain_rows(const KernelTable& table, const Linear& l, const Panel& p, int64_t m0, int64_t m1) {
  torchquant::QuantizeRowsArgs a = rows_of(table, l, p);
  a.offset = 0;
  a.panel_rows = 0;
  table.quantize_rows(a, m0, m1);
}

inline void make_rows(const KernelTable& table, const Linear& l, const Panel& p, int64_t m0, int64_t m1) {
  if (l.float_input) return table.quantize_rows(rows_of(table, l, p), m0, m1);
  torchquant::CopyRowsArgs a{};
  a.x = static_cast<const uint8_t*>(l.x);
  a.x_stride = l.x_stride;
  a.k = l.k;
  a.x_signed = l.x_signed;
  a.shift = l.x_signed ? table.panel_offset : table.panel_offset - 128;
  a.q = p.q;
  a.panel_rows = panel_rows(table, l.m);
  a.row_zero = p.row_zero;
  a.row_term = p.row_term;
  for (int64_t m = m0; m < m1; ++m) {
    p.row_scale[m] = l.in_scale ? l.in_scale[m] : 1.0f;
    p.row_zero[m] = (l.in_zero ? l.in_zero[m] : 0) + a.shift;
  }
  table.copy_rows(a, m0, m1);
}

// All rows of the panel by some of the weight tiles.
inline void multiply(const KernelTable& table, const Linear& l, const Panel& p, int64_t tile0, int64_t tile1) {
  torchquant::GemmArgs a{};
  a.a = p.q;
  a.panel_rows = panel_rows(table, l.m);
  a.k = l.k;
  a.n = l.n;
  a.packed = l.packed;
  a.row_scale = p.row_scale;
  a.row_zero = p.row_zero;
  a.same_row_zero = true;
  for (int64_t m = 1; m < l.m; ++m) a.same_row_zero &= p.row_zero[m] == p.row_zero[0];
  a.row_term = p.row_term;
  a.weight_scale = l.weight_scale;
  a.weight_zero = l.weight_zero;
  a.bias = l.bias;
  a.bias_i32 = l.bias_i32;
  a.activation = l.activation;
  a.out_type = l.out_type;
  a.inv_out_scale = 1.0f / l.out_scale;
  a.out_lo = static_cast<float>(l.out_qmin - l.out_zero);
  a.out_hi = static_cast<float>(l.out_qmax - l.out_zero);
  a.out_zero = l.out_zero;
  a.c = l.c;
  a.ldc = l.ldc;
  table.gemm(a, 0, l.m, tile0, tile1);
}

// Of an instruction set, without making it the active one.
inline const KernelTable& table_of(torchquant::Isa isa) { return *torchquant::kernels_of(isa); }

inline const KernelTable& scalar_table() { return table_of(*torchquant::isa_from_name("scalar")); }

}  // namespace native
