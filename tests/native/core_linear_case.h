// Linear layers through the C interface: the cases of linear_case.h, and what training does to a weight.
#pragma once

#include "core_case.h"

namespace native {

inline tq_linear_part part_of(const Linear& l) {
  tq_linear_part part{};
  part.n = l.n;
  part.packed = l.packed;
  part.weight_scale = l.weight_scale;
  part.weight_zero_point = l.weight_zero;
  part.bias = l.bias;
  part.integer_bias = l.bias_i32;
  part.activation = static_cast<tq_activation>(l.activation);
  part.out_type = static_cast<tq_type>(l.out_type);
  part.out_scale = l.out_scale;
  part.out_zero_point = l.out_zero;
  part.out_qmin = l.out_qmin;
  part.out_qmax = l.out_qmax;
  part.out_stride = l.ldc;
  return part;
}

inline tq_linear_input input_of(const Linear& l) {
  tq_linear_input in{};
  in.rows = {l.x, l.float_input ? static_cast<tq_type>(l.x_type) : (l.x_signed ? TQ_I8 : TQ_U8), l.m, l.k, l.x_stride};
  in.quantization = {static_cast<tq_row_mode>(l.mode), l.qmin, l.qmax, l.scale, l.zero_point};
  in.scale = l.in_scale;
  in.zero_point = l.in_zero;
  in.scale_per_row = in.zero_point_per_row = true;
  return in;
}

// The layer alone, and cut into two layers on one input; its quantized rows; its packed weight.
inline void check_core_linear(Case& c, Trial& trial, const Expected& e, uint64_t seed) {
  Linear& l = c.l;
  const int64_t packed_size = tq_tiles(l.n) * tq_tile_bytes(l.k);
  const std::vector<uint8_t> packed = bytes_of(l.packed, packed_size);
  const int64_t first = tq_tiles(l.n) / 2 * 16;  // outputs of the first of two layers
  int8_t* halves[2] = {trial.inputs.take<int8_t>(tq_tiles(first) * tq_tile_bytes(l.k)),
                       trial.inputs.take<int8_t>(tq_tiles(l.n - first) * tq_tile_bytes(l.k))};
  if (first > 0) CHECK(tq_pack_weight(c.weight.data(), l.k, 1, first, l.k, halves[0], nullptr) == TQ_OK, "pack");
  CHECK(tq_pack_weight(c.weight.data() + first * l.k, l.k, 1, l.n - first, l.k, halves[1], nullptr) == TQ_OK, "pack");
  on_every_path(trial, seed, [&](const tq_parallel* parallel, const std::string& name) {
    const std::string text = name + ", " + c.text;
    Memory& memory = trial.outputs;
    const KernelTable& table = torchquant::kernels();
    l.c = memory.take<uint8_t>(((l.m - 1) * l.ldc + l.n) * element_bytes(l.out_type));
    const tq_linear_input in = input_of(l);
    tq_linear_part part = part_of(l);
    part.out = l.c;
    CHECK(tq_linear(&in, &part, 1, parallel) == TQ_OK, "%s", text.c_str());
    check_output(c, table, e);

    std::memset(l.c, Memory::kUntouched, static_cast<size_t>(((l.m - 1) * l.ldc + l.n) * element_bytes(l.out_type)));
    tq_linear_part parts[2] = {part, part};
    parts[0].n = first;
    parts[0].packed = halves[0];
    parts[1].n = l.n - first;
    parts[1].packed = halves[1];
    parts[1].out = static_cast<uint8_t*>(l.c) + first * element_bytes(l.out_type);
    if (l.weight_scale) parts[1].weight_scale += first;
    if (l.weight_zero) parts[1].weight_zero_point += first;
    if (l.bias) parts[1].bias += first;
    if (l.bias_i32) parts[1].integer_bias += first;
    CHECK((first > 0 ? tq_linear(&in, parts, 2, parallel) : tq_linear(&in, parts + 1, 1, parallel)) == TQ_OK, "%s",
          text.c_str());
    check_output(c, table, e);

    auto* again = memory.take<int8_t>(packed_size);
    CHECK(tq_pack_weight(c.weight.data(), l.k, 1, l.n, l.k, again, parallel) == TQ_OK, "%s", text.c_str());
    CHECK(same_bytes(again, packed), "%s: tq_pack_weight gives other bytes", text.c_str());
    auto* back = memory.take<int8_t>(l.n * l.k);
    CHECK(tq_unpack_weight(again, l.n, l.k, back, parallel) == TQ_OK, "%s", text.c_str());
    CHECK(!std::memcmp(back, c.weight.data(), c.weight.size()), "%s: tq_unpack_weight", text.c_str());

    if (!l.float_input) return;
    auto* q = memory.take<int8_t>(l.m * l.k);
    auto* scale = memory.take<float>(l.m);
    auto* zero = memory.take<int32_t>(l.m);
    CHECK(tq_quantize_rows(&in.rows, &in.quantization, q, scale, zero, parallel) == TQ_OK, "%s", text.c_str());
    for (int64_t m = 0; m < l.m; ++m) {
      const RowQuantization& r = e.rows[static_cast<size_t>(m)];
      CHECK(r.bad ? std::isnan(scale[m]) : scale[m] == r.scale, "%s: scale of row %ld", text.c_str(), long(m));
      CHECK(zero[m] == r.zero, "%s: zero point of row %ld is %d, not %d", text.c_str(), long(m), zero[m], r.zero);
    }
    for (int64_t i = 0; i < l.m * l.k; ++i)
      CHECK(q[i] == e.q[static_cast<size_t>(i)], "%s: q[%ld] is %d", text.c_str(), long(i), q[i]);
  });
}

// A weight that is large enough for several threads, packed from either order, and unpacked.
inline void check_core_pack(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const int64_t n = 1 + draw.below(1000), k = 1 + draw.below(1500);
  const bool by_columns = draw.one_in(2);
  Random random(draw.seed());
  auto* weight = trial.inputs.take<int8_t>(n * k);
  for (int64_t i = 0; i < n * k; ++i) weight[i] = static_cast<int8_t>(random.next());
  const auto at = [&](int64_t row, int64_t column) { return by_columns ? column * n + row : row * k + column; };
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    auto* packed = trial.outputs.take<int8_t>(tq_tiles(n) * tq_tile_bytes(k));
    auto* back = trial.outputs.take<int8_t>(n * k);
    CHECK(tq_pack_weight(weight, at(1, 0), at(0, 1), n, k, packed, parallel) == TQ_OK, "%s", name.c_str());
    CHECK(tq_unpack_weight(packed, n, k, back, parallel) == TQ_OK, "%s", name.c_str());
    for (int64_t row = 0; row < n; ++row)
      for (int64_t column = 0; column < k; ++column)
        CHECK(back[row * k + column] == weight[at(row, column)], "%s: weight [%ld, %ld] of %ld x %ld", name.c_str(),
              long(row), long(column), long(n), long(k));
  });
}

// A float weight, quantized and packed in one step: the same bytes as quantized by row and then packed.
inline void check_core_quantize_pack(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const MatrixSize size = draw_matrix(draw);
  const int64_t n = size.rows, k = size.columns, stride = k + draw.below(3);
  const tq_type type = trial.float_type();
  const auto mode = draw.pick({TQ_STATIC, TQ_SYMMETRIC, TQ_ASYMMETRIC});
  const bool narrow_range = draw.one_in(2);
  const int flavour = static_cast<int>(draw.below(3));
  Random random(draw.seed());
  const tq_rows rows = {random_elements(trial.inputs, random, (n - 1) * stride + k, type, flavour), type, n, k, stride};
  const int32_t qmax = 127, qmin = mode == TQ_ASYMMETRIC || !narrow_range ? -128 : -127;
  std::vector<float> given(static_cast<size_t>(n));
  for (float& scale : given) scale = std::ldexp(0.5f + random.unit(), -7);
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    Memory& memory = trial.outputs;
    const int64_t bytes = tq_tiles(n) * tq_tile_bytes(k);
    auto* packed = memory.take<int8_t>(bytes);
    auto* expected = memory.take<int8_t>(bytes);
    auto* scale = memory.take<float>(n);
    auto* zero = memory.take<int32_t>(n);
    std::copy(given.begin(), given.end(), scale);
    CHECK(tq_quantize_pack(&rows, mode, qmin, qmax, packed, scale, zero, parallel) == TQ_OK, "%s", name.c_str());
    std::vector<int8_t> q(static_cast<size_t>(n * k));
    for (int64_t i = 0; i < n; ++i) {
      Linear l;
      l.k = k, l.x_stride = stride, l.x = rows.x, l.x_type = static_cast<FloatType>(type);
      l.mode = static_cast<RowMode>(mode), l.qmin = qmin, l.qmax = qmax, l.scale = given[static_cast<size_t>(i)];
      const RowQuantization r = row_quantization(l, i);
      CHECK(r.bad ? std::isnan(scale[i]) : scale[i] == r.scale, "%s: scale of output %ld", name.c_str(), long(i));
      CHECK(zero[i] == r.zero, "%s: zero point of output %ld", name.c_str(), long(i));
      for (int64_t j = 0; j < k; ++j)
        q[static_cast<size_t>(i * k + j)] = static_cast<int8_t>(r.bad ? 0 : row_value(l, r, i, j));
    }
    CHECK(tq_pack_weight(q.data(), k, 1, n, k, expected, nullptr) == TQ_OK, "%s", name.c_str());
    CHECK(!std::memcmp(packed, expected, static_cast<size_t>(bytes)), "%s: quantize_pack of %ld x %ld, mode %d",
          name.c_str(), long(n), long(k), int(mode));
  });
}

}  // namespace native
