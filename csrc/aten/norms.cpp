// rms_norm, layer_norm. A sum in the specification's order is a chain of K / 16 small steps here: correct everywhere,
// fast nowhere.
#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "common/checks.h"
#include "common/arithmetic.h"
#include "aten/blocks.h"
#include "common/device.h"
#include "aten/lanes.h"
#include "aten/register.h"
#include "common/tensors.h"

namespace torchquant {
namespace {

at::Tensor float_or_none(const OptTensor& t) { return t && t->defined() ? t->to(at::kFloat) : at::Tensor(); }

at::Tensor inverse_root(const at::Tensor& mean, double eps) {
  const at::Tensor total = mean + constant_like(mean, eps);
  // The fp32 square root is not rounded correctly everywhere; the double one is, once rounded to fp32.
  return torchquant::reciprocal(total.to(at::kDouble).sqrt().to(at::kFloat));
}

struct Settings {
  double eps;
  bool centered, cast_before_weight;
};

at::Tensor normalized(at::Tensor x, const at::Tensor& weight, const at::Tensor& bias, const Settings& s,
                      at::ScalarType type) {  // of fp32 rows
  const double k = static_cast<double>(x.size(-1));
  if (s.centered) x = x - divide(sum_in_lanes(x, false), k);
  at::Tensor y = x * inverse_root(divide(sum_in_lanes(x, true), k), s.eps);
  if (s.cast_before_weight) y = y.to(type).to(at::kFloat);
  if (bias.defined()) y = fmaf(y, weight, bias);
  else if (weight.defined()) y = y * weight;
  return y;
}

at::Tensor norm(const char* op, const at::Tensor& input, const OptTensor& weight, const OptTensor& bias,
                const OptTensor& residual, const Settings& s) {
  check_device(op, "weight", weight, input);
  check_device(op, "bias", bias, input);
  check_device(op, "residual", residual, input);
  check_norm(op, input, weight, bias, s.eps, residual);
  const at::Tensor out = at::empty(input.sizes(), input.options());
  if (out.numel() == 0) return out;
  const int64_t k = input.size(-1), rows = out.numel() / k, block = std::max<int64_t>(1, kBlockElements / k);
  const at::Tensor w = float_or_none(weight), b = float_or_none(bias), x = input.reshape({rows, k});
  const at::Tensor r = residual && residual->defined() ? residual->reshape({rows, k}) : at::Tensor();
  for (int64_t m = 0; m < rows; m += block) {
    const int64_t count = std::min(block, rows - m);
    at::Tensor part = x.narrow(0, m, count).to(at::kFloat);
    if (r.defined()) part = part + r.narrow(0, m, count).to(at::kFloat);
    out.view({rows, k}).narrow(0, m, count).copy_(normalized(part, w, b, s, input.scalar_type()));
  }
  return out;
}

at::Tensor rms_norm(const at::Tensor& input, const OptTensor& weight, double eps, bool cast_before_weight) {
  return norm("rms_norm", input, weight, std::nullopt, std::nullopt, {eps, false, cast_before_weight});
}

at::Tensor layer_norm(const at::Tensor& input, const OptTensor& weight, const OptTensor& bias, double eps,
                      const OptTensor& residual) {
  return norm("layer_norm", input, weight, bias, residual, {eps, true, false});
}

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::rms_norm>(&rms_norm);
  m.impl<ops::layer_norm>(&layer_norm);
}

}  // namespace
}  // namespace torchquant
