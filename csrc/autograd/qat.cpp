// qat_linear: the deployed integer layer with gradients for its float input and weight.
//
// Forward is quantize_pack, quantize_rows and linear_static: the operators of the converted layer, so its bits. Saved
// for backward are the int8 activations with a scale per row and one bit per element where a gradient stops (relu's
// output, values beyond a static range). The float weight is a parameter and there anyway; its integers are computed
// again, which costs one pass over it, a hundredth of the products that follow. A float input is saved only where its
// step is learned, whose gradient depends on the values before rounding.
//
// Backward, with Xq, Wq the values that the integers stand for (straight-through estimator, Bengio et al., 2013):
//   g      = grad where output > 0           (relu)
//   grad_x = g Wq, where x lies in its range (dynamic: everywhere)
//   grad_w = g^T Xq, where w lies in its range (a range from the channel itself: everywhere)
//   learned scales: LSQ (Esser et al., 2020), from grad_x and grad_w.
#include "autograd/qat.h"

#include <ATen/autocast_mode.h>

#include <tuple>

#include "common/checks.h"
#include "common/device.h"
#include "autograd/function.h"

namespace torchquant {
namespace {

using Quantized = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "qat_linear";

bool learns(const OptTensor& t) { return present(t) && t->requires_grad(); }
template <class Signature>
auto operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Quantized quantize_rows(const at::Tensor& x, const OptTensor& scale, const OptTensor& zero, int64_t qmin, int64_t qmax,
                        bool symmetric) {
  static auto op =
      operator_of<Quantized(const at::Tensor&, const OptTensor&, const OptTensor&, int64_t, int64_t, bool)>(
          "torchquant::quantize_rows");
  return op.call(x, scale, zero, qmin, qmax, symmetric);
}

using PackSignature = Quantized(const at::Tensor&, const OptTensor&, const OptTensor&, int64_t, int64_t, bool);
using DynamicSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptTensor&,
                                    const OptTensor&, int64_t, bool, std::string_view, std::optional<at::ScalarType>,
                                    int64_t);
using StaticSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptTensor&, const at::Tensor&,
                                   const at::Tensor&, const OptTensor&, const OptTensor&, int64_t, std::string_view,
                                   at::ScalarType, const OptTensor&, int64_t, int64_t, int64_t, int64_t, int64_t);

// The operators of the converted layer.
struct Layer {
  c10::TypedOperatorHandle<PackSignature> pack;
  c10::TypedOperatorHandle<DynamicSignature> dynamic;
  c10::TypedOperatorHandle<StaticSignature> fixed;

  explicit Layer(const std::string& library)
      : pack(operator_of<PackSignature>((library + "::quantize_pack").c_str())),
        dynamic(operator_of<DynamicSignature>((library + "::linear_dynamic").c_str())),
        fixed(operator_of<StaticSignature>((library + "::linear_static").c_str())) {}

  Quantized quantize_pack(const at::Tensor& w, const OptTensor& scale, int64_t qmin, int64_t qmax,
                          bool symmetric) const {
    return pack.call(w, scale, std::nullopt, qmin, qmax, symmetric);
  }

  at::Tensor linear_dynamic(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                            const OptTensor& weight_zero, const OptTensor& bias, int64_t n, bool symmetric,
                            std::string_view activation, at::ScalarType dtype, int64_t bits) const {
    return dynamic.call(x, packed, weight_scale, weight_zero, bias, n, symmetric, activation, dtype, bits);
  }

  at::Tensor linear_static(const at::Tensor& x, const at::Tensor& scale, const OptTensor& zero,
                           const at::Tensor& packed, const at::Tensor& weight_scale, const OptTensor& weight_zero,
                           const OptTensor& bias, int64_t n, std::string_view activation, at::ScalarType dtype,
                           int64_t qmin = -128, int64_t qmax = 127) const {
    return fixed.call(x, scale, zero, packed, weight_scale, weight_zero, bias, n, activation, dtype, std::nullopt, 0,
                      -128, 127, qmin, qmax);
  }
};

template <OperatorsOf library>
const Layer& layer_of() {
  static const Layer layer(library == OperatorsOf::kTorchquant ? "torchquant" : "torchquant_aten");
  return layer;
}

at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const OptTensor& zero, int64_t qmin,
                         int64_t qmax, std::optional<int64_t> axis) {
  static auto op = operator_of<at::Tensor(const at::Tensor&, const at::Tensor&, const OptTensor&, int64_t, int64_t,
                                          std::optional<int64_t>, std::optional<int64_t>)>("torchquant::fake_quantize");
  return op.call(x, scale, zero, qmin, qmax, axis, std::nullopt);
}

at::Tensor in_range(const at::Tensor& x, const at::Tensor& scale, const OptTensor& zero, int64_t qmin, int64_t qmax,
                    std::optional<int64_t> axis) {
  static auto op = operator_of<at::Tensor(const at::Tensor&, const at::Tensor&, const OptTensor&, int64_t, int64_t,
                                          std::optional<int64_t>, std::optional<int64_t>)>("torchquant::in_range");
  return op.call(x, scale, zero, qmin, qmax, axis, std::nullopt);
}

at::Tensor positive_bits(const at::Tensor& x) {
  static auto op = operator_of<at::Tensor(const at::Tensor&)>("torchquant::positive");
  return op.call(x);
}

at::Tensor mask_gradient(const at::Tensor& grad, const at::Tensor& bits) {
  static auto op = operator_of<at::Tensor(const at::Tensor&, const at::Tensor&)>("torchquant::mask_gradient");
  return op.call(grad, bits);
}

at::Tensor dequantize(const at::Tensor& q, const at::Tensor& scale, const OptTensor& zero, std::optional<int64_t> axis,
                      std::optional<int64_t> group_size, at::ScalarType dtype) {
  static auto op =
      operator_of<at::Tensor(const at::Tensor&, const at::Tensor&, const OptTensor&, std::optional<int64_t>,
                             std::optional<int64_t>, at::ScalarType)>("torchquant::dequantize");
  return op.call(q, scale, zero, axis, group_size, dtype);
}

Quantized learned_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const OptTensor& zero,
                           int64_t qmin, int64_t qmax, std::optional<int64_t> axis) {
  static auto op = operator_of<Quantized(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptTensor&,
                                         int64_t, int64_t, std::optional<int64_t>, std::optional<int64_t>)>(
      "torchquant::fake_quantize_learned_backward");
  return op.call(grad, x, scale, zero, qmin, qmax, axis, std::nullopt);
}

at::Tensor mm_fake_quantized(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& scale,
                             const OptTensor& zero, int64_t qmin, int64_t qmax) {
  static auto op = operator_of<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptTensor&,
                                          int64_t, int64_t)>("torchquant::mm_fake_quantized");
  return op.call(grad, weight, scale, zero, qmin, qmax);
}

// Everything that is not a tensor.
struct Settings {
  int64_t input_qmin, input_qmax;
  bool input_symmetric;
  int64_t weight_qmin, weight_qmax;
  bool weight_symmetric;
  std::string activation;
  double input_grad_factor, weight_grad_factor;
  at::ScalarType output_dtype;
};

// A learned step may end up too small between two training steps; never an error inside one.
at::Tensor usable_scale(const at::Tensor& scale) { return scale.detach().clamp_min(kLeastScale); }

// Unsigned integers beyond int8, 0 .. 255, are stored 128 lower: the differences to the zero point are the same.
int64_t shift_of(int64_t qmax) { return qmax > 127 ? 128 : 0; }

// Static activations' scale and zero point: as given, or from a learned offset in real units.
struct InputParams {
  OptTensor scale, zero;
};
InputParams input_params(const OptTensor& scale, const OptTensor& zero_point, const OptTensor& offset, int64_t qmin,
                         int64_t qmax) {
  if (!present(scale)) return {};
  const at::Tensor usable = usable_scale(*scale);
  if (present(zero_point)) return {usable, zero_point->clone()};  // an observer may change its own before backward
  if (!present(offset)) {
    if (shift_of(qmax) == 0) return {usable, std::nullopt};
    return {usable, at::full({1}, -shift_of(qmax), usable.options().dtype(at::kInt))};
  }
  const at::Tensor beta = offset->detach();
  const at::Tensor zero = (-beta / usable).round().nan_to_num(0.0).clamp(qmin, qmax).to(at::kInt);
  return {at::where(beta.isnan(), beta, usable), zero};  // an integer cannot hold NaN
}

// Tensor::to would hand out the tensor itself, which an operator must not return.
at::Tensor as_type(const at::Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }

void check(const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias, const OptTensor& input_scale,
           const OptTensor& input_zero_point, const OptTensor& input_offset, const OptTensor& weight_scale,
           const Settings& s) {
  check_float(kOp, "input", input);
  check_dim(kOp, "input", input, 1);
  check_device(kOp, "weight", weight, input);
  check_device(kOp, "bias", bias, input);
  check_device(kOp, "input_scale", input_scale, input);
  check_device(kOp, "input_zero_point", input_zero_point, input);
  check_device(kOp, "input_offset", input_offset, input);
  check_device(kOp, "weight_scale", weight_scale, input);
  check_float(kOp, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 2, kOp, ": weight must have shape [out_features, in_features], got ",
                    describe(weight));
  TORCH_CHECK_VALUE(input.sym_size(-1) == weight.sym_size(1), kOp, ": input must be [..., in_features] with ",
                    "in_features = ", weight.sym_size(1), ", got ", input.sym_sizes());
  if (present(bias)) {
    check_float(kOp, "bias", *bias);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), kOp, ": bias must have shape [",
                      weight.sym_size(0), "], got ", bias->sym_sizes());
  }
  TORCH_CHECK_VALUE(present(input_scale) || !(present(input_zero_point) || present(input_offset)), kOp,
                    ": input_zero_point and input_offset must be None without input_scale: dynamic activations find "
                    "their own; pass input_scale for static ones");
  TORCH_CHECK_VALUE(s.activation == "none" || s.activation == "relu", kOp, ": activation must be none or relu, got '",
                    s.activation, "'");
  TORCH_CHECK_TYPE(is_float_input(s.output_dtype), kOp, ": output_dtype must be float32, bfloat16 or float16, got ",
                   dtype_name(s.output_dtype));
  TORCH_CHECK_VALUE(s.weight_symmetric || !present(weight_scale), kOp,
                    ": weight_symmetric must be True with weight_scale, got False");
  const int64_t bits_max = s.input_qmax;
  const bool dynamic_range = (bits_max & (bits_max + 1)) == 0 && bits_max >= 1 && bits_max <= 127;
  TORCH_CHECK_VALUE(present(input_scale) || dynamic_range, kOp,
                    ": input_qmax must be 2^(bits - 1) - 1 for dynamic activations, got ", bits_max);
  const bool fixed_zero = present(input_zero_point), moves = present(input_offset) || s.input_grad_factor > 0;
  TORCH_CHECK_VALUE(!(fixed_zero && moves), kOp,
                    ": input_zero_point must be None with input_offset or input_grad_factor, which decide on it; "
                    "pass an offset, or a range that needs no zero point");
  const bool is_unsigned = s.input_qmin == 0 && 1 <= s.input_qmax && s.input_qmax <= 255;
  TORCH_CHECK_VALUE(s.input_qmax <= 127 || (is_unsigned && !fixed_zero && !present(input_offset)), kOp,
                    ": input_qmin and input_qmax must lie within -128 .. 127, or be 0 and at most 255 without zero "
                    "point and offset, got ",
                    s.input_qmin, " and ", s.input_qmax);
}

int64_t bits_of(int64_t qmax) {  // 127 -> 8
  int64_t bits = 1;
  for (; qmax > 0; qmax >>= 1) ++bits;
  return bits;
}

OptTensor float_bias(const OptTensor& bias) {
  return present(bias) ? OptTensor(as_type(*bias, at::kFloat)) : std::nullopt;
}

struct QatLinear : public torch::autograd::Function<QatLinear> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight, const OptTensor& bias,
                          const OptTensor& input_scale, const OptTensor& input_zero_point,
                          const OptTensor& input_offset, const OptTensor& weight_scale, const Settings& s) {
    const bool input_learns = s.input_grad_factor > 0 && (learns(input_scale) || learns(input_offset));
    const bool weight_learns = s.weight_grad_factor > 0 && learns(weight_scale);
    const bool wants_input = input.requires_grad() || input_learns;
    const bool wants_weight = weight.requires_grad() || weight_learns;

    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [scale, zero] = input_params(input_scale, input_zero_point, input_offset, s.input_qmin, s.input_qmax);
    const Layer& layer = layer_of<OperatorsOf::kTorchquant>();
    const auto [packed, channel_scale, channel_zero] =
        layer.quantize_pack(weight, weight_scale, s.weight_qmin, s.weight_qmax, s.weight_symmetric);
    const int64_t shift = shift_of(s.input_qmax);
    const auto [q, row_scale, row_zero] =
        quantize_rows(input, scale, zero, s.input_qmin - shift, s.input_qmax - shift, s.input_symmetric);
    const bool own_zeros = !scale && !s.input_symmetric;  // a zero point per row
    const OptTensor weight_zero = s.weight_symmetric ? std::nullopt : OptTensor(channel_zero);
    const at::Tensor output =
        layer.linear_static(q, row_scale, own_zeros ? OptTensor(row_zero) : zero, packed, channel_scale, weight_zero,
                            float_bias(bias), weight.size(0), s.activation, s.output_dtype);

    const bool relu = s.activation == "relu";
    Variable bits;  // of a static range; a learned one needs the input itself
    if (scale && !input_learns && input.requires_grad())
      bits = in_range(input, *scale, zero, s.input_qmin - shift, s.input_qmax - shift, std::nullopt);
    ctx->save_for_backward({
        wants_input || wants_weight ? weight : Variable(),
        wants_weight ? q : Variable(),
        wants_weight ? row_scale : Variable(),
        wants_weight && own_zeros ? row_zero : zero.value_or(Variable()),
        channel_scale,
        weight_zero ? Variable(*weight_zero) : Variable(),
        relu ? positive_bits(output) : Variable(),
        bits,
        input_learns ? input : Variable(),
        scale.value_or(Variable()),
    });
    // Autograd numbers the tensor arguments that are there.
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
    if (relu_bits.defined()) grad = mask_gradient(grad, relu_bits);
    const at::ScalarType dtype = grad.scalar_type();
    const at::Tensor rows = grad.reshape_symint({-1, grad.sym_size(-1)});

    Variable grad_input, grad_weight, grad_bias, grad_input_scale, grad_input_offset, grad_weight_scale;
    if (wanted("bias"))
      grad_bias = as_type(rows.sum(0, false, at::kFloat), static_cast<at::ScalarType>(number("bias_dtype")));
    if (wants_input) {
      if (dtype == at::kFloat && weight.scalar_type() == at::kFloat) {
        grad_input = mm_fake_quantized(rows, weight, channel_scale, weight_zero, weight_qmin, weight_qmax);
      } else {
        const at::Tensor w = fake_quantize(weight, channel_scale, weight_zero, weight_qmin, weight_qmax, 0);
        grad_input = at::mm(rows, as_type(w, dtype));
      }
      std::vector<c10::SymInt> sizes = grad.sym_sizes().vec();
      sizes.back() = weight.sym_size(1);
      grad_input = grad_input.reshape_symint(sizes);
      const auto input_dtype = static_cast<at::ScalarType>(number("input_dtype"));
      if (input_learns) {
        const OptTensor zero = shift_of(number("input_qmax")) ? std::nullopt : optional_of(row_zero);
        const auto [through, raw_scale, raw_offset] =
            learned_backward(as_type(grad_input, input_dtype), input, *scale, zero, number("input_qmin"),
                             number("input_qmax"), std::nullopt);
        const double factor = ctx->saved_data["input_grad_factor"].toDouble();
        grad_input = through;
        if (wanted("input_scale")) grad_input_scale = raw_scale * factor;
        if (wanted("input_offset")) grad_input_offset = raw_offset * factor;
      } else if (range_bits.defined()) {
        grad_input = mask_gradient(grad_input, range_bits);
      }
      grad_input = as_type(grad_input, input_dtype);
    }
    if (wants_weight) {
      const OptTensor zero = flag("own_zeros") ? OptTensor(row_zero) : optional_of(row_zero);
      const at::Tensor flat = q.reshape_symint({-1, q.sym_size(-1)}), scales = row_scale.reshape({-1, 1});
      const bool one_zero = zero && !flag("own_zeros");
      const at::Tensor x =
          dequantize(flat, scales, zero ? OptTensor(one_zero ? *zero : zero->reshape({-1, 1})) : std::nullopt,
                     std::nullopt, flat.size(-1), dtype);
      grad_weight = at::mm(rows.t(), x);
      if (weight_learns) {
        const auto [through, raw_scale, raw_offset] =
            learned_backward(as_type(grad_weight, weight.scalar_type()), weight, channel_scale, std::nullopt,
                             weight_qmin, weight_qmax, 0);
        grad_weight = through;
        grad_weight_scale = raw_scale * ctx->saved_data["weight_grad_factor"].toDouble();
      } else if (flag("weight_given")) {
        grad_weight =
            mask_gradient(grad_weight, in_range(weight, channel_scale, std::nullopt, weight_qmin, weight_qmax, 0));
      }
      grad_weight = as_type(grad_weight, weight.scalar_type());
    }
    return {grad_input, grad_weight,       grad_bias,         grad_input_scale,
            Variable(), grad_input_offset, grad_weight_scale, Variable()};
  }
};

Settings settings(int64_t input_qmin, int64_t input_qmax, bool input_symmetric, int64_t weight_qmin,
                  int64_t weight_qmax, bool weight_symmetric, std::string_view activation, double input_grad_factor,
                  double weight_grad_factor, at::ScalarType output_dtype) {
  return {input_qmin,         input_qmax,       input_symmetric,         weight_qmin,
          weight_qmax,        weight_symmetric, std::string(activation), input_grad_factor,
          weight_grad_factor, output_dtype};
}

at::Tensor qat_linear_autograd(const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                               const OptTensor& input_scale, const OptTensor& input_zero_point,
                               const OptTensor& input_offset, int64_t input_qmin, int64_t input_qmax,
                               bool input_symmetric, const OptTensor& weight_scale, int64_t weight_qmin,
                               int64_t weight_qmax, bool weight_symmetric, std::string_view activation,
                               double input_grad_factor, double weight_grad_factor,
                               std::optional<at::ScalarType> output_dtype) {
  const bool any = follows(input) || follows(weight) || follows(bias) || follows(input_scale) ||
                   follows(input_offset) || follows(weight_scale);
  if (!any) {
    static auto op =
        operator_of<at::Tensor(const at::Tensor&, const at::Tensor&, const OptTensor&, const OptTensor&,
                               const OptTensor&, const OptTensor&, int64_t, int64_t, bool, const OptTensor&, int64_t,
                               int64_t, bool, std::string_view, double, double, std::optional<at::ScalarType>)>(
            "torchquant::qat_linear");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(input, weight, bias, input_scale, input_zero_point, input_offset, input_qmin, input_qmax,
                   input_symmetric, weight_scale, weight_qmin, weight_qmax, weight_symmetric, activation,
                   input_grad_factor, weight_grad_factor, output_dtype);
  }
  const Settings s =
      settings(input_qmin, input_qmax, input_symmetric, weight_qmin, weight_qmax, weight_symmetric, activation,
               input_grad_factor, weight_grad_factor, output_dtype.value_or(input.scalar_type()));
  check(input, weight, bias, input_scale, input_zero_point, input_offset, weight_scale, s);
  return QatLinear::apply(input, weight, bias, input_scale, input_zero_point, input_offset, weight_scale, s);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) { m.impl("qat_linear", &qat_linear_autograd); }

}  // namespace

template <OperatorsOf library>
at::Tensor qat_linear_forward(const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                              const OptTensor& input_scale, const OptTensor& input_zero_point,
                              const OptTensor& input_offset, int64_t input_qmin, int64_t input_qmax,
                              bool input_symmetric, const OptTensor& weight_scale, int64_t weight_qmin,
                              int64_t weight_qmax, bool weight_symmetric, std::string_view activation,
                              double input_grad_factor, double weight_grad_factor,
                              std::optional<at::ScalarType> output_dtype) {
  const Settings s =
      settings(input_qmin, input_qmax, input_symmetric, weight_qmin, weight_qmax, weight_symmetric, activation,
               input_grad_factor, weight_grad_factor, output_dtype.value_or(input.scalar_type()));
  check(input, weight, bias, input_scale, input_zero_point, input_offset, weight_scale, s);
  const Layer& layer = layer_of<library>();
  const auto [packed, channel_scale, channel_zero] =
      layer.quantize_pack(weight, weight_scale, s.weight_qmin, s.weight_qmax, s.weight_symmetric);
  const OptTensor weight_zero = s.weight_symmetric ? std::nullopt : OptTensor(channel_zero);
  const int64_t n = weight.size(0);
  if (!present(input_scale))
    return layer.linear_dynamic(input, packed, channel_scale, weight_zero, float_bias(bias), n, s.input_symmetric,
                                s.activation, s.output_dtype, bits_of(s.input_qmax));
  const auto [scale, zero] = input_params(input_scale, input_zero_point, input_offset, s.input_qmin, s.input_qmax);
  return layer.linear_static(input, *scale, zero, packed, channel_scale, weight_zero, float_bias(bias), n, s.activation,
                             s.output_dtype, s.input_qmin - shift_of(s.input_qmax),
                             s.input_qmax - shift_of(s.input_qmax));
}

template at::Tensor qat_linear_forward<OperatorsOf::kTorchquant>(const at::Tensor&, const at::Tensor&, const OptTensor&,
                                                                 const OptTensor&, const OptTensor&, const OptTensor&,
                                                                 int64_t, int64_t, bool, const OptTensor&, int64_t,
                                                                 int64_t, bool, std::string_view, double, double,
                                                                 std::optional<at::ScalarType>);
template at::Tensor qat_linear_forward<OperatorsOf::kTorchquantAten>(const at::Tensor&, const at::Tensor&,
                                                                     const OptTensor&, const OptTensor&,
                                                                     const OptTensor&, const OptTensor&, int64_t,
                                                                     int64_t, bool, const OptTensor&, int64_t, int64_t,
                                                                     bool, std::string_view, double, double,
                                                                     std::optional<at::ScalarType>);

}  // namespace torchquant
