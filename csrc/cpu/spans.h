// Scales and zero points as arguments of an operator: checked, and made into the core's.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/spans.h"
#include "core/torchquant_core.h"

namespace torchquant {

// Scales and zero points as the core reads them. Zero points are in vectors: small tensors would be carved out of the
// large block that the last call freed, so that the next result no longer fits into it and comes from colder memory.
struct Scales {
  at::Tensor scale;
  std::vector<int32_t> zero_point;
  std::vector<float> real_zero;
  int64_t qmin = 0, qmax = 0;

  tq_scales view() const {
    return {scale.numel(),
            scale.const_data_ptr<float>(),
            zero_point.empty() ? nullptr : zero_point.data(),
            real_zero.empty() ? nullptr : real_zero.data(),
            static_cast<int32_t>(qmin),
            static_cast<int32_t>(qmax)};
  }
};

// check_scales: whether each scale must be usable as a divisor.
inline Scales make_scales(const char* op, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                          int64_t qmin, int64_t qmax, bool check_scales) {
  check_dtype(op, "scale", scale, at::kFloat);
  Scales s;
  const int64_t n = scale.numel();
  s.scale = scale.contiguous();
  s.qmin = qmin;
  s.qmax = qmax;
  if (zero_point && zero_point->defined()) {
    const bool is_real = check_zero_point(op, *zero_point, scale);
    const bool one = zero_point->numel() == 1 && zero_point->dim() <= 1;
    const at::Tensor z = (one ? zero_point->reshape({}) : *zero_point).expand(scale.sizes()).contiguous();
    if (is_real) {
      s.real_zero.assign(z.const_data_ptr<float>(), z.const_data_ptr<float>() + n);
    } else if (n > 0) {
      check_zero_points(op, "zero_point", z.const_data_ptr<int32_t>(), n, -kMaxZeroPoint, kMaxZeroPoint);
      s.zero_point.assign(z.const_data_ptr<int32_t>(), z.const_data_ptr<int32_t>() + n);
    }
  }
  if (check_scales) {
    const float* values = s.scale.const_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) check_scale(op, "scale", values[i]);
  }
  return s;
}

}  // namespace torchquant
