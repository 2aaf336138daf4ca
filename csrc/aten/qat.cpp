// quantize_rows, quantize_pack, mm_fake_quantized, and qat_linear without gradients.
#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "common/checks.h"
#include "common/arithmetic.h"
#include "aten/blocks.h"
#include "aten/packed.h"
#include "common/device.h"
#include "common/qat_linear.h"
#include "aten/register.h"
#include "aten/rows.h"

namespace torchquant {
namespace {

QuantizedRows quantize_rows(const at::Tensor& input, const OptTensor& scale, const OptTensor& zero_point, int64_t qmin,
                            int64_t qmax, bool symmetric) {
  const char* op = "quantize_rows";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  check_signed_range(op, qmin, qmax, symmetric && !present(scale));
  if (!present(scale)) {
    TORCH_CHECK_VALUE(!present(zero_point), op,
                      ": zero_point must be None without scale (each row finds its own), got one");
    if (input.size(-1) == 0) return empty_rows(input, {}, {});
    return quantized_rows(input, qmin, qmax, symmetric);
  }
  check_device(op, "scale", scale, input);
  check_dtype(op, "scale", *scale, at::kFloat);
  TORCH_CHECK_VALUE(scale->numel() == 1, op, ": scale must hold one value, got ", describe(*scale));
  at::Tensor zero;
  if (present(zero_point)) {
    check_device(op, "zero_point", zero_point, input);
    check_dtype(op, "zero_point", *zero_point, at::kInt);
    TORCH_CHECK_VALUE(zero_point->numel() == 1, op, ": zero_point must hold one value, got ", describe(*zero_point));
    zero = zero_point->reshape({1, 1});
  }
  const at::Tensor given = scale->reshape({1, 1}).clamp_min(kLeastScale);  // a learned scale may become smaller
  if (input.size(-1) == 0) return empty_rows(input, given, zero);
  const at::Tensor x = as_matrix(input), q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const RowParams p = static_params(x, given, zero);
  quantize_into(q, x, p, qmin, qmax);
  return rows_of(input, p, q);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_pack(const at::Tensor& weight, const OptTensor& scale,
                                                             int64_t qmin, int64_t qmax, bool symmetric) {
  const char* op = "quantize_pack";
  check_device(op, "scale", scale, weight, "weight");
  check_float_weight(op, weight, scale, qmin, qmax, symmetric);
  const int64_t n = weight.size(0), k = weight.size(1);
  RowParams p;
  if (scale && scale->defined()) {
    p = static_params(weight, scale->reshape({-1, 1}).clamp_min(kLeastScale), {});
    p.inverse = at::where(p.scale.isnan(), p.scale, p.inverse);  // such a row's integers are all 0
  } else {
    p = dynamic_params(weight, qmin, qmax, symmetric);
  }
  const at::Tensor packed = empty_packed(weight, n, k);
  quantize_into(weights_of(packed, n, k), weight, p, qmin, qmax);
  complete_packed(packed, n, k);
  const at::Tensor zero = p.zero.defined() ? p.zero.reshape({n}) : at::zeros({n}, weight.options().dtype(at::kInt));
  return {packed, p.scale.reshape({n}), zero};
}

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

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::quantize_rows>(&quantize_rows);
  m.impl<ops::quantize_pack>(&quantize_pack);
  m.impl<ops::mm_fake_quantized>(&mm_fake_quantized);
}

// Each library's layer calls its own operators, so that torchquant's uses the Triton kernels that are registered for it.
TORCHQUANT_ATEN_KERNEL_ON_CUDA(ops::qat_linear, &qat::qat_linear_forward<Library::kTorchquant>)
TORCHQUANT_ATEN_KERNEL_AS_ATEN(ops::qat_linear, &qat::qat_linear_forward<Library::kTorchquantAten>)

}  // namespace
}  // namespace torchquant
