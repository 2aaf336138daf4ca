// Activations, norms and attention through the C interface.
#pragma once

#include "core_case.h"
#include "norm_case.h"

namespace native {

// Rows that are further apart than they are long, or one run of elements.
inline void check_core_activation(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const bool by_row = draw.one_in(2), gated = draw.one_in(3);
  tq_activation_call call{};
  call.rows = by_row ? draw_size(draw, 60) : 1;
  call.length = !by_row && draw.one_in(3) ? 9000 + draw.below(20000) : draw_size(draw, 300);
  call.x_stride = call.length + (by_row ? draw.below(5) : 0);
  call.up_stride = call.length + (by_row ? draw.below(5) : 0);
  call.x_type = trial.float_type();
  call.out_type = gated ? call.x_type : trial.float_type();
  call.activation = static_cast<tq_activation>(draw.below(kNumActivations));
  const int flavour = static_cast<int>(draw.below(7));
  Random random(draw.seed());
  call.x = random_elements(trial.inputs, random, (call.rows - 1) * call.x_stride + call.length, call.x_type, flavour);
  if (gated)
    call.up = random_elements(trial.inputs, random, (call.rows - 1) * call.up_stride + call.length, call.x_type, 0);
  const int64_t n = call.rows * call.length;
  std::vector<uint8_t> first;
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    call.out = trial.outputs.take<uint8_t>(n * size_of(call.out_type));
    CHECK(tq_activate(&call, parallel) == TQ_OK, "%s", name.c_str());
    const std::vector<uint8_t> bytes = bytes_of(call.out, n * size_of(call.out_type));
    if (first.empty()) first = bytes;  // of the scalar path, which the bound below holds to the true function
    for (int64_t i = 0; i < n; ++i) {
      const float got = load(call.out, call.out_type, i), scalar = load(first.data(), call.out_type, i);
      CHECK(same_float(got, scalar), "%s: activation %d, [%ld] is %a, not %a", name.c_str(), int(call.activation),
            long(i), double(got), double(scalar));
      const int64_t m = i / call.length, j = i % call.length;
      if (gated || call.out_type != TQ_F32) continue;
      const float x = load(call.x, call.x_type, m * call.x_stride + j);
      CHECK(close_to_activation(static_cast<Activation>(call.activation), x, got), "%s: activation %d of %a is %a",
            name.c_str(), int(call.activation), double(x), double(got));
    }
    if (!gated) return;
    // A product of the activation alone, in fp32, and of up.
    std::vector<float> alone(static_cast<size_t>(n));
    tq_activation_call single = call;
    single.up = nullptr;
    single.out = alone.data();
    single.out_type = TQ_F32;
    CHECK(tq_activate(&single, nullptr) == TQ_OK, "%s", name.c_str());
    for (int64_t i = 0; i < n; ++i) {
      const float up = load(call.up, call.x_type, i / call.length * call.up_stride + i % call.length);
      const float want = rounded(call.out_type, alone[static_cast<size_t>(i)] * up);
      CHECK(same_float(load(call.out, call.out_type, i), want), "%s: gated activation %d: [%ld]", name.c_str(),
            int(call.activation), long(i));
    }
  });
}

inline void check_core_norm(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  Norm norm;
  torchquant::NormArgs& g = norm.args;
  const MatrixSize size = draw_matrix(draw);
  norm.m = size.rows;
  g.k = size.columns;
  tq_norm_call call{};
  const tq_type type = trial.float_type();
  call.weight_type = trial.float_type();
  call.bias_type = trial.float_type();
  call.eps = draw.pick({1e-5f, 1e-12f});
  call.centered = draw.one_in(2);
  call.cast_before_weight = draw.one_in(3);
  const bool has_residual = draw.one_in(2), has_weight = !draw.one_in(4), has_bias = has_weight && draw.one_in(2);
  g.x_stride = g.k + draw.below(3);
  g.residual_stride = g.k + draw.below(3);
  const int flavour = static_cast<int>(draw.below(7));
  Random random(draw.seed());
  Memory& memory = trial.inputs;
  g.x = random_elements(memory, random, (norm.m - 1) * g.x_stride + g.k, type, flavour);
  if (has_residual) g.residual = random_elements(memory, random, (norm.m - 1) * g.residual_stride + g.k, type, 0);
  if (has_weight) g.weight = random_elements(memory, random, g.k, call.weight_type, 0);
  if (has_bias) g.bias = random_elements(memory, random, g.k, call.bias_type, 0);
  g.type = static_cast<FloatType>(type);
  g.weight_type = static_cast<FloatType>(call.weight_type);
  g.bias_type = static_cast<FloatType>(call.bias_type);
  g.eps = call.eps;
  g.centered = call.centered;
  g.cast_before_weight = call.cast_before_weight;
  call.rows = {g.x, type, norm.m, g.k, g.x_stride};
  call.residual = g.residual;
  call.residual_stride = g.residual_stride;
  call.weight = g.weight;
  call.bias = g.bias;
  std::vector<std::vector<float>> expected;
  for (int64_t row = 0; row < norm.m; ++row) expected.push_back(normalized_row(norm, row));
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    call.out = trial.outputs.take<uint8_t>(norm.m * g.k * size_of(type));
    CHECK(tq_normalize(&call, parallel) == TQ_OK, "%s", name.c_str());
    for (int64_t i = 0; i < norm.m * g.k; ++i) {
      const float got = load(call.out, type, i);
      const float want = expected[static_cast<size_t>(i / g.k)][static_cast<size_t>(i % g.k)];
      CHECK(same_float(got, want), "%s: norm of %ld x %ld, type %d, values %d: [%ld] is %a, not %a", name.c_str(),
            long(norm.m), long(g.k), int(type), flavour, long(i), double(got), double(want));
    }
  });
}

struct Heads {  // [batch, heads, length, width] in the memory of [batch, length, heads, width + gap]
  tq_heads heads;
  tq_type type;
  float at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const float v = load(heads.data, type, b * heads.batch_stride + h * heads.head_stride + i * heads.row_stride + j);
    return rounded(TQ_BF16, v);
  }
};

inline Heads draw_heads(Trial& trial, Random& random, int64_t batch, int64_t heads, int64_t length, int64_t width,
                        tq_type type) {
  const int64_t head = width + trial.draw.below(3), row = heads * head, entry = length * row;
  return {{random_elements(trial.inputs, random, batch * entry, type, 0), entry, head, row}, type};
}

// Against softmax in double precision on bfloat16 values, within what bfloat16 weights allow; the same bits on each
// path.
inline void check_core_attention(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  tq_attention_call c{};
  c.batch = 1 + draw.below(3);
  c.key_heads = 1 + draw.below(2);
  c.heads = c.key_heads * (1 + draw.below(3));
  c.queries = draw_size(draw, 70);
  c.keys = draw_size(draw, 100);
  c.d = draw_size(draw, 70);
  c.dv = draw_size(draw, 70);
  c.type = trial.float_type();
  c.causal = draw.one_in(3);
  c.mask_type = draw.pick({TQ_NO_MASK, TQ_BOOL_MASK, TQ_FLOAT_MASK});
  const bool one_mask = draw.one_in(2);  // for all heads
  Random random(draw.seed());
  const double scale = 1.0 / std::sqrt(static_cast<double>(c.d));
  c.scale_in_powers_of_2 = static_cast<float>(scale * 1.4426950408889634);
  const Heads q = draw_heads(trial, random, c.batch, c.heads, c.queries, c.d, c.type),
              k = draw_heads(trial, random, c.batch, c.key_heads, c.keys, c.d, c.type),
              v = draw_heads(trial, random, c.batch, c.key_heads, c.keys, c.dv, c.type);
  c.query = q.heads;
  c.key = k.heads;
  c.value = v.heads;
  const int64_t masks = c.queries * c.keys;
  c.mask = {nullptr, one_mask ? 0 : c.heads * masks, one_mask ? 0 : masks, c.keys};
  const int64_t mask_elements = one_mask ? masks : c.batch * c.heads * masks;
  if (c.mask_type == TQ_FLOAT_MASK) c.mask.data = random_elements(trial.inputs, random, mask_elements, TQ_F32, 0);
  if (c.mask_type == TQ_BOOL_MASK) {
    auto* allowed = trial.inputs.take<uint8_t>(mask_elements);
    for (int64_t i = 0; i < mask_elements; ++i) allowed[i] = !random.one_in(4);
    c.mask.data = allowed;
  }
  const auto score = [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t e = 0; e < c.d; ++e)
      sum += static_cast<double>(q.at(b, h, i, e)) * static_cast<double>(k.at(b, h / (c.heads / c.key_heads), j, e));
    const int64_t at = b * c.mask.batch_stride + h * c.mask.head_stride + i * c.mask.row_stride + j;
    if (c.mask_type == TQ_FLOAT_MASK)
      return sum * scale + static_cast<double>(static_cast<const float*>(c.mask.data)[at]);
    if (c.mask_type == TQ_BOOL_MASK && !static_cast<const uint8_t*>(c.mask.data)[at]) return -HUGE_VAL;
    return sum * scale;
  };
  std::vector<double> expected(static_cast<size_t>(c.batch * c.queries * c.heads * c.dv), 0.0);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.queries; ++i) {
        const int64_t keys = c.causal ? std::min(c.keys, i + 1) : c.keys;
        std::vector<double> scores;
        for (int64_t j = 0; j < keys; ++j) scores.push_back(score(b, h, i, j));
        const double top = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        for (double& s : scores) total += s = top == -HUGE_VAL ? 0.0 : std::exp(s - top);
        for (int64_t e = 0; e < c.dv && total > 0; ++e) {
          double& y = expected[static_cast<size_t>(((b * c.queries + i) * c.heads + h) * c.dv + e)];
          for (int64_t j = 0; j < keys; ++j)
            y += scores[static_cast<size_t>(j)] / total *
                 static_cast<double>(v.at(b, h / (c.heads / c.key_heads), j, e));
        }
      }
  const int64_t n = static_cast<int64_t>(expected.size());
  std::vector<uint8_t> first;
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    c.out = trial.outputs.take<uint8_t>(n * size_of(c.type));
    CHECK(tq_attention(&c, parallel) == TQ_OK, "%s", name.c_str());
    const std::vector<uint8_t> bytes = bytes_of(c.out, n * size_of(c.type));
    if (first.empty()) first = bytes;
    CHECK(bytes == first, "%s: attention of %ld queries, %ld keys has other bits", name.c_str(), long(c.queries),
          long(c.keys));
    for (int64_t i = 0; i < n; ++i) {
      const double got = static_cast<double>(load(c.out, c.type, i)), want = expected[static_cast<size_t>(i)];
      CHECK(std::fabs(got - want) <= 0.03,
            "%s: attention of %ld queries, %ld keys, d %ld, mask %d: [%ld] is %g, not %g", name.c_str(),
            long(c.queries), long(c.keys), long(c.d), int(c.mask_type), long(i), got, want);
    }
  });
}

}  // namespace native
