// Spans of elements, quantized and dequantized by the reference and by every instruction set.
#pragma once

#include "linear_case.h"

namespace native {

inline float rounded_to(FloatType type, float y) {
  if (type == FloatType::kBF16) return widen(narrow(y, 8, 7), 8, 7);
  return type == FloatType::kF16 ? widen(narrow(y, 5, 10), 5, 10) : y;
}

inline void check_span(Draw& draw, Scratch& inputs, Scratch& outputs) {
  const Place place = draw.pick({Place::kBeforeHole, Place::kBehindHole, Place::kHeap});
  const int64_t n = draw_size(draw, 300);
  const auto type = draw.pick({FloatType::kF32, FloatType::kBF16, FloatType::kF16});
  const bool by_element = draw.one_in(2), q_signed = draw.one_in(2), real = draw.one_in(2);
  const int flavour = static_cast<int>(draw.below(7));
  Random random(draw.seed());
  Memory& memory = inputs.memory;
  memory.begin(place);
  Linear l;  // for its input alone
  l.m = 1, l.k = l.x_stride = n, l.x_type = type;
  fill_input(l, memory, random, flavour);
  const int64_t scales = by_element ? n : 1;
  const int32_t least = q_signed ? -128 : 0;
  auto* scale = memory.take<float>(scales);
  auto* inverse = memory.take<float>(scales);
  auto* real_zero = memory.take<float>(scales);
  auto* zero = memory.take<int32_t>(scales);
  auto *lo = memory.take<float>(scales), *hi = memory.take<float>(scales);
  for (int64_t i = 0; i < scales; ++i) {
    scale[i] = std::ldexp(0.5f + random.unit(), static_cast<int>(random.below(flavour == 4 ? 200 : 8)) - 6);
    inverse[i] = 1.0f / scale[i];
    real_zero[i] = real ? random.normal() : 0.0f;
    zero[i] = real ? 0 : least + static_cast<int32_t>(random.below(256));
    lo[i] = static_cast<float>(least - zero[i]);
    hi[i] = static_cast<float>(least + 255 - zero[i]);
  }
  auto* bytes = memory.take<uint8_t>(n);
  for (int64_t i = 0; i < n; ++i) bytes[i] = static_cast<uint8_t>(random.next());

  for (torchquant::Isa isa : torchquant::usable_isas()) {
    const KernelTable& table = table_of(isa);
    outputs.memory.begin(place);
    auto* q = outputs.memory.take<uint8_t>(n);
    table.quantize_span({l.x, q, n, type, q_signed, by_element, inverse, real_zero, zero, lo, hi});
    auto* x = outputs.memory.take<uint8_t>(n * (type == FloatType::kF32 ? 4 : 2));
    table.dequantize_span({bytes, x, n, type, q_signed, by_element, scale, real_zero, zero, nullptr, nullptr});
    for (int64_t i = 0; i < n; ++i) {
      const int64_t s = by_element ? i : 0;
      const float v = load(l.x, type, i) - real_zero[s];
      const int32_t want = quantize_value(v, inverse[s], zero[s], least, least + 255);
      const int32_t got = q_signed ? static_cast<int8_t>(q[i]) : q[i];
      CHECK(got == want, "%s: quantize_span of %ld, type %d, values %d: [%ld] is %d, not %d", table.name, long(n),
            int(type), flavour, long(i), got, want);
      const int32_t code = q_signed ? static_cast<int8_t>(bytes[i]) : bytes[i];
      const float y = static_cast<float>(code - zero[s]) * scale[s] + real_zero[s];
      const float back = load(x, type, i);
      const float rounded = rounded_to(type, y);
      CHECK(same_float(back, rounded), "%s: dequantize_span of %ld, type %d: [%ld] is %a, not %a", table.name, long(n),
            int(type), long(i), back, rounded);
    }
  }
}

// activation(x), or activation(x) * up: within its bound of the true function on the scalar path, and the same bits on
// the others.
inline void check_activation(Draw& draw, Scratch& inputs, Scratch& outputs) {
  const Place place = draw.pick({Place::kBeforeHole, Place::kBehindHole, Place::kHeap});
  const int64_t n = draw_size(draw, 300);
  const auto in = draw.pick({FloatType::kF32, FloatType::kBF16, FloatType::kF16});
  const bool gated = draw.one_in(3);
  const auto out = gated ? in : draw.pick({FloatType::kF32, FloatType::kBF16, FloatType::kF16});
  const Activation activation = kActivations[draw.below(kNumActivations)];
  const int flavour = static_cast<int>(draw.below(7));
  Random random(draw.seed());
  Memory& memory = inputs.memory;
  memory.begin(place);
  Linear l, up;
  l.m = up.m = 1, l.k = up.k = l.x_stride = up.x_stride = n, l.x_type = up.x_type = in;
  fill_input(l, memory, random, flavour);
  if (gated) fill_input(up, memory, random, 0);
  const auto result_of = [&](const KernelTable& table, FloatType type) {
    const void* result = outputs.memory.take<uint8_t>(n * (type == FloatType::kF32 ? 4 : 2));
    table.activate_span({l.x, gated ? up.x : nullptr, const_cast<void*>(result), n, in, type, activation});
    return result;
  };
  // The scalar path in fp32, element by element where x and up can be widened first.
  std::vector<float> wide(static_cast<size_t>(n)), y(wide.size());
  for (int64_t i = 0; i < n; ++i) wide[static_cast<size_t>(i)] = load(l.x, in, i);
  scalar_table().activate_span({wide.data(), nullptr, y.data(), n, FloatType::kF32, FloatType::kF32, activation});
  for (size_t i = 0; i < y.size(); ++i) {
    CHECK(close_to_activation(activation, wide[i], y[i]), "activation %d of %a is %a", int(activation), double(wide[i]),
          double(y[i]));
    if (gated) y[i] *= load(up.x, in, static_cast<int64_t>(i));
  }
  for (torchquant::Isa isa : torchquant::usable_isas()) {
    const KernelTable& table = table_of(isa);
    outputs.memory.begin(place);
    const void* result = result_of(table, out);
    for (int64_t i = 0; i < n; ++i) {
      const float got = load(result, out, i), want = rounded_to(out, y[static_cast<size_t>(i)]);
      CHECK(same_float(got, want),
            "%s: activate_span of %ld, activation %d, type %d to %d%s: [%ld] of %a is %a, not %a", table.name, long(n),
            int(activation), int(in), int(out), gated ? ", gated" : "", long(i), double(wide[static_cast<size_t>(i)]),
            double(got), double(want));
    }
  }
}

}  // namespace native
