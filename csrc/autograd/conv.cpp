// Gradients of the convolutions: to a float input (straight through the quantizer), to a float bias and to a float
// residual; the integer weight has none. Only what autograd asks for is computed.
#include <vector>

#include "autograd/activations.h"
#include "autograd/function.h"
#include "common/arithmetic.h"
#include "operators.h"

namespace torchquant::conv {
namespace {

std::vector<int64_t> ints(const AutogradContext* ctx, const char* name) {
  return ctx->saved_data.at(name).toIntVector();
}
int64_t number(const AutogradContext* ctx, const char* name) { return ctx->saved_data.at(name).toInt(); }

// What both operators save besides their tensors.
void save_sizes(AutogradContext* ctx, const Variable& input, const OptTensor& bias, int64_t bias_edge,
                at::IntArrayRef weight_shape, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                int64_t groups, std::string_view activation) {
  ctx->saved_data["weight_shape"] = weight_shape.vec();
  ctx->saved_data["stride"] = stride.vec();
  ctx->saved_data["padding"] = padding.vec();
  ctx->saved_data["dilation"] = dilation.vec();
  ctx->saved_data["groups"] = groups;
  ctx->saved_data["activation"] = std::string(activation);
  ctx->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
  ctx->saved_data["input_sizes"] = input.sym_sizes().slice(2).vec();
  ctx->saved_data["bias_dtype"] = static_cast<int64_t>(present(bias) ? bias->scalar_type() : at::kFloat);
  ctx->saved_data["bias_edge"] = present(bias) ? bias_edge : int64_t{-1};
}

// Autograd numbers the tensors that are present.
bool wants_gradient(AutogradContext* ctx, const char* edge) {
  const int64_t index = number(ctx, edge);
  return index >= 0 && ctx->needs_input_grad(static_cast<size_t>(index));
}

// The gradient with respect to the values that the input's integers represent, float32.
at::Tensor through_weight(AutogradContext* ctx, const at::Tensor& grad, const at::Tensor& packed,
                          const at::Tensor& weight_scale) {
  const std::vector<int64_t> shape = ints(ctx, "weight_shape"), stride = ints(ctx, "stride"),
                             padding = ints(ctx, "padding"), dilation = ints(ctx, "dilation");
  const int64_t groups = number(ctx, "groups");
  const size_t spatial = stride.size();
  std::vector<int64_t> channels(shape.size(), 1);
  channels[0] = -1;
  const at::Tensor w =
      ops::unpack_conv_weight::call(packed, shape, groups).to(at::kFloat) * weight_scale.reshape(channels);
  const std::vector<int64_t> zeros(spatial, 0);
  const at::Tensor padded = at::convolution(grad, w, {}, stride, zeros, dilation, /*transposed=*/true, zeros, groups);
  // Of the padded input without the rows and columns that no output reads. Padding by a negative number cuts.
  const auto sizes = ctx->saved_data.at("input_sizes").toSymIntVector();
  std::vector<c10::SymInt> cut;
  for (size_t d = spatial; d-- > 0;) {  // the last dimension first
    const c10::SymInt before = padding[2 * d];
    cut.push_back(-before);
    cut.push_back(sizes[d] + before - padded.sym_size(static_cast<int64_t>(2 + d)));
  }
  return at::constant_pad_nd_symint(padded, cut);
}

at::Tensor conv_bias_gradient(AutogradContext* ctx, const at::Tensor& grad) {
  std::vector<int64_t> dimensions = {0};
  for (int64_t d = 2; d < grad.dim(); ++d) dimensions.push_back(d);
  return grad.sum(dimensions).to(static_cast<at::ScalarType>(number(ctx, "bias_dtype")));
}

struct ConvDynamic {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& packed,
                          const Variable& weight_scale, const OptTensor& bias, at::IntArrayRef weight_shape,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                          bool symmetric, std::string_view activation, std::optional<at::ScalarType> output_dtype,
                          int64_t activation_bits) {
    const bool again = activation != "none";  // the pre-activation is computed again in backward
    ctx->save_for_backward(
        {again ? input : Variable(), packed, weight_scale, again ? bias.value_or(Variable()) : Variable()});
    save_sizes(ctx, input, bias, 3, weight_shape, stride, padding, dilation, groups, activation);
    ctx->saved_data["symmetric"] = symmetric;
    ctx->saved_data["activation_bits"] = activation_bits;
    return ops::conv_dynamic::call_below_autograd(input, packed, weight_scale, bias, weight_shape, stride, padding,
                                                  dilation, groups, symmetric, activation, output_dtype,
                                                  activation_bits);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    at::Tensor grad = grads[0].to(at::kFloat);
    if (activation != "none") {  // through autograd, for gradients of this gradient (create_graph=True)
      const at::Tensor pre = ops::conv_dynamic::call(
          saved[0], saved[1], saved[2], optional_of(saved[3]), ints(ctx, "weight_shape"), ints(ctx, "stride"),
          ints(ctx, "padding"), ints(ctx, "dilation"), number(ctx, "groups"), ctx->saved_data["symmetric"].toBool(),
          "none", at::kFloat, number(ctx, "activation_bits"));
      grad = activation_backward(activation, grad, pre);
    }
    variable_list results(13);
    if (ctx->needs_input_grad(0))
      results[0] =
          through_weight(ctx, grad, saved[1], saved[2]).to(static_cast<at::ScalarType>(number(ctx, "input_dtype")));
    if (wants_gradient(ctx, "bias_edge")) results[3] = conv_bias_gradient(ctx, grad);
    return results;
  }
};

struct ConvStatic {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& input_scale,
                          const OptTensor& input_zero_point, const Variable& packed, const Variable& weight_scale,
                          const OptTensor& bias, at::IntArrayRef weight_shape, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                          std::string_view activation, const OptTensor& residual, const OptTensor& residual_scale,
                          int64_t residual_zero_point, at::ScalarType output_dtype, int64_t input_qmin,
                          int64_t input_qmax) {
    ctx->save_for_backward({input, input_scale, input_zero_point.value_or(Variable()), packed, weight_scale,
                            bias.value_or(Variable()), residual.value_or(Variable()),
                            residual_scale.value_or(Variable())});
    const int64_t bias_edge = 4 + present(input_zero_point), residual_edge = bias_edge + present(bias);
    save_sizes(ctx, input, bias, bias_edge, weight_shape, stride, padding, dilation, groups, activation);
    ctx->saved_data["residual_edge"] = present(residual) && !present(residual_scale) ? residual_edge : int64_t{-1};
    ctx->saved_data["residual_zero_point"] = residual_zero_point;
    ctx->saved_data["input_qmin"] = input_qmin;
    ctx->saved_data["input_qmax"] = input_qmax;
    return ops::conv_static::call_below_autograd(input, input_scale, input_zero_point, packed, weight_scale, bias,
                                                 weight_shape, stride, padding, dilation, groups, activation, residual,
                                                 residual_scale, residual_zero_point, output_dtype, std::nullopt, 0,
                                                 -128, 127, input_qmin, input_qmax);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &scale = saved[1];
    const OptTensor zero = optional_of(saved[2]);
    const int64_t qmin = number(ctx, "input_qmin"), qmax = number(ctx, "input_qmax");
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    at::Tensor grad = grads[0].to(at::kFloat);
    if (activation != "none") {
      const at::Tensor pre = ops::conv_static::call(
          input, scale, zero, saved[3], saved[4], optional_of(saved[5]), ints(ctx, "weight_shape"), ints(ctx, "stride"),
          ints(ctx, "padding"), ints(ctx, "dilation"), number(ctx, "groups"), "none", optional_of(saved[6]),
          optional_of(saved[7]), number(ctx, "residual_zero_point"), at::kFloat, std::nullopt, 0, -128, 127, qmin,
          qmax);
      grad = activation_backward(activation, grad, pre);
    }
    variable_list results(18);
    if (ctx->needs_input_grad(0)) {
      // Straight through where the rounded value lies in the range (numerics.md, section 6).
      at::Tensor q = (input.to(at::kFloat) * torchquant::reciprocal(scale.reshape({}))).round();
      if (zero) q = q + zero->reshape({}).to(at::kFloat);
      const at::Tensor inside = (q >= qmin).logical_and(q <= qmax);
      const at::Tensor through = through_weight(ctx, grad, saved[3], saved[4]);
      results[0] = at::where(inside, through, at::zeros_like(through)).to(input.scalar_type());
    }
    if (wants_gradient(ctx, "bias_edge")) results[5] = conv_bias_gradient(ctx, grad);
    if (wants_gradient(ctx, "residual_edge")) results[12] = grad;
    return results;
  }
};

at::Tensor conv_dynamic_autograd(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                                 const OptTensor& bias, at::IntArrayRef weight_shape, at::IntArrayRef stride,
                                 at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool symmetric,
                                 std::string_view activation, std::optional<at::ScalarType> output_dtype,
                                 int64_t activation_bits) {
  if (!follows(ops::conv_dynamic::name, input, bias))
    return ops::conv_dynamic::call_below_autograd(input, packed, weight_scale, bias, weight_shape, stride, padding,
                                                  dilation, groups, symmetric, activation, output_dtype,
                                                  activation_bits);
  return Differentiable<ConvDynamic>::apply(input, packed, weight_scale, bias, weight_shape, stride, padding, dilation,
                                            groups, symmetric, activation, output_dtype, activation_bits);
}

at::Tensor conv_static_autograd(const at::Tensor& input, const at::Tensor& input_scale,
                                const OptTensor& input_zero_point, const at::Tensor& packed,
                                const at::Tensor& weight_scale, const OptTensor& bias, at::IntArrayRef weight_shape,
                                at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                int64_t groups, std::string_view activation, const OptTensor& residual,
                                const OptTensor& residual_scale, int64_t residual_zero_point,
                                at::ScalarType output_dtype, const OptTensor& output_scale, int64_t output_zero_point,
                                int64_t output_qmin, int64_t output_qmax, int64_t input_qmin, int64_t input_qmax) {
  if (present(output_scale) || !follows(ops::conv_static::name, input, bias, residual))
    return ops::conv_static::call_below_autograd(input, input_scale, input_zero_point, packed, weight_scale, bias,
                                                 weight_shape, stride, padding, dilation, groups, activation, residual,
                                                 residual_scale, residual_zero_point, output_dtype, output_scale,
                                                 output_zero_point, output_qmin, output_qmax, input_qmin, input_qmax);
  return Differentiable<ConvStatic>::apply(input, input_scale, input_zero_point, packed, weight_scale, bias,
                                           weight_shape, stride, padding, dilation, groups, activation, residual,
                                           residual_scale, residual_zero_point, output_dtype, input_qmin, input_qmax);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) {
  ops::conv_static::implement(m, &conv_static_autograd);
  ops::conv_dynamic::implement(m, &conv_dynamic_autograd);
}

}  // namespace
}  // namespace torchquant::conv
