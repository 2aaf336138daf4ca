// Elements that share a scale: granularities as the kernels see them, checked, and shared out to threads.
//
// One shape serves all: the tensor is a sequence of spans that share a scale. Per tensor: one span. Per channel along
// `axis`: outer x C spans of `inner` elements, or, along the last axis, rows whose scale changes with every element.
// Per group: rows x groups, the last one possibly shorter; per token is a group of the whole row.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace torchquant {

inline constexpr int64_t kGrain = 16384;                    // elements a thread should have at least
inline constexpr int64_t kMaxZeroPoint = int64_t{1} << 22;  // so far fp32 holds differences of integers exactly

inline void check_fake_range(const char* op, int64_t qmin, int64_t qmax) {
  TORCH_CHECK_VALUE(-kMaxZeroPoint <= qmin && qmin < qmax && qmax <= kMaxZeroPoint, op,
                    ": qmin must be less than qmax, both within [-2^22, 2^22], got qmin = ", qmin, ", qmax = ", qmax);
}

struct Spans {
  bool by_element = false;
  int64_t count = 1, length = 1;               // spans and elements in each (the last of a row may be shorter)
  int64_t per_row = 1, row = 1, channels = 1;  // spans in a row, elements of a row, scales along axis
};

inline Spans make_spans(const char* op, const at::Tensor& input, const at::Tensor& scale, std::optional<int64_t> axis,
                        std::optional<int64_t> group_size) {
  TORCH_CHECK_VALUE(!(axis && group_size), op, ": axis and group_size exclude each other, got both; leave one out");
  Spans s;
  if (axis) {
    check_dim(op, "input", input, 1);
    const int64_t a = *axis < 0 ? *axis + input.dim() : *axis;
    TORCH_CHECK_VALUE(a >= 0 && a < input.dim(), op, ": axis must be within the ", input.dim(),
                      " dimensions of input, got ", *axis);
    TORCH_CHECK_VALUE(scale.dim() == 1 && scale.size(0) == input.size(a), op, ": scale must have shape [",
                      input.size(a), "], one value per slice along axis ", *axis, " of input, got ", describe(scale));
    s.channels = input.size(a);
    int64_t inner = 1;
    for (int64_t d = a + 1; d < input.dim(); ++d) inner *= input.size(d);
    if (s.channels == 1) {  // one scale for all
      s.length = s.row = input.numel();
      return s;
    }
    s.by_element = inner == 1;
    s.length = s.by_element ? s.channels : inner;
    s.count = s.length ? input.numel() / s.length : 0;
    s.row = s.length;
  } else if (group_size) {
    check_dim(op, "input", input, 1);
    TORCH_CHECK_VALUE(*group_size >= 1, op, ": group_size must be at least 1, got ", *group_size);
    s.row = input.size(-1);
    s.length = std::max<int64_t>(1, std::min(*group_size, s.row));
    s.per_row = s.row ? ceil_div(s.row, s.length) : 0;
    std::vector<int64_t> want(input.sizes().begin(), input.sizes().end());
    // Rows without elements have no groups; as tokens (a group each) they have a scale all the same.
    const bool tokens = s.row == 0 && scale.dim() == input.dim() && scale.size(-1) == 1;
    want.back() = tokens ? 1 : ceil_div(s.row, s.length);  // not by group_size: the sum could overflow
    TORCH_CHECK_VALUE(scale.sizes() == at::IntArrayRef(want), op, ": scale must have shape ", at::IntArrayRef(want),
                      " (one value per group of ", *group_size, "), got ", describe(scale));
    s.count = s.row ? input.numel() / s.row * s.per_row : 0;
  } else {
    TORCH_CHECK_VALUE(scale.numel() == 1, op, ": scale must hold one value without axis or group_size, got ",
                      describe(scale), "; pass axis=... or group_size=...");
    s.length = s.row = input.numel();
  }
  return s;
}

// Shape of the scales that make_spans asks for; it refuses what cannot be.
inline std::vector<int64_t> scale_sizes(const at::Tensor& input, std::optional<int64_t> axis,
                                        std::optional<int64_t> group_size) {
  if (axis) {
    const int64_t a = *axis < 0 ? *axis + input.dim() : *axis;
    return {a >= 0 && a < input.dim() ? input.size(a) : 0};
  }
  if (!group_size || input.dim() == 0) return {1};
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = ceil_div(sizes.back(), std::max<int64_t>(1, std::min(*group_size, sizes.back())));
  return sizes;
}

// Type and shape of a zero point; whether it is a real-valued one.
inline bool check_zero_point(const char* op, const at::Tensor& zero_point, const at::Tensor& scale) {
  const bool is_real = zero_point.scalar_type() == at::kFloat;
  TORCH_CHECK_TYPE(is_real || zero_point.scalar_type() == at::kInt, op,
                   ": zero_point must be int32, or float32 for a real-valued one, got ", describe(zero_point));
  const bool one = zero_point.numel() == 1 && zero_point.dim() <= 1;
  TORCH_CHECK_VALUE(one || zero_point.sizes() == scale.sizes(), op, ": zero_point must have scale's shape ",
                    scale.sizes(), " or hold one value, got ", describe(zero_point));
  return is_real;
}

// Scales, zero points and limits as the kernels want them. Vectors: small tensors would be carved out of the large block
// that the last call freed, so that the next result no longer fits into it and comes from colder memory.
struct Params {
  at::Tensor scale;
  std::vector<float> inverse, real_zero, lo, hi;
  std::vector<int32_t> zero;
};

inline Params make_params(const char* op, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                          int64_t qmin, int64_t qmax, bool inverse) {
  check_dtype(op, "scale", scale, at::kFloat);
  Params p;
  const int64_t n = scale.numel();
  const size_t size = static_cast<size_t>(n);
  p.scale = scale.contiguous();
  p.zero.assign(size, 0);
  p.real_zero.assign(size, 0.0f);
  if (zero_point && zero_point->defined()) {
    const bool is_real = check_zero_point(op, *zero_point, scale);
    const bool one = zero_point->numel() == 1 && zero_point->dim() <= 1;
    const at::Tensor z = (one ? zero_point->reshape({}) : *zero_point).expand(scale.sizes()).contiguous();
    if (is_real) {
      std::copy_n(z.const_data_ptr<float>(), n, p.real_zero.data());
    } else if (n > 0) {
      check_zero_points(op, "zero_point", z.const_data_ptr<int32_t>(), n, -kMaxZeroPoint, kMaxZeroPoint);
      std::copy_n(z.const_data_ptr<int32_t>(), n, p.zero.data());
    }
  }
  if (inverse) {
    p.inverse.resize(size);
    p.lo.resize(size);
    p.hi.resize(size);
    const float* s = p.scale.const_data_ptr<float>();
    for (size_t i = 0; i < size; ++i) {
      check_scale(op, "scale", s[i]);
      p.inverse[i] = 1.0f / s[i];
      p.lo[i] = static_cast<float>(qmin - p.zero[i]);
      p.hi[i] = static_cast<float>(qmax - p.zero[i]);
    }
  }
  return p;
}

inline int64_t scale_index(const Spans& s, int64_t span, int64_t scales) {
  if (s.by_element || scales == 1) return 0;
  return s.per_row == 1 && s.channels > 1 ? span % s.channels : span;
}

// The elements [first, last) in contiguous order, cut where the scale changes: run(element, n, index of its scale).
template <class Run>
void for_segments(const Spans& s, int64_t scales, int64_t first, int64_t last, Run run) {
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

}  // namespace torchquant
