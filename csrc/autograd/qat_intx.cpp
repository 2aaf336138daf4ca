// qat_linear_intx: the deployed layer of 2 to 8 bits with gradients for its float input and weight.
//
// Forward is quantize_pack_intx and linear_dynamic_intx (float activations: linear_intx): the operators of the converted
// layer, so its bits. Saved for backward are the int8 activations with a scale per row (float activations: the input
// itself) and one bit for each output of a relu. The float weight is a parameter and in memory anyway; its integers are
// computed again.
//
// Backward, with Xq, Wq the values that the integers represent (straight-through estimator, Bengio et al., 2013):
//   g      = grad where output > 0           (relu)
//   grad_x = g Wq
//   grad_w = g^T Xq, where w is in the range of given scales (a range from the group itself: everywhere)
//   learned scales: LSQ (Esser et al., 2020), from grad_w, before the mask.
#include <ATen/autocast_mode.h>

#include <vector>

#include "autograd/bias.h"
#include "autograd/function.h"
#include "common/qat_intx.h"
#include "operators.h"

namespace torchquant::qat_intx {
namespace {

// Tensor::to would hand out the tensor itself, which an operator must not return.
at::Tensor as_type(const at::Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }

struct QatLinearIntx {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight, const OptTensor& bias,
                          const OptTensor& weight_scale, const Settings& s) {
    const bool learns = s.weight_grad_factor > 0 && requires_grad(weight_scale);
    const bool wants_input = input.requires_grad(), wants_weight = weight.requires_grad() || learns;

    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [packed, scale, zero] = ops::quantize_pack_intx::call(weight, weight_scale, s.bits(), s.group_size,
                                                                     s.weight_qmin, s.weight_qmax, s.weight_symmetric);
    const at::Tensor output = linear(input, packed, bias, weight.size(0), s);
    Variable x = wants_weight ? input : Variable(), row_scale, row_zero;
    if (wants_weight && s.activation_bits) {
      const int64_t qmax = (int64_t{1} << (*s.activation_bits - 1)) - 1;
      std::tie(x, row_scale, row_zero) =
          ops::quantize_rows::call(input, std::nullopt, std::nullopt, -qmax - 1, qmax, s.activation_symmetric);
    }
    ctx->save_for_backward({
        wants_input || wants_weight ? weight : Variable(),
        x,
        row_scale,
        s.activation_symmetric ? Variable() : row_zero,
        scale,
        s.weight_symmetric ? Variable() : Variable(zero),
        s.activation == "relu" ? ops::positive::call(output) : Variable(),
    });
    ctx->saved_data["bias_edge"] = int64_t{present(bias) ? 2 : -1};
    ctx->saved_data["bias_dtype"] = dtype_number(bias);
    ctx->saved_data["scale_edge"] = int64_t{present(weight_scale) ? (present(bias) ? 3 : 2) : -1};
    ctx->saved_data["learns"] = learns;
    ctx->saved_data["group_size"] = s.group_size;
    ctx->saved_data["qmin"] = s.weight_qmin;
    ctx->saved_data["qmax"] = s.weight_qmax;
    ctx->saved_data["grad_factor"] = s.weight_grad_factor;
    ctx->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), kOp,
                                ": no gradient of the gradient (create_graph=True), the straight-through estimator "
                                "has none; use the float layer (to_float()) for it");
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = ctx->get_saved_variables();
    const Variable &weight = saved[0], &x = saved[1], &row_scale = saved[2], &scale = saved[4], &relu_bits = saved[6];
    const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const int64_t qmin = number("qmin"), qmax = number("qmax"), scale_edge = number("scale_edge");
    const bool given = scale_edge >= 0;
    const bool wants_scale = given && ctx->needs_input_grad(static_cast<size_t>(scale_edge));
    // Which elements share a scale, as the operators on floats take it.
    const OptInt group_size = ctx->saved_data["group_size"].toOptional<int64_t>();
    const OptInt axis = group_size ? std::nullopt : OptInt(0);

    at::Tensor grad = grads[0];
    if (relu_bits.defined()) grad = ops::mask_gradient::call(grad, relu_bits);
    const at::ScalarType dtype = grad.scalar_type();
    const at::Tensor rows = grad.reshape_symint({-1, grad.sym_size(-1)});

    Variable grad_input, grad_weight, grad_bias, grad_scale;
    if (bias_wants_gradient(ctx)) grad_bias = bias_gradient(ctx, grad);
    if (ctx->needs_input_grad(0)) {
      const OptTensor zero = saved[5].defined() ? OptTensor(saved[5].to(at::kInt)) : std::nullopt;
      const at::Tensor w = ops::fake_quantize::call(weight, scale, zero, qmin, qmax, axis, group_size);
      std::vector<c10::SymInt> sizes = grad.sym_sizes().vec();
      sizes.back() = weight.sym_size(1);
      grad_input = as_type(at::mm(rows, as_type(w, dtype)).reshape_symint(sizes),
                           static_cast<at::ScalarType>(number("input_dtype")));
    }
    if (ctx->needs_input_grad(1) || wants_scale) {
      at::Tensor values = x.reshape_symint({-1, x.sym_size(-1)});
      if (row_scale.defined()) {
        const OptTensor zero = saved[3].defined() ? OptTensor(saved[3].reshape({-1, 1})) : std::nullopt;
        values = ops::dequantize::call(values, row_scale.reshape({-1, 1}), zero, std::nullopt, values.size(-1), dtype);
      }
      grad_weight = at::mm(rows.t(), as_type(values, dtype));
      if (ctx->saved_data["learns"].toBool()) {
        const auto [through, raw_scale, raw_offset] = ops::fake_quantize_learned_backward::call_below_autograd(
            as_type(grad_weight, weight.scalar_type()), weight, scale, std::nullopt, qmin, qmax, axis, group_size);
        grad_weight = through;
        grad_scale = raw_scale * ctx->saved_data["grad_factor"].toDouble();
      } else if (given) {
        grad_weight = ops::mask_gradient::call(
            grad_weight, ops::in_range::call(weight, scale, std::nullopt, qmin, qmax, axis, group_size));
      }
      grad_weight = as_type(grad_weight, weight.scalar_type());
    }
    return {grad_input, grad_weight, grad_bias, grad_scale, Variable()};
  }
};

at::Tensor qat_linear_intx_autograd(const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                                    const OptTensor& weight_scale, OptInt group_size, int64_t weight_qmin,
                                    int64_t weight_qmax, bool weight_symmetric, OptInt activation_bits,
                                    bool activation_symmetric, std::string_view activation, double weight_grad_factor,
                                    std::optional<at::ScalarType> output_dtype) {
  if (!follows(kOp, input, weight, bias, weight_scale))
    return ops::qat_linear_intx::call_below_autograd(
        input, weight, bias, weight_scale, group_size, weight_qmin, weight_qmax, weight_symmetric, activation_bits,
        activation_symmetric, activation, weight_grad_factor, output_dtype);
  refuse_transforms(kOp);
  const Settings s{group_size,
                   weight_qmin,
                   weight_qmax,
                   weight_symmetric,
                   activation_bits,
                   activation_symmetric,
                   std::string(activation),
                   weight_grad_factor,
                   output_dtype.value_or(input.scalar_type())};
  check(input, weight, bias, weight_scale, s);
  return Differentiable<QatLinearIntx>::apply(input, weight, bias, weight_scale, s);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) { ops::qat_linear_intx::implement(m, &qat_linear_intx_autograd); }

}  // namespace
}  // namespace torchquant::qat_intx
