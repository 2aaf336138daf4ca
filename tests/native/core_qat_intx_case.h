// A float weight, quantized to 2 to 8 bits and packed in one step: the same bytes as quantized by group and then packed.
#pragma once

#include "core/torchquant_intx.h"
#include "core_case.h"

namespace native {

inline void check_core_quantize_pack_intx(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const MatrixSize size = draw_matrix(draw);
  const int64_t n = size.rows, k = size.columns, stride = k + draw.below(3);
  const tq_type type = trial.float_type();
  const auto mode = draw.pick({TQ_STATIC, TQ_SYMMETRIC, TQ_ASYMMETRIC});
  const int64_t bits = 2 + draw.below(7);
  const bool per_channel = draw.one_in(4), narrow_range = draw.one_in(4);
  const int64_t group = per_channel ? k : std::min(k, draw.one_in(2) ? int64_t{32} : 1 + draw.below(140));
  const int64_t groups = (k + group - 1) / group;
  const tq_intx_shape shape{n, k, bits, per_channel ? 0 : group, mode == TQ_ASYMMETRIC};
  const int flavour = static_cast<int>(draw.below(3));
  Random random(draw.seed());
  const tq_rows rows = {random_elements(trial.inputs, random, (n - 1) * stride + k, type, flavour), type, n, k, stride};
  const int32_t qmax = (1 << (bits - 1)) - 1, qmin = mode != TQ_ASYMMETRIC && narrow_range ? -qmax : -qmax - 1;
  std::vector<float> given(static_cast<size_t>(n * groups));
  for (float& scale : given) scale = std::ldexp(0.5f + random.unit(), 1 - static_cast<int>(bits));
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    Memory& memory = trial.outputs;
    const int64_t bytes = tq_tiles(n) * tq_intx_tile_bytes(&shape);
    auto* packed = memory.take<uint8_t>(bytes);
    auto* expected = memory.take<uint8_t>(bytes);
    auto* scale = memory.take<float>(n * groups);
    auto* zero = memory.take<int8_t>(n * groups);
    std::copy(given.begin(), given.end(), scale);
    CHECK(tq_quantize_pack_intx(&rows, mode, qmin, qmax, &shape, packed, scale, zero, parallel) == TQ_OK, "%s",
          name.c_str());
    std::vector<int8_t> q(static_cast<size_t>(n * k));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * group, at = i * groups + g;
        Linear l;
        l.k = std::min(group, k - first), l.x_stride = 0, l.x_type = static_cast<FloatType>(type);
        l.x = static_cast<const char*>(rows.x) + (i * stride + first) * (type == TQ_F32 ? 4 : 2);
        l.mode = static_cast<RowMode>(mode), l.qmin = qmin, l.qmax = qmax;
        l.scale = given[static_cast<size_t>(at)];
        const RowQuantization r = row_quantization(l, 0);
        CHECK(r.bad ? std::isnan(scale[at]) : scale[at] == r.scale, "%s: scale [%ld, %ld]", name.c_str(), long(i),
              long(g));
        CHECK(zero[at] == r.zero, "%s: zero point [%ld, %ld]", name.c_str(), long(i), long(g));
        for (int64_t j = 0; j < l.k; ++j)
          q[static_cast<size_t>(i * k + first + j)] = static_cast<int8_t>(r.bad ? 0 : row_value(l, r, 0, j));
      }
    }
    CHECK(tq_pack_intx(q.data(), scale, shape.has_zero_point ? zero : nullptr, &shape, expected, nullptr) == TQ_OK,
          "%s", name.c_str());
    CHECK(!std::memcmp(packed, expected, static_cast<size_t>(bytes)),
          "%s: quantize_pack_intx of %ld x %ld, %ld bits, groups of %ld, mode %d", name.c_str(), long(n), long(k),
          long(bits), long(group), int(mode));
  });
}

}  // namespace native
