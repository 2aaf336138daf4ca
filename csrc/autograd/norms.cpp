// Gradients of rms_norm and layer_norm, in fp32: LayerNorm's by ATen's own backward, RMSNorm's by its formula, written in
// operators that have gradients themselves.
#include <optional>

#include "autograd/function.h"
#include "operators.h"

namespace torchquant {
namespace {

at::Tensor to_float(const at::Tensor& t) { return t.defined() ? t.to(at::kFloat) : t; }

Variable to_type_of(const at::Tensor& grad, const at::Tensor& t) {
  return grad.defined() && t.defined() ? grad.to(t.scalar_type()) : Variable();
}

// Autograd numbers the tensors that are present.
struct Edges {
  int64_t next = 0;
  int64_t operator()(const OptTensor& t) { return present(t) ? next++ : -1; }
};

bool wanted(AutogradContext* ctx, const char* edge) {
  const int64_t number = ctx->saved_data[edge].toInt();
  return number >= 0 && ctx->needs_input_grad(static_cast<size_t>(number));
}

struct RmsNorm {
  static Variable forward(AutogradContext* ctx, const Variable& input, const OptTensor& weight, double eps,
                          bool cast_before_weight) {
    ctx->save_for_backward({input, weight.value_or(Variable())});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["weight"] = int64_t{present(weight) ? 1 : -1};
    return ops::rms_norm::call_below_autograd(input, weight, eps, cast_before_weight);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor x = to_float(saved[0]), weight = to_float(saved[1]), grad = to_float(grads[0]);
    const at::Tensor inverse = at::rsqrt((x * x).mean(-1, true) + ctx->saved_data["eps"].toDouble());
    const at::Tensor normalized = x * inverse;
    Variable grad_input, grad_weight;
    if (ctx->needs_input_grad(0)) {
      const at::Tensor g = weight.defined() ? grad * weight : grad;
      grad_input = to_type_of(inverse * (g - normalized * (g * normalized).mean(-1, true)), saved[0]);
    }
    if (wanted(ctx, "weight")) {
      const at::Tensor product = grad * normalized;
      grad_weight = to_type_of(product.reshape_symint({-1, product.sym_size(-1)}).sum(0), saved[1]);
    }
    return {grad_input, grad_weight, Variable(), Variable()};
  }
};

struct LayerNorm {
  static Variable forward(AutogradContext* ctx, const Variable& input, const OptTensor& weight, const OptTensor& bias,
                          double eps, const OptTensor& residual) {
    ctx->save_for_backward(
        {input, weight.value_or(Variable()), bias.value_or(Variable()), residual.value_or(Variable())});
    ctx->saved_data["eps"] = eps;
    Edges edge;
    edge(input);
    ctx->saved_data["weight"] = edge(weight);
    ctx->saved_data["bias"] = edge(bias);
    ctx->saved_data["residual"] = edge(residual);
    return ops::layer_norm::call_below_autograd(input, weight, bias, eps, residual);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    at::Tensor x = to_float(saved[0]);
    if (saved[3].defined()) x = x + to_float(saved[3]);
    const at::Tensor weight = to_float(saved[1]), bias = to_float(saved[2]);
    const std::vector<c10::SymInt> shape{x.sym_size(-1)};
    const auto [y, mean, rstd] =
        at::native_layer_norm_symint(x.detach(), shape, std::nullopt, std::nullopt, ctx->saved_data["eps"].toDouble());
    const bool to_input = ctx->needs_input_grad(0), to_residual = wanted(ctx, "residual");
    auto [grad_x, grad_weight, grad_bias] = at::native_layer_norm_backward_symint(
        to_float(grads[0]), x, shape, mean, rstd, weight.defined() ? OptTensor(weight) : std::nullopt,
        bias.defined() ? OptTensor(bias) : std::nullopt,
        {to_input || to_residual, wanted(ctx, "weight"), wanted(ctx, "bias")});
    return {to_input ? to_type_of(grad_x, saved[0]) : Variable(), to_type_of(grad_weight, saved[1]),
            to_type_of(grad_bias, saved[2]), Variable(), to_residual ? to_type_of(grad_x, saved[3]) : Variable()};
  }
};

at::Tensor rms_norm_autograd(const at::Tensor& input, const OptTensor& weight, double eps, bool cast_before_weight) {
  if (follows(ops::rms_norm::name, input, weight))
    return Differentiable<RmsNorm>::apply(input, weight, eps, cast_before_weight);
  return ops::rms_norm::call_below_autograd(input, weight, eps, cast_before_weight);
}

at::Tensor layer_norm_autograd(const at::Tensor& input, const OptTensor& weight, const OptTensor& bias, double eps,
                               const OptTensor& residual) {
  if (follows(ops::layer_norm::name, input, weight, bias, residual))
    return Differentiable<LayerNorm>::apply(input, weight, bias, eps, residual);
  return ops::layer_norm::call_below_autograd(input, weight, bias, eps, residual);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) {
  ops::rms_norm::implement(m, &rms_norm_autograd);
  ops::layer_norm::implement(m, &layer_norm_autograd);
}

}  // namespace
}  // namespace torchquant
