// Gradients of activation and gated_activation: ATen's derivatives in fp32, rounded once to the argument's type. The
// function is computed again in backward, through autograd, so that gradients of gradients exist.
#include "autograd/activations.h"
#include "autograd/function.h"
#include "operators.h"

#include <optional>

namespace torchquant {
namespace {

struct ActivationFunction {
  static Variable forward(AutogradContext* ctx, const Variable& input, std::string_view activation,
                          std::optional<at::ScalarType> dtype) {
    ctx->save_for_backward({input});
    ctx->saved_data["activation"] = std::string(activation);
    return ops::activation::call_below_autograd(input, activation, dtype);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor input = ctx->get_saved_variables()[0];
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    const at::Tensor grad = activation_backward(activation, grads[0].to(at::kFloat), input.to(at::kFloat));
    return {grad.to(input.scalar_type()), Variable(), Variable()};
  }
};

struct GatedActivation {
  static Variable forward(AutogradContext* ctx, const Variable& gate, const Variable& up, std::string_view activation) {
    ctx->save_for_backward({gate, up});
    ctx->saved_data["activation"] = std::string(activation);
    return ops::gated_activation::call_below_autograd(gate, up, activation);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    const at::Tensor grad = grads[0].to(at::kFloat), gate = saved[0].to(at::kFloat), up = saved[1].to(at::kFloat);
    Variable grad_gate, grad_up;
    if (ctx->needs_input_grad(0))
      grad_gate = activation_backward(activation, grad * up, gate).to(saved[0].scalar_type());
    if (ctx->needs_input_grad(1))
      grad_up = (grad * ops::activation::call(gate, activation, at::kFloat)).to(saved[1].scalar_type());
    return {grad_gate, grad_up, Variable()};
  }
};

at::Tensor activation_autograd(const at::Tensor& input, std::string_view activation,
                               std::optional<at::ScalarType> dtype) {
  if (follows(ops::activation::name, input)) return Differentiable<ActivationFunction>::apply(input, activation, dtype);
  return ops::activation::call_below_autograd(input, activation, dtype);
}

at::Tensor gated_activation_autograd(const at::Tensor& gate, const at::Tensor& up, std::string_view activation) {
  if (follows(ops::gated_activation::name, gate, up))
    return Differentiable<GatedActivation>::apply(gate, up, activation);
  return ops::gated_activation::call_below_autograd(gate, up, activation);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) {
  ops::activation::implement(m, &activation_autograd);
  ops::gated_activation::implement(m, &gated_activation_autograd);
}

}  // namespace
}  // namespace torchquant
