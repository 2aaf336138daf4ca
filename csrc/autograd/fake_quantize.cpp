// Gradients of fake quantization, straight through the rounding. fake_quantize saves one bit per element for them and
// nothing else; a learned step needs its float input. csrc/boxed covers the operators of this family without gradients.
#include <optional>

#include "autograd/function.h"
#include "operators.h"

namespace torchquant {
namespace {

struct MaskGradient {
  static Variable forward(AutogradContext* ctx, const Variable& grad, const Variable& bits) {
    ctx->save_for_backward({bits});
    return ops::mask_gradient::call_below_autograd(grad, bits);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {ops::mask_gradient::call(grads[0], ctx->get_saved_variables()[0]), Variable()};
  }
};

struct FakeQuantize {
  static Variable forward(AutogradContext* ctx, const Variable& input, const at::Tensor& scale,
                          const OptTensor& zero_point, int64_t qmin, int64_t qmax, OptInt axis, OptInt group_size) {
    if (inside_transforms()) {  // an outer one differentiates what is called here; fake_quantize_mask has no gradient
      ctx->save_for_backward(
          {ops::in_range::call_below_autograd(input, scale, zero_point, qmin, qmax, axis, group_size)});
      return ops::fake_quantize::call_below_autograd(input, scale, zero_point, qmin, qmax, axis, group_size);
    }
    auto [output, bits] =
        ops::fake_quantize_mask::call_below_autograd(input, scale, zero_point, qmin, qmax, axis, group_size);
    ctx->save_for_backward({bits});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(7);
    result[0] = ops::mask_gradient::call(grads[0], ctx->get_saved_variables()[0]);
    return result;
  }
};

// The integer that represents 0, computed as in the kernel.
at::Tensor zero_point_of(const at::Tensor& offset, const at::Tensor& scale, int64_t qmin, int64_t qmax) {
  const at::Tensor zero = at::round(-offset / scale.clamp_min(0x1p-126));
  return at::nan_to_num(zero, 0.0).clamp(qmin, qmax).to(at::kInt);
}

struct FakeQuantizeLearned {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& scale, const OptTensor& offset,
                          int64_t qmin, int64_t qmax, double grad_factor, OptInt axis, OptInt group_size) {
    ctx->save_for_backward({input, scale, offset.value_or(Variable())});
    ctx->saved_data["qmin"] = qmin;
    ctx->saved_data["qmax"] = qmax;
    ctx->saved_data["grad_factor"] = grad_factor;
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["group_size"] = group_size;
    return ops::fake_quantize_learned::call_below_autograd(input, scale, offset, qmin, qmax, grad_factor, axis,
                                                           group_size);
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
    auto [grad_input, grad_scale, grad_offset] = ops::fake_quantize_learned_backward::call_below_autograd(
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
  if (follows(ops::mask_gradient::name, grad)) return Differentiable<MaskGradient>::apply(grad, bits);
  return ops::mask_gradient::call_below_autograd(grad, bits);
}

at::Tensor fake_quantize_autograd(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point,
                                  int64_t qmin, int64_t qmax, OptInt axis, OptInt group_size) {
  if (follows(ops::fake_quantize::name, input))
    return Differentiable<FakeQuantize>::apply(input, scale, zero_point, qmin, qmax, axis, group_size);
  return ops::fake_quantize::call_below_autograd(input, scale, zero_point, qmin, qmax, axis, group_size);
}

at::Tensor fake_quantize_learned_autograd(const at::Tensor& input, const at::Tensor& scale, const OptTensor& offset,
                                          int64_t qmin, int64_t qmax, double grad_factor, OptInt axis,
                                          OptInt group_size) {
  if (follows(ops::fake_quantize_learned::name, input, scale, offset)) {
    refuse_transforms(ops::fake_quantize_learned::name);
    return Differentiable<FakeQuantizeLearned>::apply(input, scale, offset, qmin, qmax, grad_factor, axis, group_size);
  }
  return ops::fake_quantize_learned::call_below_autograd(input, scale, offset, qmin, qmax, grad_factor, axis,
                                                         group_size);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) {
  ops::fake_quantize::implement(m, &fake_quantize_autograd);
  ops::mask_gradient::implement(m, &mask_gradient_autograd);
  ops::fake_quantize_learned::implement(m, &fake_quantize_learned_autograd);
}

}  // namespace
}  // namespace torchquant
