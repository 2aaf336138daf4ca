// RMSNorm and LayerNorm of rows, by the reference and by every instruction set: the same bits.
#pragma once

#include "span_case.h"

namespace native {

struct Norm {
  torchquant::NormArgs args{};
  int64_t m = 0;
};

// Sixteen lanes, each adding its elements in turn, then added 8 apart, 4, 2, 1: the order that csrc/kernels/norms.inc
// promises.
template <class Add>
float sum_by_lanes(int64_t k, const Add& add) {
  float lanes[16] = {};
  for (int64_t i = 0; i < k; ++i) lanes[i % 16] = add(i, lanes[i % 16]);
  for (int step = 8; step >= 1; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

inline std::vector<float> normalized_row(const Norm& norm, int64_t row) {
  const torchquant::NormArgs& g = norm.args;
  const float k = static_cast<float>(g.k);
  std::vector<float> x(static_cast<size_t>(g.k));
  for (int64_t i = 0; i < g.k; ++i) {
    float& v = x[static_cast<size_t>(i)];
    v = load(g.x, g.type, row * g.x_stride + i);
    if (g.residual) v += load(g.residual, g.type, row * g.residual_stride + i);
  }
  const auto at = [&](int64_t i) { return x[static_cast<size_t>(i)]; };
  if (g.centered) {
    const float mean = sum_by_lanes(g.k, [&](int64_t i, float sum) { return sum + at(i); }) / k;
    for (float& v : x) v -= mean;
  }
  const float squares = sum_by_lanes(g.k, [&](int64_t i, float sum) { return std::fmaf(at(i), at(i), sum); });
  const float inverse = 1.0f / std::sqrt(squares / k + g.eps);
  for (int64_t i = 0; i < g.k; ++i) {
    float& v = x[static_cast<size_t>(i)];
    v *= inverse;
    if (g.cast_before_weight) v = rounded_to(g.type, v);
    if (g.bias) v = std::fmaf(v, load(g.weight, g.weight_type, i), load(g.bias, g.bias_type, i));
    else if (g.weight) v *= load(g.weight, g.weight_type, i);
    v = rounded_to(g.type, v);
  }
  return x;
}

inline void check_norm(Draw& draw, Scratch& inputs, Scratch& outputs) {
  const Place place = draw.pick({Place::kBeforeHole, Place::kBehindHole, Place::kHeap});
  Norm norm;
  torchquant::NormArgs& g = norm.args;
  norm.m = draw_size(draw, 40);
  g.k = draw_size(draw, 300);
  const auto draw_type = [&] { return draw.pick({FloatType::kF32, FloatType::kBF16, FloatType::kF16}); };
  g.type = draw_type(), g.weight_type = draw_type(), g.bias_type = draw_type();
  g.centered = draw.one_in(2), g.cast_before_weight = draw.one_in(3);
  g.eps = draw.pick({1e-5f, 1e-12f, 0.0f});
  const bool has_residual = draw.one_in(2), has_weight = !draw.one_in(4), has_bias = has_weight && draw.one_in(2);
  const int64_t x_gap = draw.below(3), residual_gap = draw.below(3), half = draw.below(norm.m + 1);
  const int flavour = static_cast<int>(draw.below(7));
  Random random(draw.seed());
  Memory& memory = inputs.memory;
  memory.begin(place);
  const auto filled_rows = [&](int64_t m, int64_t stride, FloatType type) {
    Linear l;  // for its input alone
    l.m = m, l.k = g.k, l.x_stride = stride, l.x_type = type;
    fill_input(l, memory, random, m == 1 ? 0 : flavour);
    return l.x;
  };
  g.x_stride = g.k + x_gap, g.residual_stride = g.k + residual_gap;
  g.x = filled_rows(norm.m, g.x_stride, g.type);
  if (has_residual) g.residual = filled_rows(norm.m, g.residual_stride, g.type);
  if (has_weight) g.weight = filled_rows(1, g.k, g.weight_type);
  if (has_bias) g.bias = filled_rows(1, g.k, g.bias_type);

  std::vector<std::vector<float>> expected;
  for (int64_t row = 0; row < norm.m; ++row) expected.push_back(normalized_row(norm, row));
  for (torchquant::Isa isa : torchquant::usable_isas()) {
    const KernelTable& table = table_of(isa);
    outputs.memory.begin(place);
    g.out = outputs.memory.take<uint8_t>(norm.m * g.k * (g.type == FloatType::kF32 ? 4 : 2));
    table.normalize_rows(g, half, norm.m);  // as two threads would
    table.normalize_rows(g, 0, half);
    for (int64_t row = 0; row < norm.m; ++row)
      for (int64_t i = 0; i < g.k; ++i) {
        const float got = load(g.out, g.type, row * g.k + i);
        const float want = expected[static_cast<size_t>(row)][static_cast<size_t>(i)];
        CHECK(same_float(got, want),
              "%s: normalize_rows of %ld x %ld, type %d, values %d,%s%s%s%s%s: [%ld, %ld] is %a, not %a", table.name,
              long(norm.m), long(g.k), int(g.type), flavour, g.centered ? " centered" : "",
              g.residual ? " residual" : "", g.weight ? " weight" : "", g.bias ? " bias" : "",
              g.cast_before_weight ? " cast" : "", long(row), long(i), double(got), double(want));
      }
  }
}

}  // namespace native
