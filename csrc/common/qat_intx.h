// qat_linear_intx without gradients, and what its gradients share with it: the converted layer's own operators, so its
// bits, on every device that has them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "common/checks.h"
#include "common/device.h"
#include "common/intx_arguments.h"
#include "common/tensors.h"
#include "operators.h"

namespace torchquant::qat_intx {

inline constexpr const char* kOp = "qat_linear_intx";

// Everything that is not a tensor.
struct Settings {
  OptInt group_size;
  int64_t weight_qmin, weight_qmax;
  bool weight_symmetric;
  OptInt activation_bits;  // none: activations stay float
  bool activation_symmetric;
  std::string activation;
  double weight_grad_factor;
  at::ScalarType output_dtype;

  int64_t bits() const {  // that hold the weight's integers
    int64_t bits = 2;
    while (weight_qmin < -(int64_t{1} << (bits - 1)) || weight_qmax >= int64_t{1} << (bits - 1)) ++bits;
    return bits;
  }
};

// quantize_pack_intx's arguments.
inline IntxShape check_float_weight(const char* op, const at::Tensor& weight, const char* scale_name,
                                    const OptTensor& scale, int64_t bits, OptInt group_size, int64_t qmin, int64_t qmax,
                                    bool symmetric) {
  check_float(op, "weight", weight);
  check_signed_range(op, qmin, qmax, symmetric && !present(scale));
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must have shape [out_features, in_features], got ",
                    describe(weight));
  const IntxShape shape = intx_shape(op, weight.size(0), weight.size(1), bits, group_size, !symmetric);
  TORCH_CHECK_VALUE(-shape.middle() <= qmin && qmax < shape.middle(), op, ": qmin and qmax must lie within ",
                    -shape.middle(), " .. ", shape.middle() - 1, " for bits = ", bits, ", got ", qmin, " and ", qmax);
  if (!present(scale)) return shape;
  TORCH_CHECK_VALUE(symmetric, op, ": symmetric must be True with ", scale_name,
                    ", got False; given scales have no zero points");
  check_dtype(op, scale_name, *scale, at::kFloat);
  const bool channels = !group_size && scale->dim() == 1 && scale->size(0) == shape.n;
  const bool groups = group_size && scale->dim() == 2 && scale->size(0) == shape.n && scale->size(1) == shape.groups();
  TORCH_CHECK_VALUE(channels || groups, op, ": ", scale_name, " must be float32 [", shape.n,
                    group_size ? ", " + std::to_string(shape.groups()) : "", "], got ", describe(*scale));
  return shape;
}

// [N], or with groups [N, groups].
inline std::vector<int64_t> scale_sizes(const IntxShape& shape) {
  if (shape.group_size == 0) return {shape.n};
  return {shape.n, shape.groups()};
}

inline void check(const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                  const OptTensor& weight_scale, const Settings& s) {
  check_float(kOp, "input", input);
  check_dim(kOp, "input", input, 1);
  check_device(kOp, "weight", weight, input);
  check_device(kOp, "bias", bias, input);
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
  TORCH_CHECK_VALUE(-128 <= s.weight_qmin && s.weight_qmin < s.weight_qmax && s.weight_qmax <= 127, kOp,
                    ": weight_qmin < weight_qmax must lie within -128 .. 127, got ", s.weight_qmin, " and ",
                    s.weight_qmax);
  if (s.activation_bits) check_activation_bits(kOp, *s.activation_bits);
  TORCH_CHECK_VALUE(s.activation == "none" || s.activation == "relu", kOp, ": activation must be none or relu, got '",
                    s.activation, "'");
  TORCH_CHECK_TYPE(is_float_input(s.output_dtype), kOp, ": output_dtype must be float32, bfloat16 or float16, got ",
                   dtype_name(s.output_dtype));
  check_float_weight(kOp, weight, "weight_scale", weight_scale, s.bits(), s.group_size, s.weight_qmin, s.weight_qmax,
                     s.weight_symmetric);
}

// The layer on the packed weight.
template <Library library = Library::kTorchquant>
at::Tensor linear(const at::Tensor& input, const at::Tensor& packed, const OptTensor& bias, int64_t out_features,
                  const Settings& s) {
  const bool has_zero = !s.weight_symmetric;
  if (!s.activation_bits)
    return ops::linear_intx::call<library>(input, packed, bias, out_features, s.bits(), s.group_size, has_zero,
                                           s.activation, s.output_dtype);
  return ops::linear_dynamic_intx::call<library>(input, packed, bias, out_features, s.bits(), s.group_size, has_zero,
                                                 s.activation_symmetric, s.activation, s.output_dtype,
                                                 *s.activation_bits);
}

// library: the one whose operators are called, torchquant with the device's own kernels or torchquant_aten.
template <Library library>
at::Tensor qat_linear_intx_forward(const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                                   const OptTensor& weight_scale, OptInt group_size, int64_t weight_qmin,
                                   int64_t weight_qmax, bool weight_symmetric, OptInt activation_bits,
                                   bool activation_symmetric, std::string_view activation, double weight_grad_factor,
                                   std::optional<at::ScalarType> output_dtype) {
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
  const auto [packed, scale, zero] = ops::quantize_pack_intx::call<library>(
      weight, weight_scale, s.bits(), s.group_size, s.weight_qmin, s.weight_qmax, s.weight_symmetric);
  return linear<library>(input, packed, bias, weight.size(0), s);
}

}  // namespace torchquant::qat_intx
