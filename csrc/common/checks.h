// The checks that operators share, in one wording: "op: argument must be ..., got ...; remedy".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <sstream>
#include <string>
#include <string_view>

#include "kernels/kernel_table.h"
#include "formats/packed_weight.h"

namespace torchquant {

inline constexpr float kLeastScale = 0x1p-126f;    // the least normal number
constexpr int64_t kMaxSplitN = int64_t{1} << 40;   // a member's outputs: their sum cannot overflow
constexpr int64_t kMaxN = (int64_t{1} << 31) - 1;  // the tiles keep N in 32 bits (int8_tiles.h)

inline std::string dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kChar: return "int8";
    case at::kByte: return "uint8";
    case at::kShort: return "int16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kBool: return "bool";
    default: return c10::toString(type);
  }
}

inline std::string describe(const at::Tensor& t) {  // "int8 [4, 8]"
  std::ostringstream out;
  out << dtype_name(t.scalar_type()) << " [";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

inline bool is_float_input(at::ScalarType t) { return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf; }

inline FloatType float_type(at::ScalarType t) {
  return t == at::kFloat ? FloatType::kF32 : (t == at::kBFloat16 ? FloatType::kBF16 : FloatType::kF16);
}

inline void check_float(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(is_float_input(t.scalar_type()), op, ": ", name, " must be float32, bfloat16 or float16, got ",
                   describe(t), "; convert it with .to(torch.float32)");
}

inline void check_byte(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kChar || t.scalar_type() == at::kByte, op, ": ", name,
                   " must be int8 or uint8, got ", describe(t), "; quantize it first (torchquant.ops.quantize)");
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& t, at::ScalarType want) {
  TORCH_CHECK_TYPE(t.scalar_type() == want, op, ": ", name, " must be ", dtype_name(want), ", got ", describe(t),
                   "; convert it with .to(torch.", dtype_name(want), ")");
}

inline void check_float_type(const char* op, const char* name, at::ScalarType type) {
  TORCH_CHECK_TYPE(is_float_input(type), op, ": ", name, " must be float32, bfloat16 or float16, got ",
                   dtype_name(type));
}

inline void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t at_least) {
  TORCH_CHECK_VALUE(t.dim() >= at_least, op, ": ", name, " must have at least ", at_least, " dimension",
                    at_least == 1 ? "" : "s", ", got ", describe(t));
}

// A per-channel argument of n values (or, where `broadcast`, one value).
inline void check_channels(const char* op, const char* name, const at::Tensor& t, at::ScalarType want, int64_t n,
                           bool broadcast) {
  check_dtype(op, name, t, want);
  const auto size_is = [&](int64_t want) { return t.sym_size(0) == want; };  // also while sizes are traced as symbols
  const bool shape_ok = t.dim() == 1 ? size_is(n) || (broadcast && size_is(1)) : broadcast && t.dim() == 0;
  TORCH_CHECK_VALUE(shape_ok, op, ": ", name, " must be ", dtype_name(want), " [", n, "]",
                    broadcast && n != 1 ? " or [1]" : "", " with one value per output channel, got ", describe(t));
}

// Zero points outside the range of the integers that they belong to would let the 32-bit sums wrap.
inline void check_zero_points(const char* op, const char* name, const int32_t* values, int64_t count, int64_t least,
                              int64_t most) {
  int32_t lowest = values[0], highest = values[0];
  for (int64_t i = 1; i < count; ++i) {
    lowest = values[i] < lowest ? values[i] : lowest;
    highest = values[i] > highest ? values[i] : highest;
  }
  TORCH_CHECK_VALUE(least <= lowest && highest <= most, op, ": ", name, " must be from ", least, " to ", most, ", got ",
                    lowest < least ? lowest : highest);
}

// The range of quantize's integers.
inline void check_byte_range(const char* op, at::ScalarType dtype, int64_t qmin, int64_t qmax) {
  TORCH_CHECK_TYPE(dtype == at::kChar || dtype == at::kByte, op, ": dtype must be int8 or uint8, got ",
                   dtype_name(dtype));
  const int64_t least = dtype == at::kChar ? -128 : 0, most = dtype == at::kChar ? 127 : 255;
  TORCH_CHECK_VALUE(least <= qmin && qmin < qmax && qmax <= most, op, ": qmin < qmax must lie within ", least, " .. ",
                    most, " for ", dtype_name(dtype), ", got ", qmin, " and ", qmax);
}

// A range with a positive end, which symmetric quantization needs. own_symmetric: scales come from the data and there is
// no zero point, so the integers reach down to -qmax.
inline void check_signed_range(const char* op, int64_t qmin, int64_t qmax, bool own_symmetric = false) {
  TORCH_CHECK_VALUE(-128 <= qmin && qmin < qmax && qmax <= 127 && qmin <= 0 && qmax >= 1, op,
                    ": qmin <= 0 < qmax must lie within -128 .. 127, got ", qmin, " and ", qmax);
  TORCH_CHECK_VALUE(!own_symmetric || qmin <= -qmax, op, ": qmin must be at most -qmax = ", -qmax,
                    " with symmetric=True and no scale, got ", qmin, "; pass symmetric=False for a range like this");
}

// NaN passes: results computed with it are NaN and stay visible.
inline void check_scale(const char* op, const char* name, float scale) {
  TORCH_CHECK_VALUE(!(scale < kLeastScale || scale > 0x1.fffffep127f), op, ": ", name,
                    " must be finite and at least 2^-126, got ", scale);
}

// pack_weight's argument.
inline void check_weight(const char* op, const at::Tensor& weight) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kChar, op, ": weight must be int8 [out_features, in_features], got ",
                   describe(weight), "; quantize it first (torchquant.ops.quantize)");
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must be int8 [out_features, in_features], got ", describe(weight));
  const int64_t n = weight.size(0), k = weight.size(1);
  TORCH_CHECK_VALUE(n >= 1 && k >= 1 && k <= kMaxK, op, ": weight must have at least one output and between 1 and ",
                    kMaxK, " inputs, got ", describe(weight));
  TORCH_CHECK_VALUE(n <= kMaxN, op, ": weight must have at most ", kMaxN, " outputs, got ", describe(weight));
}

// quantize_pack's arguments.
inline void check_float_weight(const char* op, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                               int64_t qmin, int64_t qmax, bool symmetric) {
  check_float(op, "weight", weight);
  check_signed_range(op, qmin, qmax, symmetric && !(scale && scale->defined()));
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must have shape [out_features, in_features], got ",
                    describe(weight));
  const int64_t n = weight.size(0), k = weight.size(1);
  TORCH_CHECK_VALUE(n >= 1 && k >= 1 && k <= kMaxK, op, ": weight must have at least one output and between 1 and ",
                    kMaxK, " inputs, got ", describe(weight));
  if (scale && scale->defined()) check_channels(op, "scale", *scale, at::kFloat, n, true);
}

// mm_fake_quantized's arguments.
inline void check_mm_fake_quantized(const char* op, const at::Tensor& grad, const at::Tensor& weight,
                                    const at::Tensor& scale, const std::optional<at::Tensor>& zero_point, int64_t qmin,
                                    int64_t qmax) {
  check_dtype(op, "grad", grad, at::kFloat);
  check_dtype(op, "weight", weight, at::kFloat);
  check_signed_range(op, qmin, qmax);
  TORCH_CHECK_VALUE(weight.dim() == 2 && grad.dim() == 2 && grad.size(1) == weight.size(0), op,
                    ": grad must have shape [M, N] and weight [N, K], got ", describe(grad), " and ", describe(weight));
  check_channels(op, "scale", scale, at::kFloat, weight.size(0), true);
  if (zero_point && zero_point->defined())
    check_channels(op, "zero_point", *zero_point, at::kInt, weight.size(0), true);
}

inline void check_features(const char* op, const at::Tensor& packed, int64_t n, int64_t k) {
  TORCH_CHECK_VALUE(k >= 1 && k <= kMaxK, op, ": in_features must be between 1 and ", kMaxK, ", got ", k);
  TORCH_CHECK_VALUE(n >= 1, op, ": out_features must be at least 1, got ", n);
  TORCH_CHECK_VALUE(n <= kMaxN, op, ": out_features must be at most ", kMaxN, ", got ", n);
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kChar, op, ": packed must be the int8 result of pack_weight, got ",
                   describe(packed));
}

// The packed weight of an out_features x in_features layer; the tiles record the sizes that they were made for.
inline void check_packed(const char* op, const at::Tensor& packed, int64_t n, int64_t k) {
  check_features(op, packed, n, k);
  const PackedShape shape = packed_shape(PackedFormat::kInt8Tiles, n, k);
  TORCH_CHECK_VALUE(
      packed.dim() == 2 && packed.size(0) == shape.rows && packed.size(1) == shape.columns && packed.is_contiguous(),
      op, ": packed must be the int8 [", shape.rows, ", ", shape.columns,
      "] result of pack_weight for out_features = ", n, " and in_features = ", k, ", got ", describe(packed),
      "; the last dimension of input must be in_features");
  const int8_t* tile = packed.const_data_ptr<int8_t>();
  TORCH_CHECK_VALUE(is_tile_of(tile, n, k), op, ": packed was made for out_features = ", tile_out_features(tile, k),
                    ", in_features = ", tile_in_features(tile, k), " (layout ", tile_version(tile, k),
                    "), but this call has out_features = ", n, ", in_features = ", k, " (layout ", kLayoutVersion,
                    "); pack the weight again with pack_weight");
}

// Checks a linear's bias and returns whether it is an integer one.
inline bool check_bias(const char* op, const at::Tensor& bias, bool integer_allowed, int64_t n) {
  const bool integer = integer_allowed && bias.scalar_type() == at::kInt;
  TORCH_CHECK_TYPE(integer || !integer_allowed || is_float_input(bias.scalar_type()), op,
                   ": bias must be float32, bfloat16, float16 or int32, got ", describe(bias));
  if (!integer) check_float(op, "bias", bias);
  check_channels(op, "bias", bias, bias.scalar_type(), n, false);
  return integer;
}

// linear_dynamic_split: what the checks of its members cannot see, because these receive parts of the tensors.
inline void check_members(const char* op, const at::Tensor& input, const at::Tensor& packed,
                          const at::Tensor& weight_scale, const std::optional<at::Tensor>& weight_zero_point,
                          const std::optional<at::Tensor>& bias, at::IntArrayRef out_features, size_t activations) {
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  TORCH_CHECK_VALUE(input.sym_size(-1) >= 1, op, ": in_features must be between 1 and ", kMaxK, ", got 0");
  TORCH_CHECK_VALUE(!out_features.empty(), op, ": out_features must name at least one layer, got none");
  int64_t total = 0;
  for (int64_t n : out_features) {
    TORCH_CHECK_VALUE(n >= 1 && n <= kMaxSplitN, op, ": out_features must each be between 1 and ", kMaxSplitN, ", got ",
                      out_features);
    total += n;
  }
  TORCH_CHECK_VALUE(activations == 0 || activations == out_features.size(), op,
                    ": activations must be empty or one name for each of the ", out_features.size(), " layers, got ",
                    activations, activations == 1 ? " name" : " names");
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kChar, op, ": packed must be the int8 result of pack_weight, got ",
                   describe(packed));
  check_channels(op, "weight_scale", weight_scale, at::kFloat, total, false);
  if (weight_zero_point && weight_zero_point->defined())
    check_channels(op, "weight_zero_point", *weight_zero_point, at::kInt, total, false);
  if (bias && bias->defined()) check_bias(op, *bias, false, total);
}

inline void check_split(const char* op, const at::Tensor& input, const at::Tensor& packed,
                        const at::Tensor& weight_scale, const std::optional<at::Tensor>& weight_zero_point,
                        const std::optional<at::Tensor>& bias, at::IntArrayRef out_features, size_t activations) {
  check_members(op, input, packed, weight_scale, weight_zero_point, bias, out_features, activations);
  int64_t tiles = 0;
  for (int64_t n : out_features) tiles += num_tiles(n);
  TORCH_CHECK_VALUE(packed.dim() == 2 && packed.sym_size(0) == tiles, op, ": packed must hold ", tiles,
                    " tiles of 16 outputs for out_features ", out_features, ", got ", describe(packed),
                    "; concatenate what torchquant.ops.pack_weight returned for each weight");
}

// int8_mm's bound.
inline void check_product_inputs(const char* op, int64_t k) {
  TORCH_CHECK_VALUE(k <= kMaxProductK, op, ": in_features must be at most ", kMaxProductK,
                    " for sums that fit int32, got ", k, "; split the input along its last dimension and add in int64");
}

inline void check_activation_bits(const char* op, int64_t bits) {
  TORCH_CHECK_VALUE(2 <= bits && bits <= 8, op, ": activation_bits must be from 2 to 8, got ", bits);
}

inline void check_linear_input(const char* op, const at::Tensor& input) {  // of linear_static
  TORCH_CHECK_TYPE(
      is_float_input(input.scalar_type()) || input.scalar_type() == at::kChar || input.scalar_type() == at::kByte, op,
      ": input must be int8, uint8, float32, bfloat16 or float16, got ", describe(input));
  check_dim(op, "input", input, 1);
}

// linear_static's input_scale or input_zero_point: one value, or one for each row of integer input.
inline void check_input_parameter(const char* op, const char* name, const at::Tensor& t, at::ScalarType type,
                                  const at::Tensor& input) {
  check_dtype(op, name, t, type);
  const bool per_tensor_only = is_float_input(input.scalar_type()), one = t.numel() == 1 && t.dim() <= 1;
  const auto is_per_row = [&] {  // of input's leading shape, or [..., 1]
    const bool kept = t.dim() == input.dim() && t.size(-1) == 1;
    return (kept ? t.sizes().slice(0, t.dim() - 1) : t.sizes()) == input.sizes().slice(0, input.dim() - 1);
  };
  TORCH_CHECK_VALUE(one || (!per_tensor_only && is_per_row()), op, ": ", name, " must hold one value",
                    per_tensor_only ? " (float input is quantized per tensor)" : ", or one per row of input [..., 1]",
                    ", got ", describe(t), " for input ", describe(input));
}

// linear_static's output: an integer type with output_scale, a float type without.
inline void check_linear_output(const char* op, at::ScalarType dtype, const std::optional<at::Tensor>& scale,
                                int64_t zero_point, int64_t qmin, int64_t qmax) {
  const bool to_int = scale && scale->defined(), int_dtype = dtype == at::kChar || dtype == at::kByte;
  TORCH_CHECK_TYPE(to_int == int_dtype, op,
                   ": output_dtype must be int8 or uint8 exactly where output_scale is given, got ", dtype_name(dtype),
                   to_int ? " with" : " without", " output_scale");
  TORCH_CHECK_TYPE(int_dtype || is_float_input(dtype), op,
                   ": output_dtype must be float32, bfloat16 or float16 (int8 or uint8 with "
                   "output_scale), got ",
                   dtype_name(dtype));
  if (!to_int) return;
  check_dtype(op, "output_scale", *scale, at::kFloat);
  TORCH_CHECK_VALUE(scale->numel() == 1, op, ": output_scale must hold one value, got ", describe(*scale));
  const int64_t least = dtype == at::kChar ? -128 : 0, most = dtype == at::kChar ? 127 : 255;
  TORCH_CHECK_VALUE(least <= qmin && qmin < qmax && qmax <= most && qmin <= zero_point && zero_point <= qmax, op,
                    ": output_qmin <= output_zero_point <= output_qmax must lie within ", least, " .. ", most, " for ",
                    dtype_name(dtype), ", got ", qmin, ", ", zero_point, ", ", qmax);
}

// rms_norm's and layer_norm's arguments.
inline void check_norm(const char* op, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                       const std::optional<at::Tensor>& bias, double eps, const std::optional<at::Tensor>& residual) {
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  TORCH_CHECK_VALUE(eps >= 0.0 && eps <= 0x1.fffffep127, op, ": eps must be finite and not negative, got ", eps);
  const auto channels = [&](const char* name, const std::optional<at::Tensor>& t) {
    if (!t || !t->defined()) return false;
    check_float(op, name, *t);
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == input.size(-1), op, ": ", name, " must be [", input.size(-1),
                      "], one value per element of input's last dimension, got ", describe(*t));
    return true;
  };
  const bool has_weight = channels("weight", weight), has_bias = channels("bias", bias);
  TORCH_CHECK_VALUE(has_weight || !has_bias, op, ": bias must come with a weight, got bias alone");
  if (!residual || !residual->defined()) return;
  check_dtype(op, "residual", *residual, input.scalar_type());
  TORCH_CHECK_VALUE(residual->sizes() == input.sizes(), op, ": residual must have input's shape ", input.sizes(),
                    ", got ", describe(*residual));
}

inline Activation activation_from(const char* op, std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  if (name == "tanh") return Activation::kTanh;
  if (name == "sigmoid") return Activation::kSigmoid;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "hardswish") return Activation::kHardswish;
  if (name == "hardsigmoid") return Activation::kHardsigmoid;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  TORCH_CHECK_VALUE(false, op,
                    ": activation must be one of none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, "
                    "hardsigmoid, leaky_relu, got '",
                    name, "'");
}

}  // namespace torchquant
