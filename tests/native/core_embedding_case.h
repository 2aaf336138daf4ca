// Rows of packed weights of 2 to 8 bits through the C interface, and sums of them.
#pragma once

#include "core/torchquant_embedding.h"
#include "core_intx_case.h"

namespace native {

// torchquant/functional/embedding.py, as naively as possible.
inline float table_value(const IntxCase& c, int64_t row, int64_t k) {
  const size_t at = static_cast<size_t>(row * c.groups + k / c.size);
  return static_cast<float>(c.weight[static_cast<size_t>(row * c.shape.k + k)] - c.zero[at]) * c.scale[at];
}

inline float bag_value(const IntxCase& c, const tq_bags& bags, int64_t bag, int64_t k) {
  float t = 0.0f;
  int64_t count = 0;
  for (int64_t i = bags.offset[bag]; i < bags.offset[bag + 1]; ++i) {
    if (bags.index[i] == bags.padding) continue;
    const float row = table_value(c, bags.index[i], k);
    if (bags.mode == TQ_BAG_MAX) t = count == 0 || row > t ? row : t;
    else t += bags.weight ? bags.weight[i] * row : row;
    ++count;
  }
  return bags.mode == TQ_BAG_MEAN && count ? t / static_cast<float>(count) : t;
}

inline void check_core_embedding(Trial& trial) {
  const IntxCase c = draw_intx_case(trial);
  Draw& draw = trial.draw;
  const int64_t k = c.shape.k, count = draw.below(60);
  const tq_type type = draw.pick({TQ_F32, TQ_BF16, TQ_F16});
  tq_bags bags{};
  bags.bags = 1 + draw.below(6);
  bags.mode = draw.pick({TQ_BAG_SUM, TQ_BAG_MEAN, TQ_BAG_MAX});
  bags.padding = draw.one_in(2) ? draw.below(c.shape.n) : -1;
  const bool weighted = bags.mode == TQ_BAG_SUM && draw.one_in(2);
  Random random(draw.seed());
  auto* index = filled<int64_t>(trial.inputs, count, [&] { return static_cast<int64_t>(random.below(c.shape.n)); });
  int64_t* offset = trial.inputs.take<int64_t>(bags.bags + 1);
  for (int64_t b = 0; b <= bags.bags; ++b) offset[b] = b ? offset[b - 1] + random.below(count - offset[b - 1] + 1) : 0;
  bags.index = index;
  bags.offset = offset;
  if (weighted) bags.weight = filled<float>(trial.inputs, count, [&] { return random.unit() * 4.0f - 2.0f; });
  std::vector<uint8_t> packed(static_cast<size_t>(tq_tiles(c.shape.n) * tq_intx_tile_bytes(&c.shape)));
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    const std::string text = name + ", embedding, " + c.base.text;
    Memory& memory = trial.outputs;
    auto* weight = memory.take<uint8_t>(static_cast<int64_t>(packed.size()));
    CHECK(tq_pack_intx(c.weight.data(), c.scale.data(), c.shape.has_zero_point ? c.zero.data() : nullptr, &c.shape,
                       weight, parallel) == TQ_OK,
          "%s", text.c_str());
    auto* rows = memory.take<uint8_t>(count * k * size_of(type));
    CHECK(tq_embedding_intx(weight, &c.shape, index, count, rows, type, parallel) == TQ_OK, "%s", text.c_str());
    for (int64_t i = 0; i < count * k; ++i)
      CHECK(load(rows, type, i) == rounded(type, table_value(c, index[i / k], i % k)), "%s: row %ld, input %ld",
            text.c_str(), long(i / k), long(i % k));
    auto* sums = memory.take<uint8_t>(bags.bags * k * size_of(type));
    CHECK(tq_embedding_bag_intx(weight, &c.shape, &bags, sums, type, parallel) == TQ_OK, "%s", text.c_str());
    for (int64_t i = 0; i < bags.bags * k; ++i)
      CHECK(load(sums, type, i) == rounded(type, bag_value(c, bags, i / k, i % k)), "%s: bag %ld, input %ld, mode %d",
            text.c_str(), long(i / k), long(i % k), int(bags.mode));
  });
}

}  // namespace native
