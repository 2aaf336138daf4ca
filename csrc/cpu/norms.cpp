// rms_norm, layer_norm: over the last dimension.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/tensors.h"
#include "cpu/core_call.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant {
namespace {

at::Tensor contiguous_or_none(const OptTensor& t) { return t && t->defined() ? t->contiguous() : at::Tensor(); }

at::Tensor norm(const char* op, tq_norm_call call, const at::Tensor& input, const OptTensor& weight,
                const OptTensor& bias, double eps, const OptTensor& residual) {
  check_norm(op, input, weight, bias, eps, residual);
  const at::Tensor w = contiguous_or_none(weight), b = contiguous_or_none(bias), x = as_rows(input);
  const int64_t k = x.size(-1);
  at::Tensor r;
  if (residual && residual->defined()) {
    r = as_rows(*residual);
    call.residual = r.const_data_ptr();
    call.residual_stride = row_stride(r).value_or(k);
  }
  at::Tensor out = empty_output(input.sizes(), input.options());
  if (out.numel() == 0) return out;
  call.rows = rows_of(x, k);
  if (w.defined()) {
    call.weight = w.const_data_ptr();
    call.weight_type = type_of(w);
  }
  if (b.defined()) {
    call.bias = b.const_data_ptr();
    call.bias_type = type_of(b);
  }
  call.out = out.mutable_data_ptr();
  call.eps = static_cast<float>(eps);
  check_status(tq_normalize(&call, &kTorchThreads));
  return out;
}

at::Tensor rms_norm(const at::Tensor& input, const OptTensor& weight, double eps, bool cast_before_weight) {
  tq_norm_call call{};
  call.cast_before_weight = cast_before_weight;
  return norm("rms_norm", call, input, weight, std::nullopt, eps, std::nullopt);
}

at::Tensor layer_norm(const at::Tensor& input, const OptTensor& weight, const OptTensor& bias, double eps,
                      const OptTensor& residual) {
  tq_norm_call call{};
  call.centered = true;
  return norm("layer_norm", call, input, weight, bias, eps, residual);
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::rms_norm::implement(m, &rms_norm);
  ops::layer_norm::implement(m, &layer_norm);
}

}  // namespace
}  // namespace torchquant
