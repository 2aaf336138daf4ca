// A decoder (csrc/core/decoder.h): tokens that come together have the bits that they have one by one, on every
// instruction set and however the work is divided. Random layers of all kinds, and caches that end at an unmapped page.
#pragma once

#include <array>

#include "core/decoder.h"
#include "core_case.h"
#include "isa.h"

namespace native {

namespace decoder = torchquant::decoder;

struct DecoderCase {
  decoder::Sizes sizes{};
  std::vector<decoder::Block> blocks;
  decoder::Call call{};  // of all tokens, without hidden and caches
  int64_t tokens = 0;
  std::vector<float> hidden;
  std::string text;
};

inline decoder::Layer draw_layer(Trial& trial, Random& random, int64_t n, int64_t k) {
  Memory& memory = trial.inputs;
  decoder::Layer layer{};
  layer.kind = trial.draw.pick({decoder::Kind::kInt8, decoder::Kind::kIntx, decoder::Kind::kIntxFloats});
  layer.shape.n = n, layer.shape.k = k;
  layer.how = {trial.draw.pick({TQ_SYMMETRIC, TQ_ASYMMETRIC, TQ_STATIC}), -128, 127, 0.03f, 5};
  if (trial.draw.one_in(2)) layer.bias = filled<float>(memory, n, [&] { return random.normal(); });
  const auto scale = [&] { return 0.002f + 0.01f * random.unit(); };
  if (layer.kind == decoder::Kind::kInt8) {
    const auto weight = bytes_of(filled<int8_t>(memory, n * k, [&] { return int8_t(random.below(256) - 128); }), n * k);
    auto* packed = memory.take<int8_t>(tq_tiles(n) * tq_tile_bytes(k));
    CHECK(tq_pack_weight(reinterpret_cast<const int8_t*>(weight.data()), k, 1, n, k, packed, nullptr) == TQ_OK, "pack");
    layer.packed = packed;
    layer.weight_scale = filled<float>(memory, n, scale);
    if (trial.draw.one_in(2))
      layer.weight_zero_point = filled<int32_t>(memory, n, [&] { return int32_t(random.below(256) - 128); });
    return layer;
  }
  layer.shape.bits = 2 + trial.draw.below(7);
  layer.shape.group_size = std::min<int64_t>(k, trial.draw.pick<int64_t>({0, 16, 32}));
  layer.shape.has_zero_point = trial.draw.one_in(2);
  const int64_t half = int64_t{1} << (layer.shape.bits - 1), size = layer.shape.group_size ? layer.shape.group_size : k;
  const auto integer = [&] { return static_cast<int8_t>(random.below(2 * half) - half); };
  const int8_t* weight = filled<int8_t>(memory, n * k, integer);
  const int64_t groups = (k + size - 1) / size;
  const float* scales = filled<float>(memory, n * groups, scale);
  const int8_t* zeros = filled<int8_t>(memory, n * groups, integer);
  auto* packed = memory.take<uint8_t>(tq_tiles(n) * tq_intx_tile_bytes(&layer.shape));
  CHECK(tq_pack_intx(weight, scales, layer.shape.has_zero_point ? zeros : nullptr, &layer.shape, packed, nullptr) ==
            TQ_OK,
        "pack");
  layer.packed = packed;
  return layer;
}

inline DecoderCase draw_decoder(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  DecoderCase c;
  decoder::Sizes& s = c.sizes;
  s.kv_heads = 1 + draw.below(3), s.heads = s.kv_heads * (1 + draw.below(3));
  s.head_dim = 2 * draw_size(draw, 20);
  s.hidden = draw_size(draw, 70), s.intermediate = draw_size(draw, 70);
  s.scale_in_powers_of_2 = 0.3f;
  s.activation = draw.pick({TQ_SILU, TQ_GELU_TANH});
  c.tokens = draw.one_in(4) ? 60 + draw.below(20) : 1 + draw.below(6);
  decoder::Call& call = c.call;
  const int64_t bits = draw.pick<int64_t>({32, 8, 4});
  call.is_float = bits == 32;
  call.has_recent = bits == 4 && draw.one_in(2);
  if (!call.is_float) {
    call.shape = {s.head_dim, bits, std::min<int64_t>(s.head_dim, draw.pick<int64_t>({16, 256}))};
    call.recent_shape = {s.head_dim, 8, s.head_dim};
  }
  call.turned = 2 * draw.below(s.head_dim / 2 + 1);
  Random random(draw.seed());
  const auto norm = [&](int64_t size, bool present) {
    const auto weight = [&] { return 0.5f + random.unit(); };
    return decoder::Norm{present, draw.one_in(3) ? nullptr : filled<float>(trial.inputs, size, weight), 1e-5f};
  };
  const int64_t blocks = 1 + draw.below(2), q = s.q_width(), kv = s.kv_width();
  const auto layer = [&](int64_t n, int64_t k) { return draw_layer(trial, random, n, k); };
  for (int64_t i = 0; i < blocks; ++i) {
    decoder::Block b;
    b.input_norm = norm(s.hidden, true), b.post_norm = norm(s.hidden, true);
    b.q_norm = norm(s.head_dim, draw.one_in(2)), b.k_norm = norm(s.head_dim, draw.one_in(2));
    b.qkv = decoder::Group({layer(q, s.hidden), layer(kv, s.hidden), layer(kv, s.hidden)}, false);
    b.o = decoder::Group({layer(s.hidden, q)}, false);
    b.gate_up = decoder::Group({layer(s.intermediate, s.hidden), layer(s.intermediate, s.hidden)}, true);
    b.down = decoder::Group({layer(s.hidden, s.intermediate)}, false);
    c.blocks.push_back(std::move(b));
  }
  const auto angle = [&] { return 2.0f * random.unit() - 1.0f; };
  call.cos = filled<float>(trial.inputs, c.tokens * call.turned, angle);
  call.sin = filled<float>(trial.inputs, c.tokens * call.turned, angle);
  for (int64_t i = 0; i < c.tokens * s.hidden; ++i) c.hidden.push_back(random.normal());
  c.text = std::to_string(c.tokens) + " tokens, hidden " + std::to_string(s.hidden) + ", " + std::to_string(s.heads) +
           " heads, " + std::to_string(s.kv_heads) + " of keys, " + std::to_string(s.head_dim) + " channels, " +
           std::to_string(bits) + " bits" + (call.has_recent ? ", recent" : "");
  return c;
}

// The hidden states and the caches behind a call for all tokens, or one call for each.
inline std::vector<uint8_t> run_decoder(const DecoderCase& c, Memory& memory, bool together,
                                        const tq_parallel* parallel) {
  const decoder::Sizes& s = c.sizes;
  const int64_t row =
      c.call.is_float ? 4 * s.head_dim : tq_kv_row_bytes(c.call.has_recent ? &c.call.recent_shape : &c.call.shape);
  const int64_t side = s.kv_heads * c.tokens * row;
  std::vector<decoder::Cache> caches(c.blocks.size());
  std::vector<uint8_t*> sides;
  for (decoder::Cache& cache : caches)
    for (decoder::Rows* rows :
         {c.call.has_recent ? &cache.recent_key : &cache.key, c.call.has_recent ? &cache.recent_value : &cache.value}) {
      sides.push_back(memory.take<uint8_t>(side));
      *rows = {sides.back(), c.tokens * row, row};
    }
  float* hidden = memory.take<float>(c.tokens * s.hidden);
  std::memcpy(hidden, c.hidden.data(), c.hidden.size() * 4);
  const int64_t threads = parallel ? parallel->threads(parallel->context) : 1;
  for (int64_t first = 0; first < c.tokens; first += together ? c.tokens : 1) {
    decoder::Call call = c.call;
    call.tokens = together ? c.tokens : 1;
    call.hidden = hidden + first * s.hidden;
    call.cos += first * call.turned;
    call.sin += first * call.turned;
    call.caches = caches.data();
    (call.has_recent ? call.recent : call.position) = first;
    const torchquant::KernelTable& table = torchquant::kernels();
    auto* arena = memory.take<uint8_t>(decoder::arena_bytes(c.blocks, s, call, table, threads));
    CHECK(decoder::run(c.blocks, s, call, table, arena, threads, parallel) == TQ_OK, "decoder");
  }
  std::vector<uint8_t> result = bytes_of(hidden, c.tokens * s.hidden * 4);
  for (const uint8_t* bytes : sides) {
    const auto rows = bytes_of(bytes, side);
    result.insert(result.end(), rows.begin(), rows.end());
  }
  return result;
}

inline void check_core_decoder(Trial& trial) {
  const DecoderCase c = draw_decoder(trial);
  std::vector<uint8_t> first;
  on_every_path(trial, trial.draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    for (const bool together : {false, true}) {
      const std::vector<uint8_t> bytes = run_decoder(c, trial.outputs, together, parallel);
      if (first.empty()) first = bytes;
      CHECK(bytes == first, "%s: a decoder of %s, %s, has other bits", name.c_str(), c.text.c_str(),
            together ? "together" : "one by one");
    }
  });
}

}  // namespace native
