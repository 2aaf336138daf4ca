// Elements that share a scale: how the spans of the C interface are divided among threads, and their scales.
//
// One shape serves every granularity: a tensor is a sequence of spans. Per tensor: one span. Per channel: outer x C
// spans of `inner` elements, or, along the last axis, rows whose scale changes with every element. Per group: rows x
// groups, the last group of a row possibly shorter; per token is a group of the whole row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/torchquant_core.h"

namespace torchquant {

inline constexpr int64_t kThreadElements = 16384;  // elements that a thread should have at least

inline int64_t elements_of(const tq_spans& s) { return s.per_row ? s.count / s.per_row * s.row : 0; }

inline int64_t scale_index(const tq_spans& s, int64_t span, int64_t scales) {
  if (s.by_element || scales == 1) return 0;
  return s.per_row == 1 && s.channels > 1 ? span % s.channels : span;
}

// The elements [first, last) in contiguous order, cut where the scale changes: run(element, n, index of its scale).
template <class Run>
void for_segments(const tq_spans& s, int64_t scales, int64_t first, int64_t last, const Run& run) {
  if (first >= last) return;
  int64_t row = first / s.row, span = first % s.row / s.length, offset = first % s.row % s.length;
  while (first < last) {
    const int64_t length = std::min(s.length, s.row - span * s.length), n = std::min(length - offset, last - first);
    run(first, n, scale_index(s, row * s.per_row + span, scales) + (s.by_element ? offset : 0));
    first += n;
    offset = 0;
    if (++span == s.per_row) span = 0, ++row;
  }
}

// Scales, zero points and limits as the kernels read them, one value for each scale.
struct KernelScales {
  const float* scale;
  std::vector<float> inverse, real_zero, lo, hi;
  std::vector<int32_t> zero;

  // want_inverse: what quantization needs and dequantization does not.
  KernelScales(const tq_scales& s, bool want_inverse) : scale(s.scale) {
    const size_t n = static_cast<size_t>(s.count);
    if (s.zero_point) zero.assign(s.zero_point, s.zero_point + n);
    else zero.assign(n, 0);
    if (s.real_zero) real_zero.assign(s.real_zero, s.real_zero + n);
    else real_zero.assign(n, 0.0f);
    if (!want_inverse) return;
    inverse.resize(n);
    lo.resize(n);
    hi.resize(n);
    for (size_t i = 0; i < n; ++i) {
      inverse[i] = 1.0f / scale[i];
      set_zero(i, zero[i], s.qmin, s.qmax);
    }
  }

  void set_zero(size_t i, int32_t value, int32_t qmin, int32_t qmax) {
    zero[i] = value;
    lo[i] = static_cast<float>(qmin - value);
    hi[i] = static_cast<float>(qmax - value);
  }
};

}  // namespace torchquant
