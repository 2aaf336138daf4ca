// Elements that share scales at every granularity, through the C interface: quantize, dequantize, fake quantization,
// its masks, a learned step's gradients, ranges. The reference finds the scale of each element by its own index.
#pragma once

#include "core_case.h"

namespace native {

struct Granularity {
  tq_spans spans;
  int64_t outer, channels, inner;  // of [outer, channels, inner]; groups: rows, groups, group size
  int64_t row = 0;                 // elements in a row of groups, or 0
  int64_t elements, scales;
  const char* name;

  int64_t scale_of(int64_t i) const {
    if (row) return i / row * channels + i % row / inner;
    return i / inner % channels;
  }
};

inline Granularity draw_granularity(Draw& draw) {
  Granularity g{};
  const int64_t kind = draw.below(4);
  if (kind == 0) {
    const int64_t n = draw.one_in(3) ? 17000 + draw.below(20000) : draw_size(draw, 6000);
    g = {tq_spans_per_tensor(n), 1, 1, n, 0, n, 1, "per tensor"};
  } else if (kind == 3) {
    const int64_t rows = draw_size(draw, 40), row = draw_size(draw, 300), size = 1 + draw.below(row + 3);
    const int64_t length = std::min(size, row), groups = (row + length - 1) / length;
    g = {tq_spans_per_group(rows, row, size), rows, groups, length, row, rows * row, rows * groups, "per group"};
  } else {
    // One long row along the channel axis is shared by threads; a few elements never are.
    const bool one_row = kind == 1 && draw.one_in(4);
    const int64_t outer = one_row ? 1 : draw_size(draw, 140), inner = kind == 1 ? 1 : draw_size(draw, 90),
                  channels = one_row ? 10000 + draw.below(20000) : draw_size(draw, 60);
    g = {tq_spans_per_channel(outer, channels, inner),
         outer,
         channels,
         inner,
         0,
         outer * channels * inner,
         channels,
         kind == 1 ? "per channel, last axis" : "per channel"};
  }
  return g;
}

struct SpanCase {
  Granularity g;
  tq_type type;
  const void* x;
  tq_scales scales;
  std::string text;

  float value(int64_t i) const { return load(x, type, i); }
  int64_t at(int64_t i) const { return scales.count == 1 ? 0 : g.scale_of(i); }
  int32_t zero(int64_t i) const { return scales.zero_point ? scales.zero_point[at(i)] : 0; }
  float real_zero(int64_t i) const { return scales.real_zero ? scales.real_zero[at(i)] : 0.0f; }
};

inline SpanCase draw_spans(Trial& trial, Random& random, int flavour, int32_t least, int32_t most) {
  Draw& draw = trial.draw;
  Memory& memory = trial.inputs;
  SpanCase c;
  c.g = draw_granularity(draw);
  c.type = trial.float_type();
  c.x = random_elements(memory, random, c.g.elements, c.type, flavour);
  const int64_t n = c.g.scales;
  auto* scale = memory.take<float>(n);
  auto* zero = memory.take<int32_t>(n);
  auto* real_zero = memory.take<float>(n);
  for (int64_t i = 0; i < n; ++i) {
    scale[i] = std::ldexp(0.5f + random.unit(), static_cast<int>(random.below(6)) - 5);
    zero[i] = least + static_cast<int32_t>(random.below(most - least + 1));
    real_zero[i] = random.normal();
  }
  const int64_t zeros = draw.below(3);
  c.scales = {n, scale, zeros == 1 ? zero : nullptr, zeros == 2 ? real_zero : nullptr, least, most};
  c.text = std::string(c.g.name) + ", " + std::to_string(c.g.elements) + " elements, " + std::to_string(n) +
           " scales, type " + std::to_string(int(c.type)) + ", values " + std::to_string(flavour);
  return c;
}

inline void check_core_affine(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const int flavour = static_cast<int>(draw.below(7));
  const bool is_signed = draw.one_in(2);
  Random random(draw.seed());
  const SpanCase c = draw_spans(trial, random, flavour, is_signed ? -128 : 0, is_signed ? 127 : 255);
  const tq_type q_type = is_signed ? TQ_I8 : TQ_U8;
  const int64_t n = c.g.elements;
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    auto* q = trial.outputs.take<uint8_t>(n);
    auto* back = trial.outputs.take<uint8_t>(n * size_of(c.type));
    CHECK(tq_quantize(c.x, c.type, q, q_type, &c.g.spans, &c.scales, parallel) == TQ_OK, "%s", name.c_str());
    CHECK(tq_dequantize(q, q_type, back, c.type, &c.g.spans, &c.scales, parallel) == TQ_OK, "%s", name.c_str());
    for (int64_t i = 0; i < n; ++i) {
      const float scale = c.scales.scale[c.at(i)];
      const int32_t want =
          quantize_value(c.value(i) - c.real_zero(i), 1.0f / scale, c.zero(i), c.scales.qmin, c.scales.qmax);
      const int32_t got = is_signed ? static_cast<int8_t>(q[i]) : q[i];
      CHECK(got == want, "%s, %s: quantize [%ld] is %d, not %d", name.c_str(), c.text.c_str(), long(i), got, want);
      const float y = rounded(c.type, static_cast<float>(got - c.zero(i)) * scale + c.real_zero(i));
      CHECK(same_float(load(back, c.type, i), y), "%s, %s: dequantize [%ld] is %a, not %a", name.c_str(),
            c.text.c_str(), long(i), double(load(back, c.type, i)), double(y));
    }
  });
}

// One value of fake quantization, and whether its rounded value is in the range.
struct Fake {
  float value;
  bool inside;
};
inline Fake fake_quantized(float x, float scale, int32_t zero, float real_zero, int32_t qmin, int32_t qmax) {
  const float steps = std::nearbyint((x - real_zero) * (1.0f / scale));
  const float lo = static_cast<float>(qmin - zero), hi = static_cast<float>(qmax - zero);
  if (std::isnan(steps)) return {steps, false};
  return {(std::fmin(std::fmax(steps, lo), hi) + 0.0f) * scale + real_zero, lo <= steps && steps <= hi};
}

inline void check_bits(const uint8_t* bits, int64_t n, const std::string& text, const std::vector<bool>& want) {
  for (int64_t i = 0; i < n; ++i)
    CHECK(((bits[i / 8] >> (i % 8)) & 1) == want[static_cast<size_t>(i)], "%s: bit %ld", text.c_str(), long(i));
}

inline void check_core_fake_quantize(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const int flavour = static_cast<int>(draw.below(7));
  const int64_t results = draw.below(3);  // values, bits, both
  Random random(draw.seed());
  const SpanCase c = draw_spans(trial, random, flavour, -8, 7);
  const int64_t n = c.g.elements;
  std::vector<float> values;
  std::vector<bool> inside, positive;
  for (int64_t i = 0; i < n; ++i) {
    const Fake fake = fake_quantized(c.value(i), c.scales.scale[c.at(i)], c.zero(i), c.real_zero(i), -8, 7);
    values.push_back(rounded(c.type, fake.value));
    inside.push_back(fake.inside);
    positive.push_back(c.value(i) > 0.0f);
  }
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    const std::string text = name + ", " + c.text;
    void* out = results == 1 ? nullptr : trial.outputs.take<uint8_t>(n * size_of(c.type));
    uint8_t* bits = results == 0 ? nullptr : trial.outputs.take<uint8_t>((n + 7) / 8);
    CHECK(tq_fake_quantize(c.x, c.type, out, bits, &c.g.spans, &c.scales, parallel) == TQ_OK, "%s", text.c_str());
    for (int64_t i = 0; out && i < n; ++i)
      CHECK(same_float(load(out, c.type, i), values[static_cast<size_t>(i)]), "%s: fake_quantize [%ld] is %a, not %a",
            text.c_str(), long(i), double(load(out, c.type, i)), double(values[static_cast<size_t>(i)]));
    if (bits) check_bits(bits, n, text + ", in_range", inside);

    auto* above = trial.outputs.take<uint8_t>((n + 7) / 8);
    CHECK(tq_positive(c.x, c.type, n, above, parallel) == TQ_OK, "%s", text.c_str());
    check_bits(above, n, text + ", positive", positive);
    auto* masked = trial.outputs.take<uint8_t>(n * size_of(c.type));
    CHECK(tq_mask(c.x, c.type, n, above, masked, parallel) == TQ_OK, "%s", text.c_str());
    for (int64_t i = 0; i < n; ++i) {
      const float want = positive[static_cast<size_t>(i)] ? c.value(i) : 0.0f, got = load(masked, c.type, i);
      CHECK(same_float(got, want), "%s: mask [%ld] is %a, not %a", text.c_str(), long(i), double(got), double(want));
    }
  });
}

inline void check_core_learned(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const bool has_offset = draw.one_in(2);
  Random random(draw.seed());
  SpanCase c = draw_spans(trial, random, 0, -8, 7);
  const int64_t n = c.g.elements, scales = c.g.scales;
  c.scales.real_zero = nullptr;
  auto* offset = trial.inputs.take<float>(scales);
  std::vector<int32_t> zeros;
  for (int64_t i = 0; i < scales; ++i) {
    offset[i] = has_offset ? random.normal() : 0.0f;
    const float zero = std::nearbyint(-offset[i] / c.scales.scale[i]);
    zeros.push_back(static_cast<int32_t>(std::fmin(std::fmax(zero, -8.0f), 7.0f)));
  }
  const void* grad = random_elements(trial.inputs, random, n, c.type, 0);
  // The gradients' sums in double precision, and the sums of their terms' magnitudes: how far fp32 may be away.
  std::vector<double> scale_sum(static_cast<size_t>(scales)), offset_sum(scale_sum), scale_terms(scale_sum),
      offset_terms(scale_sum);
  std::vector<float> grad_x;
  for (int64_t i = 0; i < n; ++i) {
    const size_t s = static_cast<size_t>(c.at(i));
    const float scale = c.scales.scale[s], v = c.value(i) * (1.0f / scale), g = load(grad, c.type, i);
    const int32_t zero = zeros[s];
    const float lo = static_cast<float>(-8 - zero), hi = static_cast<float>(7 - zero);
    const bool inside = lo < v && v < hi;
    const float steps = std::fmin(std::fmax(std::nearbyint(v), lo), hi);
    const double exact = static_cast<double>(c.value(i)) / static_cast<double>(scale);
    const double slope = inside ? static_cast<double>(steps) - exact : static_cast<double>(steps) + zero;
    grad_x.push_back(inside ? g : 0.0f);
    scale_sum[s] += slope * static_cast<double>(g);
    scale_terms[s] += std::fabs(slope * static_cast<double>(g)) + std::fabs(static_cast<double>(g));
    offset_sum[s] += inside ? 0.0 : static_cast<double>(g);
    offset_terms[s] += std::fabs(static_cast<double>(g));
  }
  std::vector<uint8_t> first_scale, first_offset;
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    const std::string text = name + ", " + c.text;
    auto* out = trial.outputs.take<uint8_t>(n * size_of(c.type));
    const float* given = has_offset ? offset : nullptr;
    CHECK(tq_fake_quantize_learned(c.x, c.type, out, &c.g.spans, &c.scales, given, parallel) == TQ_OK, "%s",
          text.c_str());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t s = c.at(i);
      const Fake fake = fake_quantized(c.value(i), c.scales.scale[s], zeros[static_cast<size_t>(s)], 0.0f, -8, 7);
      const float want = rounded(c.type, fake.value), got = load(out, c.type, i);
      CHECK(same_float(got, want), "%s: learned [%ld] is %a, not %a", text.c_str(), long(i), double(got), double(want));
    }
    tq_scales backward = c.scales;
    backward.zero_point = zeros.data();
    tq_learned_backward_call call{};
    call.grad = grad;
    call.x = c.x;
    call.grad_x = trial.outputs.take<uint8_t>(n * size_of(c.type));
    call.type = c.type;
    call.grad_scale = trial.outputs.take<float>(scales);
    call.grad_offset = trial.outputs.take<float>(scales);
    CHECK(tq_fake_quantize_learned_backward(&call, &c.g.spans, &backward, parallel) == TQ_OK, "%s", text.c_str());
    for (int64_t i = 0; i < n; ++i)
      CHECK(same_float(load(call.grad_x, c.type, i), grad_x[static_cast<size_t>(i)]), "%s: gradient of x [%ld]",
            text.c_str(), long(i));
    for (int64_t i = 0; i < scales; ++i) {
      const size_t s = static_cast<size_t>(i);
      const auto near = [&](float got, double want, double terms) {
        return std::fabs(static_cast<double>(got) - want) <= 1e-5 * terms + 1e-30;
      };
      CHECK(near(call.grad_scale[i], scale_sum[s], scale_terms[s]), "%s: gradient of scale [%ld] is %g, not %g",
            text.c_str(), long(i), double(call.grad_scale[i]), scale_sum[s]);
      CHECK(near(call.grad_offset[i], offset_sum[s], offset_terms[s]), "%s: gradient of offset [%ld] is %g, not %g",
            text.c_str(), long(i), double(call.grad_offset[i]), offset_sum[s]);
    }
    const std::vector<uint8_t> scale_bytes = bytes_of(call.grad_scale, 4 * scales),
                               offset_bytes = bytes_of(call.grad_offset, 4 * scales);
    if (first_scale.empty()) first_scale = scale_bytes, first_offset = offset_bytes;
    CHECK(scale_bytes == first_scale && offset_bytes == first_offset, "%s: sums of other bits", text.c_str());
  });
}

inline void check_core_minmax(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const int flavour = static_cast<int>(draw.below(7));
  Random random(draw.seed());
  const SpanCase c = draw_spans(trial, random, flavour, -8, 7);
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> least(static_cast<size_t>(c.g.scales), infinity), greatest(least.size(), -infinity);
  int64_t nonfinite = 0;
  for (int64_t i = 0; i < c.g.elements; ++i) {
    const float v = c.value(i) + 0.0f;
    const size_t s = static_cast<size_t>(c.at(i));
    if (!std::isfinite(v)) {
      ++nonfinite;
      continue;
    }
    least[s] = std::min(least[s], v) + 0.0f;
    greatest[s] = std::max(greatest[s], v) + 0.0f;
  }
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    const std::string text = name + ", " + c.text;
    auto* low = trial.outputs.take<float>(c.g.scales);
    auto* high = trial.outputs.take<float>(c.g.scales);
    auto* missing = trial.outputs.take<int64_t>(1);
    CHECK(tq_minmax(c.x, c.type, &c.g.spans, c.g.scales, low, high, missing, parallel) == TQ_OK, "%s", text.c_str());
    CHECK(*missing == nonfinite, "%s: %ld elements are not finite, not %ld", text.c_str(), long(*missing),
          long(nonfinite));
    for (int64_t i = 0; i < c.g.scales; ++i) {
      const size_t s = static_cast<size_t>(i);
      CHECK(same_float(low[i], least[s]) && same_float(high[i], greatest[s]),
            "%s: range [%ld] is %a .. %a, not %a .. %a", text.c_str(), long(i), double(low[i]), double(high[i]),
            double(least[s]), double(greatest[s]));
    }
  });
}

// Float32 rows with a scale each, a distance apart.
inline void check_core_fake_quantize_rows(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const MatrixSize size = draw_matrix(draw);
  const int64_t m = size.rows, k = size.columns, stride = k + draw.below(3);
  const bool has_zero = draw.one_in(2);
  Random random(draw.seed());
  const tq_rows rows = {random_elements(trial.inputs, random, (m - 1) * stride + k, TQ_F32, 2), TQ_F32, m, k, stride};
  auto* scale = trial.inputs.take<float>(m);
  auto* zero = trial.inputs.take<int32_t>(m);
  for (int64_t i = 0; i < m; ++i) {
    scale[i] = std::ldexp(0.5f + random.unit(), -4);
    zero[i] = static_cast<int32_t>(random.below(16)) - 8;
  }
  const tq_scales scales = {m, scale, has_zero ? zero : nullptr, nullptr, -8, 7};
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    auto* out = trial.outputs.take<float>(m * k);
    CHECK(tq_fake_quantize_rows(&rows, &scales, out, parallel) == TQ_OK, "%s", name.c_str());
    for (int64_t i = 0; i < m * k; ++i) {
      const float x = static_cast<const float*>(rows.x)[i / k * stride + i % k];
      const float want = fake_quantized(x, scale[i / k], has_zero ? zero[i / k] : 0, 0.0f, -8, 7).value;
      CHECK(same_float(out[i], want), "%s: fake_quantize_rows of %ld x %ld: [%ld] is %a, not %a", name.c_str(), long(m),
            long(k), long(i), double(out[i]), double(want));
    }
  });
}

}  // namespace native
