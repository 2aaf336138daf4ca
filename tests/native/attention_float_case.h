// Attention in fp32 and the rotation of heads, by the reference and by every instruction set: the same bits.
#pragma once

#include "norm_case.h"

namespace native {

using torchquant::FloatAttentionArgs;
using torchquant::kFloatKeys;

inline float power_of_two(float x) {  // of functional/attention.py
  const float y = x < -60.0f ? -60.0f : x, n = std::rint(y), f = y - n;
  float p = std::fmaf(f, 0x1.3a02ccp-7f, 0x1.c9fc46p-5f);
  for (const float c : {0x1.ec0378p-3f, 0x1.62e12cp-1f, 1.0f}) p = std::fmaf(p, f, c);
  return n <= -60.0f ? 0.0f : p * std::exp2(n);
}

// The output of row r, in the order that csrc/kernels/attention_float.h promises.
inline std::vector<float> attended_row(const FloatAttentionArgs& g, int64_t r) {
  const int64_t keys = g.keys_of(r);
  std::vector<float> weights(static_cast<size_t>(keys)), out(static_cast<size_t>(g.d), 0.0f);
  float top = -INFINITY;
  for (int64_t j = 0; j < keys; ++j) {
    float score = 0.0f;
    for (int64_t c = 0; c < g.d; ++c) score = std::fmaf(g.q[r * g.q_stride + c], g.k[j * g.k_stride + c], score);
    weights[static_cast<size_t>(j)] = score * g.scale;
    top = std::fmax(top, score * g.scale);
  }
  for (float& w : weights) w = power_of_two(w - top);
  float total = 0.0f;
  for (int64_t first = 0; first < keys; first += kFloatKeys) {
    const int64_t n = std::min(kFloatKeys, keys - first);
    const auto weight = [&](int64_t j) { return weights[static_cast<size_t>(first + j)]; };
    total += sum_by_lanes(n, [&](int64_t j, float sum) { return sum + weight(j); });
    for (int64_t c = 0; c < g.d; ++c) {
      float sum = 0.0f;
      for (int64_t j = 0; j < n; ++j) sum = std::fmaf(weight(j), g.v[(first + j) * g.v_stride + c], sum);
      out[static_cast<size_t>(c)] += sum;
    }
  }
  for (float& y : out) y *= 1.0f / total;
  return out;
}

inline void check_float_attention(Draw& draw, Scratch& inputs, Scratch& outputs) {
  const Place place = draw.pick({Place::kBeforeHole, Place::kBehindHole, Place::kHeap});
  FloatAttentionArgs g{};
  g.rows = 1 + draw.below(20);
  g.d = draw_size(draw, 80);
  g.step = draw.below(2);
  g.first = 1 + draw.below(200);
  g.q_stride = g.d + draw.below(3), g.k_stride = g.d + draw.below(3), g.v_stride = g.d + draw.below(3);
  g.out_stride = g.d + draw.below(2);
  g.scale = draw.pick({0.18f, 1.0f, 5.0f});
  Random random(draw.seed());
  inputs.memory.begin(place);
  const auto filled = [&](int64_t rows, int64_t stride) {  // no element behind the last row
    const int64_t count = (rows - 1) * stride + g.d;
    float* x = inputs.memory.take<float>(count);
    for (int64_t i = 0; i < count; ++i) x[i] = random.normal();
    return x;
  };
  g.q = filled(g.rows, g.q_stride), g.k = filled(g.keys(), g.k_stride), g.v = filled(g.keys(), g.v_stride);
  const int64_t blocks = g.blocks(), padded = blocks * kFloatKeys, cut = draw.below(blocks + 1);
  g.score_stride = padded;
  for (torchquant::Isa isa : torchquant::usable_isas()) {
    const KernelTable& table = table_of(isa);
    outputs.memory.begin(place);
    g.packed = outputs.memory.take<float>(g.tiles() * torchquant::kFloatTile * g.d);
    g.scores = outputs.memory.take<float>(g.rows * padded);
    g.tops = outputs.memory.take<float>(g.rows * blocks);
    g.sums = outputs.memory.take<float>(g.rows * blocks);
    g.y = outputs.memory.take<float>(g.rows * blocks * g.padded_d());
    g.out = outputs.memory.take<float>((g.rows - 1) * g.out_stride + g.d);
    table.pack_float_keys(g, 0, g.tiles());
    table.float_scores(g, cut, blocks);  // as two threads would
    table.float_scores(g, 0, cut);
    table.float_sums(g, cut, blocks);
    table.float_sums(g, 0, cut);
    table.float_output(g);
    for (int64_t r = 0; r < g.rows; ++r) {
      const std::vector<float> want = attended_row(g, r);
      for (int64_t c = 0; c < g.d; ++c)
        CHECK(same_float(g.out[r * g.out_stride + c], want[static_cast<size_t>(c)]),
              "%s: attention of %ld rows, %ld keys, step %ld, d %ld: [%ld, %ld] is %a, not %a", table.name,
              long(g.rows), long(g.first), long(g.step), long(g.d), long(r), long(c),
              double(g.out[r * g.out_stride + c]), double(want[static_cast<size_t>(c)]));
    }
  }
}

inline void check_rotation(Draw& draw, Scratch& inputs, Scratch& outputs) {
  const Place place = draw.pick({Place::kBeforeHole, Place::kBehindHole, Place::kHeap});
  torchquant::RotateArgs g{};
  const int64_t rows = 1 + draw.below(4);
  g.heads = 1 + draw.below(3);
  g.d = draw_size(draw, 80);
  g.width = draw.below(g.d / 2 + 1) * 2;
  g.x_head_stride = g.out_head_stride = g.d;
  g.x_stride = g.out_stride = g.heads * g.d;
  g.table_stride = g.width;
  Random random(draw.seed());
  inputs.memory.begin(place);
  const auto filled = [&](int64_t count) {
    float* x = inputs.memory.take<float>(count);
    for (int64_t i = 0; i < count; ++i) x[i] = random.normal();
    return x;
  };
  g.x = filled(rows * g.x_stride), g.cos = filled(rows * g.width), g.sin = filled(rows * g.width);
  const bool in_place = draw.one_in(2);
  for (torchquant::Isa isa : torchquant::usable_isas()) {
    const KernelTable& table = table_of(isa);
    outputs.memory.begin(place);
    g.out = outputs.memory.take<float>(rows * g.x_stride);
    torchquant::RotateArgs call = g;
    if (in_place) {
      std::memcpy(g.out, g.x, static_cast<size_t>(rows * g.x_stride) * 4);
      call.x = g.out;
    }
    table.rotate_heads(call, rows / 2, rows);
    table.rotate_heads(call, 0, rows / 2);
    for (int64_t i = 0; i < rows * g.x_stride; ++i) {
      const int64_t row = i / g.x_stride, c = i % g.d, half = g.width / 2, at = row * g.width + c;
      float want = g.x[i];
      if (c < half) want = g.x[i] * g.cos[at] + -g.x[i + half] * g.sin[at];
      else if (c < g.width) want = g.x[i] * g.cos[at] + g.x[i - half] * g.sin[at];
      CHECK(same_float(g.out[i], want), "%s: rotation of %ld of %ld channels: [%ld] is %a, not %a", table.name,
            long(g.width), long(g.d), long(i), double(g.out[i]), double(want));
    }
  }
}

}  // namespace native
