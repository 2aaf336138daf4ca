// mm_fake_quantized, and qat_linear where no gradient is asked for.
#include "autograd/qat.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "common/checks.h"
#include "common/arithmetic.h"
#include "aten/blocks.h"
#include "common/device.h"
#include "aten/register.h"

namespace torchquant {
namespace {

// grad [m, n] times the fake-quantized weight [n, k], some of its rows at a time.
at::Tensor mm_fake_quantized(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& scale,
                             const std::optional<at::Tensor>& zero_point, int64_t qmin, int64_t qmax) {
  const char* op = "mm_fake_quantized";
  check_device(op, "weight", weight, grad, "grad");
  check_device(op, "scale", scale, grad, "grad");
  check_device(op, "zero_point", zero_point, grad, "grad");
  check_mm_fake_quantized(op, grad, weight, scale, zero_point, qmin, qmax);
  const int64_t n = weight.size(0), k = weight.size(1), m = grad.size(0);
  at::Tensor out = at::empty({m, k}, grad.options());
  if (m == 0 || n == 0 || k == 0) return out.zero_();
  const at::Tensor scales = scale.expand({n}).unsqueeze(1), inverse = torchquant::reciprocal(scales);
  at::Tensor lo = at::full({n, 1}, static_cast<double>(qmin), grad.options()),
             hi = at::full({n, 1}, static_cast<double>(qmax), grad.options());
  if (zero_point && zero_point->defined()) {
    const at::Tensor zero = zero_point->expand({n}).unsqueeze(1).to(at::kFloat);
    lo = lo - zero;
    hi = hi - zero;
  }
  const int64_t height = std::clamp<int64_t>(kBlockElements / k, 1, n);
  for (int64_t first = 0; first < n; first += height) {
    const int64_t rows = std::min(height, n - first);
    const auto part = [&](const at::Tensor& t) { return t.narrow(0, first, rows); };
    at::Tensor values = part(weight) * part(inverse);
    values.round_();
    at::clamp_out(values, values, part(lo), part(hi));
    values.add_(0.0).mul_(part(scales));  // the integers have no negative zero
    if (first == 0) at::mm_out(out, grad.narrow(1, first, rows), values);
    else out.addmm_(grad.narrow(1, first, rows), values);
  }
  return out;
}

template <class Library>
void implement_qat(Library& m) {
  m.impl("mm_fake_quantized", &mm_fake_quantized);
}

TORCHQUANT_IMPLEMENT_ATEN(implement_qat)

// Each library's own operators inside: Triton kernels registered for torchquant's run in its layer.
template <class Library>
void implement_layer(Library& m) {
  m.impl("qat_linear", &qat_linear_forward<OperatorsOf::kTorchquant>);
}
template <class Library>
void implement_aten_layer(Library& m) {
  m.impl("qat_linear", &qat_linear_forward<OperatorsOf::kTorchquantAten>);
}

TORCHQUANT_IMPLEMENT_ON_CUDA(implement_layer)
TORCHQUANT_IMPLEMENT_AS_ATEN(implement_aten_layer)

}  // namespace
}  // namespace torchquant
