// Fake quantization for training: values, one-bit masks, a learned step's gradients, ranges; at every granularity.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "common/tensors.h"
#include "cpu/core_call.h"
#include "cpu/reused_output.h"
#include "cpu/spans.h"
#include "operators.h"

namespace torchquant {
namespace {

at::Tensor empty_bits(const at::Tensor& x) { return at::empty({ceil_div(x.numel(), 8)}, x.options().dtype(at::kByte)); }

std::tuple<at::Tensor, at::Tensor> fake_quantize_of(const char* op, const at::Tensor& input, const at::Tensor& scale,
                                                    const OptTensor& zero_point, int64_t qmin, int64_t qmax,
                                                    OptInt axis, OptInt group_size, bool want_out, bool want_bits) {
  check_float(op, "input", input);
  check_fake_range(op, qmin, qmax);
  const tq_spans spans = make_spans(op, input, scale, axis, group_size);
  const Scales s = make_scales(op, scale, zero_point, qmin, qmax, true);
  const tq_scales scales = s.view();
  const at::Tensor x = input.contiguous();
  at::Tensor out, bits;
  if (want_out) out = reused_output(x.sizes(), x.options());
  if (want_bits) bits = empty_bits(x);
  check_status(tq_fake_quantize(x.const_data_ptr(), type_of(x), want_out ? out.mutable_data_ptr() : nullptr,
                                want_bits ? bits.mutable_data_ptr<uint8_t>() : nullptr, &spans, &scales,
                                &kTorchThreads));
  return {out, bits};
}

at::Tensor fake_quantize(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
                         int64_t qmax, OptInt axis, OptInt group_size) {
  return std::get<0>(
      fake_quantize_of("fake_quantize", input, scale, zero_point, qmin, qmax, axis, group_size, true, false));
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& input, const at::Tensor& scale,
                                                      const OptTensor& zero_point, int64_t qmin, int64_t qmax,
                                                      OptInt axis, OptInt group_size) {
  return fake_quantize_of("fake_quantize_mask", input, scale, zero_point, qmin, qmax, axis, group_size, true, true);
}

at::Tensor in_range(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
                    int64_t qmax, OptInt axis, OptInt group_size) {
  return std::get<1>(fake_quantize_of("in_range", input, scale, zero_point, qmin, qmax, axis, group_size, false, true));
}

at::Tensor positive(const at::Tensor& input) {
  check_float("positive", "input", input);
  const at::Tensor x = input.contiguous(), bits = empty_bits(x);
  check_status(
      tq_positive(x.const_data_ptr(), type_of(x), x.numel(), bits.mutable_data_ptr<uint8_t>(), &kTorchThreads));
  return bits;
}

at::Tensor mask_gradient(const at::Tensor& grad, const at::Tensor& bits) {
  const char* op = "mask_gradient";
  check_float(op, "grad", grad);
  check_dtype(op, "bits", bits, at::kByte);
  const int64_t bytes = ceil_div(grad.numel(), 8);
  TORCH_CHECK_VALUE(bits.dim() == 1 && bits.numel() == bytes, op, ": bits must be uint8 [", bytes,
                    "], one bit per element of grad, got ", describe(bits));
  const at::Tensor x = grad.contiguous(), mask = bits.contiguous();
  at::Tensor out = reused_output(x.sizes(), x.options());
  check_status(tq_mask(x.const_data_ptr(), type_of(x), x.numel(), mask.const_data_ptr<uint8_t>(),
                       out.mutable_data_ptr(), &kTorchThreads));
  return out;
}

// A learned scale is not refused inside a training step, whatever its value.
Scales learned_scales(const char* op, const at::Tensor& scale, int64_t qmin, int64_t qmax) {
  check_dtype(op, "scale", scale, at::kFloat);
  Scales s;
  s.scale = scale.contiguous();
  s.qmin = qmin;
  s.qmax = qmax;
  return s;
}

at::Tensor fake_quantize_learned(const at::Tensor& input, const at::Tensor& scale, const OptTensor& offset,
                                 int64_t qmin, int64_t qmax, double /*grad_factor*/, OptInt axis, OptInt group_size) {
  const char* op = "fake_quantize_learned";
  check_float(op, "input", input);
  check_fake_range(op, qmin, qmax);
  const tq_spans spans = make_spans(op, input, scale, axis, group_size);
  const Scales s = learned_scales(op, scale, qmin, qmax);
  const tq_scales scales = s.view();
  at::Tensor offsets;
  if (offset && offset->defined()) {
    check_dtype(op, "offset", *offset, at::kFloat);
    TORCH_CHECK_VALUE(offset->sizes() == scale.sizes(), op, ": offset must have scale's shape ", scale.sizes(),
                      ", got ", describe(*offset));
    offsets = offset->contiguous();
  }
  const at::Tensor x = input.contiguous();
  at::Tensor out = reused_output(x.sizes(), x.options());
  check_status(tq_fake_quantize_learned(x.const_data_ptr(), type_of(x), out.mutable_data_ptr(), &spans, &scales,
                                        offsets.defined() ? offsets.const_data_ptr<float>() : nullptr, &kTorchThreads));
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_learned_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
    int64_t qmax, OptInt axis, OptInt group_size) {
  const char* op = "fake_quantize_learned_backward";
  check_float(op, "input", input);
  check_dtype(op, "grad", grad, input.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == input.sizes(), op, ": grad must have input's shape ", input.sizes(), ", got ",
                    describe(grad));
  check_fake_range(op, qmin, qmax);
  const tq_spans spans = make_spans(op, input, scale, axis, group_size);
  Scales s = learned_scales(op, scale, qmin, qmax);
  if (zero_point && zero_point->defined()) {
    check_dtype(op, "zero_point", *zero_point, at::kInt);
    TORCH_CHECK_VALUE(zero_point->sizes() == scale.sizes(), op, ": zero_point must have scale's shape ", scale.sizes(),
                      ", got ", describe(*zero_point));
    const at::Tensor given = zero_point->contiguous();
    const int32_t* zero = given.const_data_ptr<int32_t>();
    if (scale.numel() > 0) check_zero_points(op, "zero_point", zero, scale.numel(), qmin, qmax);
    s.zero_point.assign(zero, zero + scale.numel());
  }
  const tq_scales scales = s.view();
  const at::Tensor x = input.contiguous(), g = grad.contiguous();
  at::Tensor grad_input = reused_output(x.sizes(), x.options());
  at::Tensor grad_scale = at::empty(scale.sizes(), scale.options());
  at::Tensor grad_offset = at::empty(scale.sizes(), scale.options());
  tq_learned_backward_call call{};
  call.grad = g.const_data_ptr();
  call.x = x.const_data_ptr();
  call.grad_x = grad_input.mutable_data_ptr();
  call.type = type_of(x);
  call.grad_scale = grad_scale.mutable_data_ptr<float>();
  call.grad_offset = grad_offset.mutable_data_ptr<float>();
  check_status(tq_fake_quantize_learned_backward(&call, &spans, &scales, &kTorchThreads));
  return {grad_input, grad_scale, grad_offset};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> minmax(const at::Tensor& input, OptInt axis, OptInt group_size) {
  const char* op = "minmax";
  check_float(op, "input", input);
  const auto floats = input.options().dtype(at::kFloat);
  at::Tensor least = at::empty(scale_sizes(input, axis, group_size), floats);
  const tq_spans spans = make_spans(op, input, least, axis, group_size);
  at::Tensor greatest = at::empty(least.sizes(), floats);
  at::Tensor nonfinite = at::empty({1}, floats.dtype(at::kLong));
  const at::Tensor x = input.contiguous();
  check_status(tq_minmax(x.const_data_ptr(), type_of(x), &spans, least.numel(), least.mutable_data_ptr<float>(),
                         greatest.mutable_data_ptr<float>(), nonfinite.mutable_data_ptr<int64_t>(), &kTorchThreads));
  return {least, greatest, nonfinite};
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::fake_quantize::implement(m, &fake_quantize);
  ops::fake_quantize_mask::implement(m, &fake_quantize_mask);
  ops::in_range::implement(m, &in_range);
  ops::positive::implement(m, &positive);
  ops::mask_gradient::implement(m, &mask_gradient);
  ops::fake_quantize_learned::implement(m, &fake_quantize_learned);
  ops::fake_quantize_learned_backward::implement(m, &fake_quantize_learned_backward);
  ops::minmax::implement(m, &minmax);
}

}  // namespace
}  // namespace torchquant
