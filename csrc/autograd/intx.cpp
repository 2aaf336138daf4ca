// Gradients of linear_dynamic_intx and linear_static_intx (straight through the quantizer) and of linear_intx, to the input
// and to the bias, as in linear.cpp.
#include "autograd/activations.h"
#include "autograd/bias.h"
#include "autograd/function.h"
#include "common/arithmetic.h"
#include "operators.h"

namespace torchquant::intx {
namespace {

// The values that the weight's integers represent, fp32 [N, K].
at::Tensor float_weight(const at::Tensor& packed, int64_t n, const c10::SymInt& k, int64_t bits,
                        std::optional<int64_t> group_size, bool has_zero) {
  const auto [q, scale, zero] = ops::unpack_intx_weight::call_symbolic(packed, n, k, bits, group_size, has_zero);
  const auto of_inputs = [&](const at::Tensor& t) {
    if (!group_size) return t.unsqueeze(1);
    return t.repeat_interleave(*group_size, 1).narrow_symint(1, 0, k);
  };
  return (q.to(at::kFloat) - of_inputs(zero.to(at::kFloat))) * of_inputs(scale);
}

struct LinearDynamicIntx {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& packed, const OptTensor& bias,
                          int64_t out_features, int64_t bits, std::optional<int64_t> group_size, bool has_zero_point,
                          bool symmetric, std::string_view activation, std::optional<at::ScalarType> output_dtype,
                          int64_t activation_bits) {
    const bool needs_input = activation != "none";  // the pre-activation is computed again in backward
    ctx->save_for_backward(
        {needs_input ? input : Variable(), packed, needs_input ? bias.value_or(Variable()) : Variable()});
    ctx->saved_data["out_features"] = out_features;
    ctx->saved_data["in_features"] = input.sym_size(-1);
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["group_size"] = group_size;
    ctx->saved_data["has_zero_point"] = has_zero_point;
    ctx->saved_data["symmetric"] = symmetric;
    ctx->saved_data["activation_bits"] = activation_bits;
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    ctx->saved_data["bias_dtype"] = dtype_number(bias);
    ctx->saved_data["bias_edge"] = int64_t{present(bias) ? 2 : -1};
    return ops::linear_dynamic_intx::call_below_autograd(input, packed, bias, out_features, bits, group_size,
                                                         has_zero_point, symmetric, activation, output_dtype,
                                                         activation_bits);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const int64_t n = number("out_features"), bits = number("bits");
    const std::optional<int64_t> group_size = ctx->saved_data["group_size"].toOptional<int64_t>();
    const bool has_zero = ctx->saved_data["has_zero_point"].toBool();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    at::Tensor grad = grads[0].to(at::kFloat);
    if (activation != "none") {  // through autograd, for gradients of this gradient (create_graph=True)
      const at::Tensor pre = ops::linear_dynamic_intx::call(saved[0], saved[1], optional_of(saved[2]), n, bits,
                                                            group_size, has_zero, ctx->saved_data["symmetric"].toBool(),
                                                            "none", at::kFloat, number("activation_bits"));
      grad = activation_backward(activation, grad, pre);
    }
    Variable grad_input, grad_bias;
    if (ctx->needs_input_grad(0)) {
      const auto input_dtype = static_cast<at::ScalarType>(number("input_dtype"));
      const at::Tensor w =
          float_weight(saved[1], n, ctx->saved_data["in_features"].toSymInt(), bits, group_size, has_zero);
      grad_input = at::matmul(grad, w).to(input_dtype);
    }
    if (bias_wants_gradient(ctx)) grad_bias = bias_gradient(ctx, grad);
    return {grad_input, Variable(), grad_bias,  Variable(), Variable(), Variable(),
            Variable(), Variable(), Variable(), Variable(), Variable()};
  }
};

struct LinearStaticIntx {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& input_scale,
                          const OptTensor& input_zero_point, const Variable& packed, const OptTensor& bias,
                          int64_t out_features, int64_t bits, std::optional<int64_t> group_size, bool has_zero_point,
                          std::string_view activation, at::ScalarType output_dtype, int64_t input_qmin,
                          int64_t input_qmax) {
    ctx->save_for_backward({input, input_scale, input_zero_point.value_or(Variable()), packed,
                            activation != "none" ? bias.value_or(Variable()) : Variable()});
    ctx->saved_data["out_features"] = out_features;
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["group_size"] = group_size;
    ctx->saved_data["has_zero_point"] = has_zero_point;
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["input_qmin"] = input_qmin;
    ctx->saved_data["input_qmax"] = input_qmax;
    ctx->saved_data["bias_dtype"] = dtype_number(bias);
    ctx->saved_data["bias_edge"] = int64_t{present(bias) ? 3 + present(input_zero_point) : -1};
    return ops::linear_static_intx::call_below_autograd(input, input_scale, input_zero_point, packed, bias,
                                                        out_features, bits, group_size, has_zero_point, activation,
                                                        output_dtype, input_qmin, input_qmax);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &scale = saved[1], &packed = saved[3];
    const OptTensor zero = optional_of(saved[2]);
    const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const int64_t n = number("out_features"), bits = number("bits");
    const int64_t qmin = number("input_qmin"), qmax = number("input_qmax");
    const std::optional<int64_t> group_size = ctx->saved_data["group_size"].toOptional<int64_t>();
    const bool has_zero = ctx->saved_data["has_zero_point"].toBool();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    at::Tensor grad = grads[0].to(at::kFloat);
    if (activation != "none") {
      const at::Tensor pre = ops::linear_static_intx::call(input, scale, zero, packed, optional_of(saved[4]), n, bits,
                                                           group_size, has_zero, "none", at::kFloat, qmin, qmax);
      grad = activation_backward(activation, grad, pre);
    }
    Variable grad_input, grad_bias;
    if (ctx->needs_input_grad(0)) {
      const at::Tensor w = float_weight(packed, n, input.sym_size(-1), bits, group_size, has_zero);
      // Straight through where the rounded value lies in the range (numerics.md, section 6).
      at::Tensor q = (input.to(at::kFloat) * torchquant::reciprocal(scale.reshape({}))).round();
      if (zero) q = q + zero->reshape({}).to(at::kFloat);
      const at::Tensor inside = (q >= qmin).logical_and(q <= qmax), through = at::matmul(grad, w);
      grad_input = at::where(inside, through, at::zeros_like(through)).to(input.scalar_type());
    }
    if (bias_wants_gradient(ctx)) grad_bias = bias_gradient(ctx, grad);
    return {grad_input, Variable(), Variable(), Variable(), grad_bias,  Variable(), Variable(),
            Variable(), Variable(), Variable(), Variable(), Variable(), Variable()};
  }
};

at::Tensor linear_dynamic_intx_autograd(const at::Tensor& input, const at::Tensor& packed, const OptTensor& bias,
                                        int64_t out_features, int64_t bits, std::optional<int64_t> group_size,
                                        bool has_zero_point, bool symmetric, std::string_view activation,
                                        std::optional<at::ScalarType> output_dtype, int64_t activation_bits) {
  if (!follows(ops::linear_dynamic_intx::name, input, bias))
    return ops::linear_dynamic_intx::call_below_autograd(input, packed, bias, out_features, bits, group_size,
                                                         has_zero_point, symmetric, activation, output_dtype,
                                                         activation_bits);
  return Differentiable<LinearDynamicIntx>::apply(input, packed, bias, out_features, bits, group_size, has_zero_point,
                                                  symmetric, activation, output_dtype, activation_bits);
}

at::Tensor linear_static_intx_autograd(const at::Tensor& input, const at::Tensor& input_scale,
                                       const OptTensor& input_zero_point, const at::Tensor& packed,
                                       const OptTensor& bias, int64_t out_features, int64_t bits,
                                       std::optional<int64_t> group_size, bool has_zero_point,
                                       std::string_view activation, at::ScalarType output_dtype, int64_t input_qmin,
                                       int64_t input_qmax) {
  if (!follows(ops::linear_static_intx::name, input, bias))
    return ops::linear_static_intx::call_below_autograd(input, input_scale, input_zero_point, packed, bias,
                                                        out_features, bits, group_size, has_zero_point, activation,
                                                        output_dtype, input_qmin, input_qmax);
  return Differentiable<LinearStaticIntx>::apply(input, input_scale, input_zero_point, packed, bias, out_features, bits,
                                                 group_size, has_zero_point, activation, output_dtype, input_qmin,
                                                 input_qmax);
}

struct LinearIntx {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& packed, const OptTensor& bias,
                          int64_t out_features, int64_t bits, std::optional<int64_t> group_size, bool has_zero_point,
                          std::string_view activation, std::optional<at::ScalarType> output_dtype) {
    const bool needs_input = activation != "none";  // the pre-activation is computed again in backward
    ctx->save_for_backward(
        {needs_input ? input : Variable(), packed, needs_input ? bias.value_or(Variable()) : Variable()});
    ctx->saved_data["out_features"] = out_features;
    ctx->saved_data["in_features"] = input.sym_size(-1);
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["group_size"] = group_size;
    ctx->saved_data["has_zero_point"] = has_zero_point;
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    ctx->saved_data["bias_dtype"] = dtype_number(bias);
    ctx->saved_data["bias_edge"] = int64_t{present(bias) ? 2 : -1};
    return ops::linear_intx::call_below_autograd(input, packed, bias, out_features, bits, group_size, has_zero_point,
                                                 activation, output_dtype);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const int64_t n = number("out_features"), bits = number("bits");
    const std::optional<int64_t> group_size = ctx->saved_data["group_size"].toOptional<int64_t>();
    const bool has_zero = ctx->saved_data["has_zero_point"].toBool();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    at::Tensor grad = grads[0].to(at::kFloat);
    if (activation != "none") {  // through autograd, for gradients of this gradient (create_graph=True)
      const at::Tensor pre = ops::linear_intx::call(saved[0], saved[1], optional_of(saved[2]), n, bits, group_size,
                                                    has_zero, "none", at::kFloat);
      grad = activation_backward(activation, grad, pre);
    }
    Variable grad_input, grad_bias;
    if (ctx->needs_input_grad(0)) {
      const auto input_dtype = static_cast<at::ScalarType>(number("input_dtype"));
      const at::Tensor w =
          float_weight(saved[1], n, ctx->saved_data["in_features"].toSymInt(), bits, group_size, has_zero);
      grad_input = at::matmul(grad, w).to(input_dtype);
    }
    if (bias_wants_gradient(ctx)) grad_bias = bias_gradient(ctx, grad);
    return {grad_input, Variable(), grad_bias, Variable(), Variable(), Variable(), Variable(), Variable(), Variable()};
  }
};

at::Tensor linear_intx_autograd(const at::Tensor& input, const at::Tensor& packed, const OptTensor& bias,
                                int64_t out_features, int64_t bits, std::optional<int64_t> group_size,
                                bool has_zero_point, std::string_view activation,
                                std::optional<at::ScalarType> output_dtype) {
  if (!follows(ops::linear_intx::name, input, bias))
    return ops::linear_intx::call_below_autograd(input, packed, bias, out_features, bits, group_size, has_zero_point,
                                                 activation, output_dtype);
  return Differentiable<LinearIntx>::apply(input, packed, bias, out_features, bits, group_size, has_zero_point,
                                           activation, output_dtype);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) {
  ops::linear_dynamic_intx::implement(m, &linear_dynamic_intx_autograd);
  ops::linear_static_intx::implement(m, &linear_static_intx_autograd);
  ops::linear_intx::implement(m, &linear_intx_autograd);
}

}  // namespace
}  // namespace torchquant::intx
