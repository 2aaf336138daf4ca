// Weights of 2 to 8 bits through the C interface: packed, read back, and a linear layer on them.
#pragma once

#include "core/torchquant_intx.h"
#include "core_case.h"

namespace native {

struct IntxCase {
  Case base;  // the input's rows and the output; the weight is below
  tq_intx_shape shape{};
  int64_t size = 0, groups = 0;  // inputs of a group, and how many there are
  std::vector<int8_t> weight, zero;
  std::vector<float> scale;
};

// A stored integer, read from the picture in formats/intx_tiles.h.
inline int32_t stored_integer(const IntxCase& c, const uint8_t* packed, int64_t n, int64_t k) {
  const int64_t bits = c.shape.bits, tile_bytes = tq_intx_tile_bytes(&c.shape);
  const int64_t group = k / c.size, place = k % c.size, blocks_of_group = (c.size + 31) / 32;
  const int64_t group_bytes = 64 + blocks_of_group * 64 * bits;
  const uint8_t* block = packed + n / 16 * tile_bytes + group * group_bytes + 64 + place / 32 * 64 * bits;
  const int64_t quad = place % 32 / 4, byte = n % 16 * 4 + place % 4;
  int32_t u = 0, below = 0;
  for (int64_t width : {8, 4, 2, 1}) {  // planes from the lowest bits up
    if (width == 8 ? bits != 8 : bits == 8 || !(bits & width)) continue;
    const int64_t vector = quad % width, shift = width == 8 ? 0 : quad / width * width;
    u |= (block[vector * 64 + byte] >> shift & ((1 << width) - 1)) << below;
    below += static_cast<int32_t>(width);
    block += width * 64;
  }
  return u - (1 << (bits - 1));
}

inline void check_packed_intx(const IntxCase& c, const uint8_t* packed, const std::string& text) {
  const int64_t tile_bytes = tq_intx_tile_bytes(&c.shape), n = c.shape.n, k = c.shape.k;
  const int64_t zeros = c.shape.has_zero_point ? (c.groups * 16 + 63) / 64 * 64 : 0;
  for (int64_t row = 0; row < n; ++row) {
    const uint8_t* tile = packed + row / 16 * tile_bytes;
    for (int64_t i = 0; i < k; ++i)
      CHECK(stored_integer(c, packed, row, i) == c.weight[static_cast<size_t>(row * k + i)], "%s: packed [%ld, %ld]",
            text.c_str(), long(row), long(i));
    for (int64_t g = 0; g < c.groups; ++g) {
      const size_t at = static_cast<size_t>(row * c.groups + g);
      const int64_t group_bytes = 64 + (c.size + 31) / 32 * 64 * c.shape.bits;
      CHECK(!std::memcmp(tile + g * group_bytes + row % 16 * 4, &c.scale[at], 4), "%s: scale [%ld, %ld]", text.c_str(),
            long(row), long(g));
      if (!c.shape.has_zero_point) continue;
      const uint8_t stored = tile[tile_bytes - 64 - zeros + g * 16 + row % 16];
      CHECK(stored - (1 << (c.shape.bits - 1)) == c.zero[at], "%s: zero point [%ld, %ld]", text.c_str(), long(row),
            long(g));
    }
  }
}

inline IntxCase draw_intx_case(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  IntxCase c;
  c.base.place = trial.place;
  Linear& l = c.base.l;
  const bool large = draw.one_in(3);  // enough for a second thread
  l.m = large ? 1 + draw.below(30) : draw_size(draw, 70);
  l.n = large ? 200 + draw.below(200) : draw_size(draw, 100);
  l.k = large ? 300 + draw.below(300) : draw_size(draw, 400);
  if (draw.one_in(16)) l.k = 2040 + draw.below(300);  // groups of more blocks than are unpacked at a time
  c.shape.n = l.n;
  c.shape.k = l.k;
  c.shape.bits = 2 + draw.below(7);
  c.shape.group_size = std::min<int64_t>(l.k, draw.pick<int64_t>({0, 32, 64, 128, 1 + draw.below(70), l.k}));
  c.shape.has_zero_point = draw.one_in(2);
  c.size = c.shape.group_size ? c.shape.group_size : l.k;
  c.groups = (l.k + c.size - 1) / c.size;
  l.x_stride = l.k + draw.pick<int64_t>({0, 0, 1, 7});
  l.x_type = draw.pick({FloatType::kF32, FloatType::kBF16, FloatType::kF16});
  l.mode = draw.pick({RowMode::kSymmetric, RowMode::kAsymmetric, RowMode::kStatic});
  l.activation = kActivations[draw.below(kNumActivations)];
  l.out_type = draw.pick({OutType::kF32, OutType::kBF16, OutType::kF16});
  l.ldc = l.n + draw.pick<int64_t>({0, 0, 1, 5});
  l.qmin = static_cast<int32_t>(draw.below(100)) - 128;
  l.qmax = l.qmin + 1 + static_cast<int32_t>(draw.below(127 - l.qmin));
  if (l.mode != RowMode::kStatic) {
    const int64_t bits = draw.one_in(2) ? 8 : 2 + draw.below(6);
    l.qmax = (1 << (bits - 1)) - 1;
    l.qmin = -l.qmax - 1;
  }
  l.zero_point = l.qmin + static_cast<int32_t>(draw.below(l.qmax - l.qmin + 1));
  const int flavour = static_cast<int>(draw.below(7));
  const int64_t kind = draw.below(3);  // any integers; only the ends of the range; the lowest one alone
  const bool bias = draw.one_in(2);
  c.base.text = std::to_string(l.m) + " x " + std::to_string(l.n) + " x " + std::to_string(l.k) + ", " +
                std::to_string(c.shape.bits) + " bits in groups of " + std::to_string(c.shape.group_size) +
                (c.shape.has_zero_point ? " with zero points" : "") + ", mode " + std::to_string(int(l.mode)) +
                " values " + std::to_string(flavour) + " activation " + std::to_string(int(l.activation)) + " out " +
                std::to_string(int(l.out_type));
  Random random(draw.seed());
  l.scale = std::ldexp(0.5f + random.unit(), flavour == 4 ? static_cast<int>(random.below(200)) - 120 : -5);
  fill_input(l, trial.inputs, random, flavour);
  const int64_t half = int64_t{1} << (c.shape.bits - 1);
  const auto integer = [&] {
    if (kind == 2) return static_cast<int8_t>(-half);
    if (kind == 1) return static_cast<int8_t>(random.one_in(2) ? -half : half - 1);
    return static_cast<int8_t>(random.below(2 * half) - half);
  };
  c.weight.resize(static_cast<size_t>(l.n * l.k));
  for (int8_t& w : c.weight) w = integer();
  c.zero.resize(static_cast<size_t>(l.n * c.groups));
  for (int8_t& z : c.zero) z = c.shape.has_zero_point ? integer() : int8_t{0};
  c.scale.resize(c.zero.size());
  for (float& s : c.scale) s = 0.0005f + random.unit() * 0.01f;
  if (bias)
    l.bias = filled<float>(trial.inputs, l.n, [&] { return draw_float(random, random.one_in(9) ? flavour : 0); });
  return c;
}

// torchquant/functional/intx.py, as naively as possible.
inline Expected expected_of(const IntxCase& c) {
  const Linear& l = c.base.l;
  Expected e;
  e.y.resize(static_cast<size_t>(l.m * l.n));
  std::vector<int32_t> q(static_cast<size_t>(l.k));
  for (int64_t m = 0; m < l.m; ++m) {
    const RowQuantization r = row_quantization(l, m);
    for (int64_t k = 0; k < l.k; ++k) q[static_cast<size_t>(k)] = row_value(l, r, m, k);
    for (int64_t n = 0; n < l.n; ++n) {
      float t = 0.0f, y = std::numeric_limits<float>::quiet_NaN();
      for (int64_t g = 0; g < c.groups; ++g) {
        const size_t at = static_cast<size_t>(n * c.groups + g);
        int64_t sum = 0;
        for (int64_t k = g * c.size; k < std::min(l.k, (g + 1) * c.size); ++k)
          sum += static_cast<int64_t>(q[static_cast<size_t>(k)] - r.zero) *
                 (c.weight[static_cast<size_t>(n * l.k + k)] - c.zero[at]);
        t = c.shape.group_size ? std::fmaf(static_cast<float>(sum), c.scale[at], t) : static_cast<float>(sum);
      }
      const float scale = c.shape.group_size ? r.scale : r.scale * c.scale[static_cast<size_t>(n)];
      if (!r.bad) y = l.bias ? std::fmaf(t, scale, l.bias[n]) : t * scale;
      e.y[static_cast<size_t>(m * l.n + n)] = y;
    }
  }
  if (l.activation == Activation::kNone) return e;
  if (is_hard(l.activation)) {
    for (float& y : e.y) y = hard_activation(l.activation, y);
    return e;
  }
  // The others are the core's own in fp32, which core_layer_case.h holds to the true functions.
  std::vector<float> out(e.y.size());
  tq_activation_call call{};
  call.x = e.y.data();
  call.out = out.data();
  call.x_type = call.out_type = TQ_F32;
  call.activation = static_cast<tq_activation>(l.activation);
  call.rows = 1;
  call.length = l.m * l.n;
  CHECK(tq_activate(&call, nullptr) == TQ_OK, "activation of the reference");
  e.y = out;
  return e;
}

inline void check_core_intx(Trial& trial) {
  IntxCase c = draw_intx_case(trial);
  Linear& l = c.base.l;
  const Expected expected = expected_of(c);
  const int64_t size = tq_tiles(l.n) * tq_intx_tile_bytes(&c.shape);
  std::vector<uint8_t> first;
  on_every_path(trial, trial.draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    const std::string text = name + ", " + c.base.text;
    Memory& memory = trial.outputs;
    const auto canonical = [&](const auto& values) {
      using T = std::decay_t<decltype(values[0])>;
      T* copy = memory.take<T>(static_cast<int64_t>(values.size()));
      std::copy(values.begin(), values.end(), copy);
      return copy;
    };
    const int8_t* weight = canonical(c.weight);
    const float* scale = canonical(c.scale);
    const int8_t* zero = c.shape.has_zero_point ? canonical(c.zero) : nullptr;
    auto* packed = memory.take<uint8_t>(size);
    CHECK(tq_pack_intx(weight, scale, zero, &c.shape, packed, parallel) == TQ_OK, "%s", text.c_str());
    if (first.empty()) {
      check_packed_intx(c, packed, text);
      first = bytes_of(packed, size);
    }
    CHECK(same_bytes(packed, first), "%s: tq_pack_intx gives other bytes", text.c_str());
    auto* weight_again = memory.take<int8_t>(l.n * l.k);
    auto* scale_again = memory.take<float>(l.n * c.groups);
    auto* zero_again = c.shape.has_zero_point ? memory.take<int8_t>(l.n * c.groups) : nullptr;
    CHECK(tq_unpack_intx(packed, &c.shape, weight_again, scale_again, zero_again, parallel) == TQ_OK, "%s",
          text.c_str());
    CHECK(!std::memcmp(weight_again, weight, c.weight.size()), "%s: unpacked weight", text.c_str());
    CHECK(!std::memcmp(scale_again, scale, c.scale.size() * 4), "%s: unpacked scales", text.c_str());
    CHECK(!zero || !std::memcmp(zero_again, zero, c.zero.size()), "%s: unpacked zero points", text.c_str());

    l.c = memory.take<uint8_t>(((l.m - 1) * l.ldc + l.n) * element_bytes(l.out_type));
    const tq_rows rows = {l.x, static_cast<tq_type>(l.x_type), l.m, l.k, l.x_stride};
    const tq_row_quantization how = {static_cast<tq_row_mode>(l.mode), l.qmin, l.qmax, l.scale, l.zero_point};
    tq_intx_part part{};
    part.shape = c.shape;
    part.packed = packed;
    part.bias = l.bias;
    part.activation = static_cast<tq_activation>(l.activation);
    part.out_type = static_cast<tq_type>(l.out_type);
    part.out = l.c;
    part.out_stride = l.ldc;
    CHECK(tq_linear_intx(&rows, &how, &part, parallel) == TQ_OK, "%s", text.c_str());
    check_output(c.base, torchquant::kernels(), expected);
  });
}

}  // namespace native
