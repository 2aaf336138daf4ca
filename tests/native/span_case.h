// Spans of elements, quantized and dequantized by the reference and by every instruction set.
#pragma once

#include "linear_case.h"

namespace native {

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
      const float rounded = type == FloatType::kF32    ? y
                            : type == FloatType::kBF16 ? widen(narrow(y, 8, 7), 8, 7)
                                                       : widen(narrow(y, 5, 10), 5, 10);
      CHECK(same_float(back, rounded), "%s: dequantize_span of %ld, type %d: [%ld] is %a, not %a", table.name, long(n),
            int(type), long(i), back, rounded);
    }
  }
}

}  // namespace native
