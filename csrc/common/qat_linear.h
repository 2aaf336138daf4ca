// qat_linear without gradients, and what its gradients share with it: the converted layer's own operators, so its bits,
// on every device that has them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "common/checks.h"
#include "common/device.h"
#include "common/tensors.h"
#include "operators.h"

namespace torchquant::qat {

inline constexpr const char* kOp = "qat_linear";

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

// Between two training steps a learned step may become too small, which must not raise in the next one.
inline at::Tensor usable_scale(const at::Tensor& scale) { return scale.detach().clamp_min(kLeastScale); }

// Unsigned integers beyond int8, 0 .. 255, are stored 128 lower: the differences to the zero point are the same.
inline int64_t shift_of(int64_t qmax) { return qmax > 127 ? 128 : 0; }

// Static activations' scale and zero point: as given, or from a learned offset in real units.
struct InputParams {
  OptTensor scale, zero;
};
inline InputParams input_params(const OptTensor& scale, const OptTensor& zero_point, const OptTensor& offset,
                                int64_t qmin, int64_t qmax) {
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
inline at::Tensor as_type(const at::Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

inline void check(const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                  const OptTensor& input_scale, const OptTensor& input_zero_point, const OptTensor& input_offset,
                  const OptTensor& weight_scale, const Settings& s) {
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

inline int64_t bits_of(int64_t qmax) {  // 127 -> 8
  int64_t bits = 1;
  for (; qmax > 0; qmax >>= 1) ++bits;
  return bits;
}

inline OptTensor float_bias(const OptTensor& bias) {
  return present(bias) ? OptTensor(as_type(*bias, at::kFloat)) : std::nullopt;
}

inline Settings settings(int64_t input_qmin, int64_t input_qmax, bool input_symmetric, int64_t weight_qmin,
                         int64_t weight_qmax, bool weight_symmetric, std::string_view activation,
                         double input_grad_factor, double weight_grad_factor, at::ScalarType output_dtype) {
  return {input_qmin,         input_qmax,       input_symmetric,         weight_qmin,
          weight_qmax,        weight_symmetric, std::string(activation), input_grad_factor,
          weight_grad_factor, output_dtype};
}

// library: the one whose operators are called, torchquant with the device's own kernels or torchquant_aten.
template <Library library>
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
  const auto [packed, channel_scale, channel_zero] =
      ops::quantize_pack::call<library>(weight, weight_scale, s.weight_qmin, s.weight_qmax, s.weight_symmetric);
  const OptTensor weight_zero = s.weight_symmetric ? std::nullopt : OptTensor(channel_zero);
  const int64_t n = weight.size(0);
  if (!present(input_scale))
    return ops::linear_dynamic::call<library>(input, packed, channel_scale, weight_zero, float_bias(bias), n,
                                              s.input_symmetric, s.activation, s.output_dtype, bits_of(s.input_qmax));
  const auto [scale, zero] = input_params(input_scale, input_zero_point, input_offset, s.input_qmin, s.input_qmax);
  return ops::linear_static::call<library>(
      input, *scale, zero, packed, channel_scale, weight_zero, float_bias(bias), n, s.activation, s.output_dtype,
      std::nullopt, 0, -128, 127, s.input_qmin - shift_of(s.input_qmax), s.input_qmax - shift_of(s.input_qmax));
}

}  // namespace torchquant::qat
