// Gradients of fake quantization, straight through the rounding. fake_quantize keeps one bit an element for them and
// nothing else; a learned step needs its float input. The other operators of training have no gradients and say so.

#include <optional>

#include "autograd/function.h"

namespace torchquant {
namespace {

template <class Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor mask_gradient_call(const at::Tensor& grad, const at::Tensor& bits) {
  static auto op = operator_named<at::Tensor(const at::Tensor&, const at::Tensor&)>("torchquant::mask_gradient");
  return op.call(grad, bits);
}

struct MaskGradient : public torch::autograd::Function<MaskGradient> {
  static Variable forward(AutogradContext* ctx, const Variable& grad, const Variable& bits) {
    ctx->save_for_backward({bits});
    at::AutoDispatchBelowADInplaceOrView guard;
    return mask_gradient_call(grad, bits);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {mask_gradient_call(grads[0], ctx->get_saved_variables()[0]), Variable()};
  }
};

at::Tensor fake_quantize_call(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point,
                              int64_t qmin, int64_t qmax, OptInt axis, OptInt group_size) {
  static auto op = operator_named<at::Tensor(const at::Tensor&, const at::Tensor&, const OptTensor&, int64_t, int64_t,
                                             OptInt, OptInt)>("torchquant::fake_quantize");
  return op.call(input, scale, zero_point, qmin, qmax, axis, group_size);
}

std::tuple<at::Tensor, at::Tensor> mask_call(const at::Tensor& input, const at::Tensor& scale,
                                             const OptTensor& zero_point, int64_t qmin, int64_t qmax, OptInt axis,
                                             OptInt group_size) {
  static auto op =
      operator_named<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptTensor&, int64_t,
                                                        int64_t, OptInt, OptInt)>("torchquant::fake_quantize_mask");
  return op.call(input, scale, zero_point, qmin, qmax, axis, group_size);
}

at::Tensor learned_call(const at::Tensor& input, const at::Tensor& scale, const OptTensor& offset, int64_t qmin,
                        int64_t qmax, double grad_factor, OptInt axis, OptInt group_size) {
  static auto op = operator_named<at::Tensor(const at::Tensor&, const at::Tensor&, const OptTensor&, int64_t, int64_t,
                                             double, OptInt, OptInt)>("torchquant::fake_quantize_learned");
  return op.call(input, scale, offset, qmin, qmax, grad_factor, axis, group_size);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> learned_backward_call(const at::Tensor& grad, const at::Tensor& input,
                                                                     const at::Tensor& scale,
                                                                     const OptTensor& zero_point, int64_t qmin,
                                                                     int64_t qmax, OptInt axis, OptInt group_size) {
  static auto op = operator_named<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptTensor&, int64_t, int64_t, OptInt, OptInt)>(
      "torchquant::fake_quantize_learned_backward");
  return op.call(grad, input, scale, zero_point, qmin, qmax, axis, group_size);
}

struct FakeQuantize : public torch::autograd::Function<FakeQuantize> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const at::Tensor& scale,
                          const OptTensor& zero_point, int64_t qmin, int64_t qmax, OptInt axis, OptInt group_size) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, bits] = mask_call(input, scale, zero_point, qmin, qmax, axis, group_size);
    ctx->save_for_backward({bits});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(7);
    result[0] = mask_gradient_call(grads[0], ctx->get_saved_variables()[0]);
    return result;
  }
};

// The integer that stands for 0, as the kernel computes it.
at::Tensor zero_point_of(const at::Tensor& offset, const at::Tensor& scale, int64_t qmin, int64_t qmax) {
  const at::Tensor zero = at::round(-offset / scale.clamp_min(0x1p-126));
  return at::nan_to_num(zero, 0.0).clamp(qmin, qmax).to(at::kInt);
}

struct FakeQuantizeLearned : public torch::autograd::Function<FakeQuantizeLearned> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& scale, const OptTensor& offset,
                          int64_t qmin, int64_t qmax, double grad_factor, OptInt axis, OptInt group_size) {
    ctx->save_for_backward({input, scale, offset.value_or(Variable())});
    ctx->saved_data["qmin"] = qmin;
    ctx->saved_data["qmax"] = qmax;
    ctx->saved_data["grad_factor"] = grad_factor;
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["group_size"] = group_size;
    at::AutoDispatchBelowADInplaceOrView guard;
    return learned_call(input, scale, offset, qmin, qmax, grad_factor, axis, group_size);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "fake_quantize_learned: gradients of its gradients do not exist (every derivative of a rounding is zero "
        "or a convention); call backward without create_graph=True");
    const auto saved = ctx->get_saved_variables();
    const int64_t qmin = ctx->saved_data["qmin"].toInt(), qmax = ctx->saved_data["qmax"].toInt();
    const double factor = ctx->saved_data["grad_factor"].toDouble();
    OptTensor zero_point;
    at::Tensor scale = saved[1];
    if (saved[2].defined()) {
      zero_point = zero_point_of(saved[2], saved[1], qmin, qmax);
      scale = at::where(saved[2].isnan(), saved[2], saved[1]);  // as in forward: an integer cannot hold NaN
    }
    auto [grad_input, grad_scale, grad_offset] = learned_backward_call(
        grads[0], saved[0], scale, zero_point, qmin, qmax, ctx->saved_data["axis"].toOptional<int64_t>(),
        ctx->saved_data["group_size"].toOptional<int64_t>());
    variable_list result(8);
    if (ctx->needs_input_grad(0)) result[0] = grad_input;
    if (ctx->needs_input_grad(1)) result[1] = grad_scale * factor;
    if (saved[2].defined() && ctx->needs_input_grad(2)) result[2] = grad_offset * factor;
    return result;
  }
};

at::Tensor mask_gradient_autograd(const at::Tensor& grad, const at::Tensor& bits) {
  if (follows(grad)) return MaskGradient::apply(grad, bits);
  at::AutoDispatchBelowADInplaceOrView guard;
  return mask_gradient_call(grad, bits);
}

at::Tensor fake_quantize_autograd(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point,
                                  int64_t qmin, int64_t qmax, OptInt axis, OptInt group_size) {
  if (follows(input)) return FakeQuantize::apply(input, scale, zero_point, qmin, qmax, axis, group_size);
  at::AutoDispatchBelowADInplaceOrView guard;
  return fake_quantize_call(input, scale, zero_point, qmin, qmax, axis, group_size);
}

at::Tensor fake_quantize_learned_autograd(const at::Tensor& input, const at::Tensor& scale, const OptTensor& offset,
                                          int64_t qmin, int64_t qmax, double grad_factor, OptInt axis,
                                          OptInt group_size) {
  if (follows(input) || follows(scale) || follows(offset))
    return FakeQuantizeLearned::apply(input, scale, offset, qmin, qmax, grad_factor, axis, group_size);
  at::AutoDispatchBelowADInplaceOrView guard;
  return learned_call(input, scale, offset, qmin, qmax, grad_factor, axis, group_size);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) {
  m.impl("fake_quantize", &fake_quantize_autograd);
  m.impl("mask_gradient", &mask_gradient_autograd);
  m.impl("fake_quantize_learned", &fake_quantize_learned_autograd);
  for (const char* name : {"fake_quantize_mask", "in_range", "positive", "fake_quantize_learned_backward", "minmax"})
    m.impl(name, torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace torchquant
