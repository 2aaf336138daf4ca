// Granularities as arguments of an operator, on every device: checked, and made into the core's spans.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "core/torchquant_core.h"

namespace torchquant {

inline constexpr int64_t kMaxZeroPoint = int64_t{1} << 22;  // fp32 holds differences of integers exactly up to here

inline void check_fake_range(const char* op, int64_t qmin, int64_t qmax) {
  TORCH_CHECK_VALUE(-kMaxZeroPoint <= qmin && qmin < qmax && qmax <= kMaxZeroPoint, op,
                    ": qmin must be less than qmax, both within [-2^22, 2^22], got qmin = ", qmin, ", qmax = ", qmax);
}

inline tq_spans make_spans(const char* op, const at::Tensor& input, const at::Tensor& scale,
                           std::optional<int64_t> axis, std::optional<int64_t> group_size) {
  TORCH_CHECK_VALUE(!(axis && group_size), op, ": axis and group_size exclude each other, got both; leave one out");
  if (axis) {
    check_dim(op, "input", input, 1);
    const int64_t a = *axis < 0 ? *axis + input.dim() : *axis;
    TORCH_CHECK_VALUE(a >= 0 && a < input.dim(), op, ": axis must be within the ", input.dim(),
                      " dimensions of input, got ", *axis);
    TORCH_CHECK_VALUE(scale.dim() == 1 && scale.size(0) == input.size(a), op, ": scale must have shape [",
                      input.size(a), "], one value per slice along axis ", *axis, " of input, got ", describe(scale));
    int64_t outer = 1, inner = 1;
    for (int64_t d = 0; d < a; ++d) outer *= input.size(d);
    for (int64_t d = a + 1; d < input.dim(); ++d) inner *= input.size(d);
    return tq_spans_per_channel(outer, input.size(a), inner);
  }
  if (group_size) {
    check_dim(op, "input", input, 1);
    TORCH_CHECK_VALUE(*group_size >= 1, op, ": group_size must be at least 1, got ", *group_size);
    const int64_t row = input.size(-1);
    const int64_t groups = ceil_div(row, std::max<int64_t>(1, std::min(*group_size, row)));  // no sum that overflows
    std::vector<int64_t> want(input.sizes().begin(), input.sizes().end());
    // Rows without elements have no groups. As tokens, each row is one group and has a scale.
    const bool tokens = row == 0 && scale.dim() == input.dim() && scale.size(-1) == 1;
    want.back() = tokens ? 1 : groups;
    TORCH_CHECK_VALUE(scale.sizes() == at::IntArrayRef(want), op, ": scale must have shape ", at::IntArrayRef(want),
                      " (one value per group of ", *group_size, "), got ", describe(scale));
    return tq_spans_per_group(row ? input.numel() / row : 0, row, *group_size);
  }
  TORCH_CHECK_VALUE(scale.numel() == 1, op, ": scale must hold one value without axis or group_size, got ",
                    describe(scale), "; pass axis=... or group_size=...");
  return tq_spans_per_tensor(input.numel());
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

}  // namespace torchquant
