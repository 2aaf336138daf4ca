// The specification (torchquant/functional) once more, as naively as possible: sums in 64 bits over (q - zero)(w -
// zero), no compensation, no blocks, float formats by definition instead of by bits. It is compiled with the same flags
// as the kernels and shares no code with them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "adapter.h"

namespace native {

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// A float format of `exponent` and `mantissa` bits, its value and the nearest of its values (ties to even).
inline float widen(uint16_t h, int exponent, int mantissa) {
  const int bias = (1 << (exponent - 1)) - 1, e = (h >> mantissa) & ((1 << exponent) - 1);
  const int fraction = h & ((1 << mantissa) - 1);
  const double sign = h & 0x8000 ? -1.0 : 1.0;
  if (e == (1 << exponent) - 1) {
    return fraction ? std::numeric_limits<float>::quiet_NaN()
                    : static_cast<float>(sign * std::numeric_limits<double>::infinity());
  }
  const double m = std::ldexp(static_cast<double>(fraction + (e ? 1 << mantissa : 0)), -mantissa);
  return static_cast<float>(sign * std::ldexp(m, (e ? e : 1) - bias));
}
inline uint16_t narrow(float v, int exponent, int mantissa) {
  const int bias = (1 << (exponent - 1)) - 1, infinity = ((1 << exponent) - 1) << mantissa;
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return static_cast<uint16_t>(infinity | 1);
  if (std::isinf(v)) return static_cast<uint16_t>(sign | infinity);
  int e = 1 - bias;
  if (v != 0.0f) e = std::max(e, std::ilogb(v));
  const double units = std::nearbyint(std::ldexp(std::fabs(static_cast<double>(v)), mantissa - e));
  const int whole = 1 << mantissa;  // units: whole .. 2 whole for normal numbers; the carry falls into the exponent
  const int bits =
      units < whole ? static_cast<int>(units) : ((e + bias) << mantissa) + (static_cast<int>(units) - whole);
  return static_cast<uint16_t>(sign | (bits >= infinity ? infinity : bits));
}

inline float load(const void* x, FloatType type, int64_t i) {
  if (type == FloatType::kF32) return static_cast<const float*>(x)[i];
  const uint16_t h = static_cast<const uint16_t*>(x)[i];
  return type == FloatType::kBF16 ? widen(h, 8, 7) : widen(h, 5, 10);
}

inline int32_t quantize_value(float x, float inverse, int32_t zero, int32_t qmin, int32_t qmax) {
  const float scaled = x * inverse;
  if (std::isnan(scaled)) return zero;
  float q = std::nearbyint(scaled);
  q = std::fmax(q, static_cast<float>(qmin - zero));
  q = std::fmin(q, static_cast<float>(qmax - zero));
  return static_cast<int32_t>(q) + zero;
}

struct RowQuantization {
  float scale;
  int32_t zero;
  bool bad;  // the row must give NaN
};

inline RowQuantization row_quantization(const Linear& l, int64_t row) {
  float least = 0.0f, most = 0.0f;
  bool nan = false, infinite = false;
  for (int64_t i = 0; i < l.k; ++i) {
    const float v = load(l.x, l.x_type, row * l.x_stride + i);
    nan |= std::isnan(v);
    infinite |= std::isinf(v);
    if (v < least) least = v;
    if (v > most) most = v;
  }
  if (l.mode == RowMode::kStatic) return {l.scale, l.zero_point, nan};
  if (nan || infinite) return {0.0f, 0, true};
  const float magnitude = std::fmax(most, -least);
  if (magnitude == 0.0f) return {1.0f, 0, false};
  RowQuantization r{0.0f, 0, false};
  if (l.mode == RowMode::kSymmetric) {
    r.scale = magnitude / static_cast<float>(l.qmax);
  } else {
    const float range = most - least, steps = static_cast<float>(l.qmax - l.qmin);
    r.scale = std::isinf(range) ? (most * 0.5f - least * 0.5f) / steps * 2.0f : range / steps;
  }
  r.scale = std::fmax(r.scale, 0x1p-126f);
  if (l.mode == RowMode::kAsymmetric) {
    const float low = static_cast<float>(l.qmin), high = static_cast<float>(l.qmax);
    const float zero = std::nearbyint(low - least / r.scale);
    r.zero = static_cast<int32_t>(std::fmin(std::fmax(zero, low), high));
  }
  return r;
}

inline int32_t row_value(const Linear& l, const RowQuantization& r, int64_t row, int64_t i) {
  if (!l.float_input) {
    const uint8_t byte = static_cast<const uint8_t*>(l.x)[row * l.x_stride + i];
    return l.x_signed ? static_cast<int8_t>(byte) : byte;
  }
  if (r.bad && l.mode != RowMode::kStatic) return 0;
  const int32_t qmin = l.mode == RowMode::kSymmetric ? -l.qmax : l.qmin;
  return quantize_value(load(l.x, l.x_type, row * l.x_stride + i), 1.0f / r.scale, r.zero, qmin, l.qmax);
}

// sum_k (q[m, k] - zero[m]) (w[n, k] - zero[n]) + bias.  w: the weight as it was packed, [n, k].
inline int64_t exact_sum(const Linear& l, const RowQuantization& r, const int32_t* q, const int8_t* w, int64_t n) {
  const int64_t wz = l.weight_zero ? l.weight_zero[n] : 0;
  int64_t sum = l.bias_i32 ? l.bias_i32[n] : 0;
  for (int64_t i = 0; i < l.k; ++i) sum += static_cast<int64_t>(q[i] - r.zero) * (w[n * l.k + i] - wz);
  return sum;
}

// Before the activation.
inline float finished(const Linear& l, const RowQuantization& r, int64_t sum, int64_t n) {
  if (r.bad) return std::numeric_limits<float>::quiet_NaN();
  const float f = static_cast<float>(sum), scale = r.scale * l.weight_scale[n];
  return l.bias ? std::fmaf(f, scale, l.bias[n]) : f * scale;
}

// The activations of a few exact operations (torchquant/functional/hard_activations.py). A comparison with NaN is false.
inline bool is_hard(Activation a) {
  return a == Activation::kRelu || a == Activation::kRelu6 || a == Activation::kHardswish ||
         a == Activation::kHardsigmoid || a == Activation::kLeakyRelu;
}
inline float hard_activation(Activation a, float x) {
  const auto within_0_and_6 = [](float v) { return v < 0.0f ? 0.0f : (v > 6.0f ? 6.0f : v); };
  switch (a) {
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;
    case Activation::kRelu6: return within_0_and_6(x);
    case Activation::kHardswish: return x * within_0_and_6(x + 3.0f) / 6.0f;
    case Activation::kHardsigmoid: return within_0_and_6(x + 3.0f) / 6.0f;
    case Activation::kLeakyRelu: return x < 0.0f ? x * 0.01f : x;
    default: std::abort();
  }
}

// The others in double precision, and how far fp32 may be from it (torchquant/functional/activations.py states the
// bounds).
inline double true_activation(Activation a, double x) {
  switch (a) {
    case Activation::kNone: return x;
    case Activation::kGelu: return 0.5 * x * std::erfc(-x * 0.70710678118654752440);
    case Activation::kGeluTanh: {
      const double u = 0.79788456080286535588 * (x + 0.044715 * x * x * x);
      return x / (1.0 + std::exp(-2.0 * u));
    }
    case Activation::kSilu: return x / (1.0 + std::exp(-x));
    case Activation::kTanh: return std::tanh(x);
    case Activation::kSigmoid: return 1.0 / (1.0 + std::exp(-x));
    default: std::abort();
  }
}
inline bool close_to_activation(Activation a, double x, float got) {
  if (is_hard(a)) {
    const float want = hard_activation(a, static_cast<float>(x));
    return got == want || (std::isnan(got) && std::isnan(want));
  }
  if (std::isnan(x)) return std::isnan(got);
  if (a == Activation::kNone) return static_cast<double>(got) == x;
  const bool bounded = a == Activation::kTanh || a == Activation::kSigmoid;
  if (std::isinf(x) && !bounded) return x > 0 ? static_cast<double>(got) == x : std::fabs(got) < 1e-30f;
  const double tolerance = 1.5e-7 * (bounded ? 1.0 : std::fmax(1.0, std::fabs(x)));
  return std::fabs(static_cast<double>(got) - true_activation(a, x)) <= tolerance;
}

}  // namespace native
