// rms_norm, layer_norm: over the last dimension, one visit per row while it lies in the nearest cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "common/checks.h"
#include "isa.h"
#include "cpu/output.h"
#include "cpu/rows.h"
#include "common/tensors.h"

namespace torchquant {
namespace {

constexpr int64_t kNormGrain = 1 << 13;  // elements a thread should have at least

at::Tensor contiguous_or_none(const OptTensor& t) { return t && t->defined() ? t->contiguous() : at::Tensor(); }

at::Tensor norm(const char* op, NormArgs args, const at::Tensor& input, const OptTensor& weight, const OptTensor& bias,
                double eps, const OptTensor& residual) {
  check_norm(op, input, weight, bias, eps, residual);
  const at::Tensor w = contiguous_or_none(weight), b = contiguous_or_none(bias);
  const auto x_stride = row_stride(input);
  const at::Tensor x = x_stride ? input : input.contiguous();
  at::Tensor r;
  if (residual && residual->defined()) {
    r = row_stride(*residual) ? *residual : residual->contiguous();
    args.residual = r.const_data_ptr();
    args.residual_stride = row_stride(r).value_or(r.size(-1));
  }
  at::Tensor out = empty_output(input.sizes(), input.options());
  if (out.numel() == 0) return out;
  args.x = x.const_data_ptr();
  args.k = x.size(-1);
  args.x_stride = x_stride.value_or(args.k);
  args.type = float_type(x.scalar_type());
  if (w.defined()) {
    args.weight = w.const_data_ptr();
    args.weight_type = float_type(w.scalar_type());
  }
  if (b.defined()) {
    args.bias = b.const_data_ptr();
    args.bias_type = float_type(b.scalar_type());
  }
  args.out = out.mutable_data_ptr();
  args.eps = static_cast<float>(eps);
  const KernelTable& table = kernels();
  at::parallel_for(0, out.numel() / args.k, std::max<int64_t>(1, kNormGrain / args.k),
                   [&](int64_t m0, int64_t m1) { table.normalize_rows(args, m0, m1); });
  return out;
}

at::Tensor rms_norm(const at::Tensor& input, const OptTensor& weight, double eps, bool cast_before_weight) {
  NormArgs args{};
  args.cast_before_weight = cast_before_weight;
  return norm("rms_norm", args, input, weight, std::nullopt, eps, std::nullopt);
}

at::Tensor layer_norm(const at::Tensor& input, const OptTensor& weight, const OptTensor& bias, double eps,
                      const OptTensor& residual) {
  NormArgs args{};
  args.centered = true;
  return norm("layer_norm", args, input, weight, bias, eps, residual);
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("layer_norm", &layer_norm);
}

}  // namespace
}  // namespace torchquant
