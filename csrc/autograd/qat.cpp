// qat_linear: the deployed integer layer with gradients for its float input and weight.
//
// Forward is quantize_pack, quantize_rows and linear_static: the operators of the converted layer, so its bits. Saved
// for backward are the int8 activations with a scale per row and one bit per element where a gradient stops (relu's
// output, values beyond a static range). The float weight is a parameter and in memory anyway; its integers are
// computed again, which costs one pass over it, a hundredth of the products that follow. A float input is saved only if
// its step is learned, because that gradient depends on the values before rounding.
//
// Backward, with Xq, Wq the values that the integers represent (straight-through estimator, Bengio et al., 2013):
//   g      = grad where output > 0           (relu)
//   grad_x = g Wq, where x is in its range (dynamic: everywhere)
//   grad_w = g^T Xq, where w is in its range (a range from the channel itself: everywhere)
//   learned scales: LSQ (Esser et al., 2020), from grad_x and grad_w.
#include <ATen/autocast_mode.h>

#include <vector>

#include "autograd/function.h"
#include "common/qat_linear.h"
#include "operators.h"

namespace torchquant::qat {
namespace {

bool learns(const OptTensor& t) { return present(t) && t->requires_grad(); }

struct QatLinear {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight, const OptTensor& bias,
                          const OptTensor& input_scale, const OptTensor& input_zero_point,
                          const OptTensor& input_offset, const OptTensor& weight_scale, const Settings& s) {
    const bool input_learns = s.input_grad_factor > 0 && (learns(input_scale) || learns(input_offset));
    const bool weight_learns = s.weight_grad_factor > 0 && learns(weight_scale);
    const bool wants_input = input.requires_grad() || input_learns;
    const bool wants_weight = weight.requires_grad() || weight_learns;

    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [scale, zero] = input_params(input_scale, input_zero_point, input_offset, s.input_qmin, s.input_qmax);
    const auto [packed, channel_scale, channel_zero] =
        ops::quantize_pack::call(weight, weight_scale, s.weight_qmin, s.weight_qmax, s.weight_symmetric);
    const int64_t shift = shift_of(s.input_qmax);
    const auto [q, row_scale, row_zero] =
        ops::quantize_rows::call(input, scale, zero, s.input_qmin - shift, s.input_qmax - shift, s.input_symmetric);
    const bool own_zeros = !scale && !s.input_symmetric;  // a zero point per row
    const OptTensor weight_zero = s.weight_symmetric ? std::nullopt : OptTensor(channel_zero);
    const at::Tensor output = ops::linear_static::call(
        q, row_scale, own_zeros ? OptTensor(row_zero) : zero, packed, channel_scale, weight_zero, float_bias(bias),
        weight.size(0), s.activation, s.output_dtype, std::nullopt, 0, -128, 127, -128, 127);

    const bool relu = s.activation == "relu";
    Variable bits;  // of a static range; a learned one needs the input itself
    if (scale && !input_learns && input.requires_grad())
      bits = ops::in_range::call(input, *scale, zero, s.input_qmin - shift, s.input_qmax - shift, std::nullopt,
                                 std::nullopt);
    ctx->save_for_backward({
        wants_input || wants_weight ? weight : Variable(),
        wants_weight ? q : Variable(),
        wants_weight ? row_scale : Variable(),
        wants_weight && own_zeros ? row_zero : zero.value_or(Variable()),
        channel_scale,
        weight_zero ? Variable(*weight_zero) : Variable(),
        relu ? ops::positive::call(output) : Variable(),
        bits,
        input_learns ? input : Variable(),
        scale.value_or(Variable()),
    });
    // Autograd numbers the tensors that are present.
    int64_t edge = 2;
    const auto number = [&](const char* name, const OptTensor& t) {
      ctx->saved_data[name] = present(t) ? edge++ : int64_t{-1};
    };
    number("bias", bias);
    number("input_scale", input_scale);
    number("input_zero_point", input_zero_point);
    number("input_offset", input_offset);
    number("weight_scale", weight_scale);
    ctx->saved_data["own_zeros"] = own_zeros;
    ctx->saved_data["input_learns"] = input_learns;
    ctx->saved_data["weight_learns"] = weight_learns;
    ctx->saved_data["weight_given"] = present(weight_scale);
    ctx->saved_data["input_qmin"] = s.input_qmin;
    ctx->saved_data["input_qmax"] = s.input_qmax;
    ctx->saved_data["weight_qmin"] = s.weight_qmin;
    ctx->saved_data["weight_qmax"] = s.weight_qmax;
    ctx->saved_data["input_grad_factor"] = s.input_grad_factor;
    ctx->saved_data["weight_grad_factor"] = s.weight_grad_factor;
    ctx->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    ctx->saved_data["bias_dtype"] = static_cast<int64_t>(present(bias) ? bias->scalar_type() : at::kFloat);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), kOp,
                                ": no gradient of the gradient (create_graph=True), the straight-through estimator "
                                "has none; use the float layer (to_float()) for it");
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = ctx->get_saved_variables();
    const Variable &weight = saved[0], &q = saved[1], &row_scale = saved[2], &row_zero = saved[3];
    const Variable &channel_scale = saved[4], &relu_bits = saved[6], &range_bits = saved[7], &input = saved[8];
    const OptTensor weight_zero = optional_of(saved[5]), scale = optional_of(saved[9]);
    const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const auto flag = [&](const char* name) { return ctx->saved_data[name].toBool(); };
    const auto wanted = [&](const char* name) {
      const int64_t edge = number(name);
      return edge >= 0 && ctx->needs_input_grad(static_cast<size_t>(edge));
    };
    const int64_t weight_qmin = number("weight_qmin"), weight_qmax = number("weight_qmax");
    const bool input_learns = flag("input_learns"), weight_learns = flag("weight_learns");
    const bool wants_input = ctx->needs_input_grad(0) || wanted("input_scale") || wanted("input_offset");
    const bool wants_weight = ctx->needs_input_grad(1) || wanted("weight_scale");

    at::Tensor grad = grads[0];
    if (relu_bits.defined()) grad = ops::mask_gradient::call(grad, relu_bits);
    const at::ScalarType dtype = grad.scalar_type();
    const at::Tensor rows = grad.reshape_symint({-1, grad.sym_size(-1)});

    Variable grad_input, grad_weight, grad_bias, grad_input_scale, grad_input_offset, grad_weight_scale;
    if (wanted("bias"))
      grad_bias = as_type(rows.sum(0, false, at::kFloat), static_cast<at::ScalarType>(number("bias_dtype")));
    if (wants_input) {
      if (dtype == at::kFloat && weight.scalar_type() == at::kFloat) {
        grad_input = ops::mm_fake_quantized::call_below_autograd(rows, weight, channel_scale, weight_zero, weight_qmin,
                                                                 weight_qmax);
      } else {
        const at::Tensor w =
            ops::fake_quantize::call(weight, channel_scale, weight_zero, weight_qmin, weight_qmax, 0, std::nullopt);
        grad_input = at::mm(rows, as_type(w, dtype));
      }
      std::vector<c10::SymInt> sizes = grad.sym_sizes().vec();
      sizes.back() = weight.sym_size(1);
      grad_input = grad_input.reshape_symint(sizes);
      const auto input_dtype = static_cast<at::ScalarType>(number("input_dtype"));
      if (input_learns) {
        const OptTensor zero = shift_of(number("input_qmax")) ? std::nullopt : optional_of(row_zero);
        const auto [through, raw_scale, raw_offset] = ops::fake_quantize_learned_backward::call_below_autograd(
            as_type(grad_input, input_dtype), input, *scale, zero, number("input_qmin"), number("input_qmax"),
            std::nullopt, std::nullopt);
        const double factor = ctx->saved_data["input_grad_factor"].toDouble();
        grad_input = through;
        if (wanted("input_scale")) grad_input_scale = raw_scale * factor;
        if (wanted("input_offset")) grad_input_offset = raw_offset * factor;
      } else if (range_bits.defined()) {
        grad_input = ops::mask_gradient::call(grad_input, range_bits);
      }
      grad_input = as_type(grad_input, input_dtype);
    }
    if (wants_weight) {
      const OptTensor zero = flag("own_zeros") ? OptTensor(row_zero) : optional_of(row_zero);
      const at::Tensor flat = q.reshape_symint({-1, q.sym_size(-1)}), scales = row_scale.reshape({-1, 1});
      const bool one_zero = zero && !flag("own_zeros");
      const at::Tensor x = ops::dequantize::call(
          flat, scales, zero ? OptTensor(one_zero ? *zero : zero->reshape({-1, 1})) : std::nullopt, std::nullopt,
          flat.size(-1), dtype);
      grad_weight = at::mm(rows.t(), x);
      if (weight_learns) {
        const auto [through, raw_scale, raw_offset] = ops::fake_quantize_learned_backward::call_below_autograd(
            as_type(grad_weight, weight.scalar_type()), weight, channel_scale, std::nullopt, weight_qmin, weight_qmax,
            0, std::nullopt);
        grad_weight = through;
        grad_weight_scale = raw_scale * ctx->saved_data["weight_grad_factor"].toDouble();
      } else if (flag("weight_given")) {
        grad_weight = ops::mask_gradient::call(
            grad_weight,
            ops::in_range::call(weight, channel_scale, std::nullopt, weight_qmin, weight_qmax, 0, std::nullopt));
      }
      grad_weight = as_type(grad_weight, weight.scalar_type());
    }
    return {grad_input, grad_weight,       grad_bias,         grad_input_scale,
            Variable(), grad_input_offset, grad_weight_scale, Variable()};
  }
};

at::Tensor qat_linear_autograd(const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                               const OptTensor& input_scale, const OptTensor& input_zero_point,
                               const OptTensor& input_offset, int64_t input_qmin, int64_t input_qmax,
                               bool input_symmetric, const OptTensor& weight_scale, int64_t weight_qmin,
                               int64_t weight_qmax, bool weight_symmetric, std::string_view activation,
                               double input_grad_factor, double weight_grad_factor,
                               std::optional<at::ScalarType> output_dtype) {
  if (!follows(kOp, input, weight, bias, input_scale, input_offset, weight_scale))
    return ops::qat_linear::call_below_autograd(input, weight, bias, input_scale, input_zero_point, input_offset,
                                                input_qmin, input_qmax, input_symmetric, weight_scale, weight_qmin,
                                                weight_qmax, weight_symmetric, activation, input_grad_factor,
                                                weight_grad_factor, output_dtype);
  refuse_transforms(kOp);
  const Settings s =
      settings(input_qmin, input_qmax, input_symmetric, weight_qmin, weight_qmax, weight_symmetric, activation,
               input_grad_factor, weight_grad_factor, output_dtype.value_or(input.scalar_type()));
  check(input, weight, bias, input_scale, input_zero_point, input_offset, weight_scale, s);
  return Differentiable<QatLinear>::apply(input, weight, bias, input_scale, input_zero_point, input_offset,
                                          weight_scale, s);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) { ops::qat_linear::implement(m, &qat_linear_autograd); }

}  // namespace
}  // namespace torchquant::qat
