// Gradients of the linears: to the input (straight through the quantizer, so that adapters below a quantized layer
// train) and to a float bias; the integer weight has none. Only what autograd asks for is computed.
#include "autograd/activations.h"
#include "common/checks.h"
#include "common/arithmetic.h"
#include "formats/packed_weight.h"
#include "autograd/function.h"
#include "autograd/bias.h"
#include "operators.h"

namespace torchquant {
namespace {

// The values that the weight's integers represent, fp32 [N, K].
at::Tensor float_weight(const at::Tensor& packed, const at::Tensor& weight_scale, const OptTensor& weight_zero_point,
                        int64_t n, const c10::SymInt& k) {
  at::Tensor w = ops::unpack_weight::call_symbolic(packed, n, k).to(at::kFloat);
  if (weight_zero_point && weight_zero_point->defined()) w = w - weight_zero_point->to(at::kFloat).reshape({-1, 1});
  return w * weight_scale.reshape({-1, 1});
}

struct LinearDynamic {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& packed,
                          const Variable& weight_scale, const OptTensor& weight_zero_point, const OptTensor& bias,
                          int64_t out_features, bool symmetric, std::string_view activation,
                          std::optional<at::ScalarType> output_dtype, int64_t activation_bits) {
    const bool needs_input = activation != "none";  // the pre-activation is computed again in backward
    ctx->save_for_backward({needs_input ? input : Variable(), packed, weight_scale,
                            weight_zero_point.value_or(Variable()),
                            needs_input ? bias.value_or(Variable()) : Variable()});
    ctx->saved_data["out_features"] = out_features;
    ctx->saved_data["in_features"] = input.sym_size(-1);
    ctx->saved_data["symmetric"] = symmetric;
    ctx->saved_data["activation_bits"] = activation_bits;
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    ctx->saved_data["bias_dtype"] = dtype_number(bias);
    ctx->saved_data["bias_edge"] = int64_t{present(bias) ? 3 + present(weight_zero_point) : -1};
    return ops::linear_dynamic::call_below_autograd(input, packed, weight_scale, weight_zero_point, bias, out_features,
                                                    symmetric, activation, output_dtype, activation_bits);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const int64_t n = ctx->saved_data["out_features"].toInt();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    at::Tensor grad = grads[0].to(at::kFloat);
    if (activation != "none") {  // through autograd, for gradients of this gradient (create_graph=True)
      const at::Tensor pre = ops::linear_dynamic::call(saved[0], saved[1], saved[2], optional_of(saved[3]),
                                                       optional_of(saved[4]), n, ctx->saved_data["symmetric"].toBool(),
                                                       "none", at::kFloat, ctx->saved_data["activation_bits"].toInt());
      grad = activation_backward(activation, grad, pre);
    }
    Variable grad_input, grad_bias;
    if (ctx->needs_input_grad(0)) {
      const auto input_dtype = static_cast<at::ScalarType>(ctx->saved_data["input_dtype"].toInt());
      const at::Tensor w =
          float_weight(saved[1], saved[2], optional_of(saved[3]), n, ctx->saved_data["in_features"].toSymInt());
      grad_input = at::matmul(grad, w).to(input_dtype);
    }
    if (bias_wants_gradient(ctx)) grad_bias = bias_gradient(ctx, grad);
    return {grad_input, Variable(), Variable(), Variable(), grad_bias,
            Variable(), Variable(), Variable(), Variable(), Variable()};
  }
};

struct LinearStatic {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& input_scale,
                          const OptTensor& input_zero_point, const Variable& packed, const Variable& weight_scale,
                          const OptTensor& weight_zero_point, const OptTensor& bias, int64_t out_features,
                          std::string_view activation, at::ScalarType output_dtype, int64_t input_qmin,
                          int64_t input_qmax) {
    ctx->save_for_backward({input, input_scale, input_zero_point.value_or(Variable()), packed, weight_scale,
                            weight_zero_point.value_or(Variable()), bias.value_or(Variable())});
    ctx->saved_data["out_features"] = out_features;
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["bias_dtype"] = dtype_number(bias);
    ctx->saved_data["bias_edge"] =
        int64_t{present(bias) ? 4 + present(input_zero_point) + present(weight_zero_point) : -1};
    ctx->saved_data["input_qmin"] = input_qmin;
    ctx->saved_data["input_qmax"] = input_qmax;
    return ops::linear_static::call_below_autograd(input, input_scale, input_zero_point, packed, weight_scale,
                                                   weight_zero_point, bias, out_features, activation, output_dtype,
                                                   std::nullopt, 0, -128, 127, input_qmin, input_qmax);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &scale = saved[1];
    const OptTensor zero = optional_of(saved[2]), weight_zero = optional_of(saved[5]);
    const int64_t n = ctx->saved_data["out_features"].toInt();
    const int64_t qmin = ctx->saved_data["input_qmin"].toInt(), qmax = ctx->saved_data["input_qmax"].toInt();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    at::Tensor grad = grads[0].to(at::kFloat);
    if (activation != "none") {
      const at::Tensor pre =
          ops::linear_static::call(input, scale, zero, saved[3], saved[4], weight_zero, optional_of(saved[6]), n,
                                   "none", at::kFloat, std::nullopt, 0, -128, 127, qmin, qmax);
      grad = activation_backward(activation, grad, pre);
    }
    Variable grad_input, grad_bias;
    if (ctx->needs_input_grad(0)) {
      const at::Tensor w = float_weight(saved[3], saved[4], weight_zero, n, input.sym_size(-1));
      // Straight through where the rounded value lies in the range (numerics.md, section 6).
      at::Tensor q = (input.to(at::kFloat) * torchquant::reciprocal(scale.reshape({}))).round();
      if (zero) q = q + zero->reshape({}).to(at::kFloat);
      const at::Tensor inside = (q >= qmin).logical_and(q <= qmax);
      const at::Tensor through = at::matmul(grad, w);
      grad_input = at::where(inside, through, at::zeros_like(through)).to(input.scalar_type());
    }
    if (bias_wants_gradient(ctx)) grad_bias = bias_gradient(ctx, grad);
    return {grad_input, Variable(), Variable(), Variable(), Variable(), Variable(),
            grad_bias,  Variable(), Variable(), Variable(), Variable(), Variable()};
  }
};

at::Tensor linear_dynamic_autograd(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                                   const OptTensor& weight_zero_point, const OptTensor& bias, int64_t out_features,
                                   bool symmetric, std::string_view activation,
                                   std::optional<at::ScalarType> output_dtype, int64_t activation_bits) {
  if (!follows(ops::linear_dynamic::name, input, bias))
    return ops::linear_dynamic::call_below_autograd(input, packed, weight_scale, weight_zero_point, bias, out_features,
                                                    symmetric, activation, output_dtype, activation_bits);
  return Differentiable<LinearDynamic>::apply(input, packed, weight_scale, weight_zero_point, bias, out_features,
                                              symmetric, activation, output_dtype, activation_bits);
}

at::Tensor linear_static_autograd(const at::Tensor& input, const at::Tensor& input_scale,
                                  const OptTensor& input_zero_point, const at::Tensor& packed,
                                  const at::Tensor& weight_scale, const OptTensor& weight_zero_point,
                                  const OptTensor& bias, int64_t out_features, std::string_view activation,
                                  at::ScalarType output_dtype, const OptTensor& output_scale, int64_t output_zero_point,
                                  int64_t output_qmin, int64_t output_qmax, int64_t input_qmin, int64_t input_qmax) {
  const bool integer_output = output_scale && output_scale->defined();
  if (integer_output || !follows(ops::linear_static::name, input, bias))
    return ops::linear_static::call_below_autograd(
        input, input_scale, input_zero_point, packed, weight_scale, weight_zero_point, bias, out_features, activation,
        output_dtype, output_scale, output_zero_point, output_qmin, output_qmax, input_qmin, input_qmax);
  return Differentiable<LinearStatic>::apply(input, input_scale, input_zero_point, packed, weight_scale,
                                             weight_zero_point, bias, out_features, activation, output_dtype,
                                             input_qmin, input_qmax);
}

// With gradients, the layers are called one by one.
std::vector<at::Tensor> linear_dynamic_split_autograd(const at::Tensor& input, const at::Tensor& packed,
                                                      const at::Tensor& weight_scale,
                                                      const OptTensor& weight_zero_point, const OptTensor& bias,
                                                      at::IntArrayRef out_features, bool symmetric,
                                                      const c10::List<std::string>& activations,
                                                      std::optional<at::ScalarType> output_dtype) {
  if (!follows(ops::linear_dynamic_split::name, input, bias))
    return ops::linear_dynamic_split::call_below_autograd(input, packed, weight_scale, weight_zero_point, bias,
                                                          out_features, symmetric, activations, output_dtype);
  const char* op = "linear_dynamic_split";
  check_members(op, input, packed, weight_scale, weight_zero_point, bias, out_features, activations.size());
  // The second dimension determines the format.
  const int64_t k = input.sym_size(-1).guard_int(__FILE__, __LINE__);
  const PackedFormat format =
      packed.dim() == 2 ? packed_format(packed.sym_size(1).guard_int(__FILE__, __LINE__), k) : PackedFormat::kInt8Tiles;
  const auto height = [&](int64_t n) { return packed_shape(format, n, k).rows; };
  if (format == PackedFormat::kInt8Tiles)
    check_split(op, input, packed, weight_scale, weight_zero_point, bias, out_features, activations.size());
  std::vector<at::Tensor> outputs;
  int64_t first = 0, row = 0;
  for (size_t i = 0; i < out_features.size(); ++i) {
    const int64_t n = out_features[i], rows = height(n);
    const auto part = [&](const OptTensor& t) { return present(t) ? OptTensor(t->narrow(0, first, n)) : std::nullopt; };
    const std::string activation = activations.empty() ? "none" : activations.get(i);
    outputs.push_back(ops::linear_dynamic::call(input, packed.narrow(0, row, rows), weight_scale.narrow(0, first, n),
                                                part(weight_zero_point), part(bias), n, symmetric, activation,
                                                output_dtype, 8));
    first += n;
    row += rows;
  }
  return outputs;
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) {
  ops::linear_dynamic_split::implement(m, &linear_dynamic_split_autograd);
  ops::linear_dynamic::implement(m, &linear_dynamic_autograd);
  ops::linear_static::implement(m, &linear_static_autograd);
}

}  // namespace
}  // namespace torchquant
