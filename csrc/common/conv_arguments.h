// The arguments of the convolution operators: checked, and the sizes that follow from them. One dimension is the second
// of two, of height 1.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "common/checks.h"
#include "common/tensors.h"
#include "formats/int8_conv.h"

namespace torchquant {

struct ConvSizes {
  ConvShape weight;
  int64_t spatial;  // dimensions: 1 or 2
  int64_t n, h, w;  // of the input
  int64_t stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w;
  int64_t out_h, out_w;

  c10::SmallVector<int64_t, 4> output() const {
    if (spatial == 1) return {n, weight.outputs, out_w};
    return {n, weight.outputs, out_h, out_w};
  }
};

// The weight int8 [O, C / groups, kh, kw] or [O, C / groups, k] that a packed weight was made from.
inline ConvShape conv_shape(const char* op, at::IntArrayRef weight_shape, int64_t groups) {
  const bool dimensions = weight_shape.size() == 3 || weight_shape.size() == 4;
  int64_t k = 1;
  for (size_t i = 0; i < weight_shape.size(); ++i) {
    TORCH_CHECK_VALUE(weight_shape[i] >= 1 && weight_shape[i] <= kMaxN, op,
                      ": weight_shape must have no dimension of size 0, got ", weight_shape);
    if (i > 0 && k <= kMaxK) k *= weight_shape[i];
  }
  TORCH_CHECK_VALUE(dimensions, op, ": weight_shape must be [O, C / groups, kh, kw] or [O, C / groups, k], got ",
                    weight_shape);
  TORCH_CHECK_VALUE(groups >= 1 && weight_shape[0] % groups == 0, op, ": groups must divide the ", weight_shape[0],
                    " outputs of weight_shape ", weight_shape, ", got ", groups);
  TORCH_CHECK_VALUE(k <= kMaxK, op, ": weight_shape must have at most ", kMaxK, " inputs for an output, got ",
                    weight_shape);
  TORCH_CHECK_VALUE(groups == 1 || weight_shape[1] > 1 || k <= kMaxProductK, op,
                    ": weight_shape of a depthwise convolution must have at most ", kMaxProductK,
                    " positions, so that sums fit 32 bits, got ", weight_shape);
  if (weight_shape.size() == 3) return {weight_shape[0], weight_shape[1], 1, weight_shape[2], groups};
  return {weight_shape[0], weight_shape[1], weight_shape[2], weight_shape[3], groups};
}

inline void check_ints(const char* op, const char* name, at::IntArrayRef values, size_t count, int64_t least) {
  bool ok = values.size() == count;
  for (int64_t value : values) ok = ok && least <= value && value <= kMaxN;
  TORCH_CHECK_VALUE(ok, op, ": ", name, " must be ", count, " ints of at least ", least, ", got ", values,
                    "; padding has two ints for each spatial dimension, stride and dilation have one");
}

inline int64_t conv_output(int64_t size, int64_t before, int64_t after, int64_t dilation, int64_t kernel,
                           int64_t stride) {
  const int64_t room = size + before + after - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

inline ConvSizes conv_sizes(const char* op, const at::Tensor& input, at::IntArrayRef weight_shape,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const ConvShape weight = conv_shape(op, weight_shape, groups);
  const size_t spatial = weight_shape.size() - 2;
  TORCH_CHECK_VALUE(input.dim() == static_cast<int64_t>(weight_shape.size()), op, ": input must have shape ",
                    spatial == 2 ? "[N, C, H, W]" : "[N, C, L]", ", got ", describe(input));
  check_ints(op, "stride", stride, spatial, 1);
  check_ints(op, "padding", padding, 2 * spatial, 0);
  check_ints(op, "dilation", dilation, spatial, 1);
  TORCH_CHECK_VALUE(input.size(1) == weight.channels * groups, op, ": input must have ", weight.channels * groups,
                    " channels for weight_shape ", weight_shape, " and groups = ", groups, ", got ", describe(input));
  ConvSizes s{};
  s.weight = weight;
  s.spatial = static_cast<int64_t>(spatial);
  s.n = input.size(0);
  s.h = spatial == 2 ? input.size(2) : 1;
  s.w = input.size(-1);
  s.stride_h = spatial == 2 ? stride[0] : 1;
  s.stride_w = stride[spatial - 1];
  s.pad_top = spatial == 2 ? padding[0] : 0;
  s.pad_bottom = spatial == 2 ? padding[1] : 0;
  s.pad_left = padding[2 * spatial - 2];
  s.pad_right = padding[2 * spatial - 1];
  s.dilation_h = spatial == 2 ? dilation[0] : 1;
  s.dilation_w = dilation[spatial - 1];
  s.out_h = conv_output(s.h, s.pad_top, s.pad_bottom, s.dilation_h, weight.kernel_h, s.stride_h);
  s.out_w = conv_output(s.w, s.pad_left, s.pad_right, s.dilation_w, weight.kernel_w, s.stride_w);
  TORCH_CHECK_VALUE(s.h >= 1 && s.w >= 1 && s.out_h >= 1 && s.out_w >= 1, op,
                    ": input must be at least as large as the kernel, got ", describe(input), " with padding ", padding,
                    " for weight_shape ", weight_shape, " with dilation ", dilation);
  return s;
}

// pack_conv_weight's arguments.
inline ConvShape check_conv_weight(const char* op, const at::Tensor& weight, int64_t groups) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kChar, op, ": weight must be int8, got ", describe(weight),
                   "; quantize it first (torchquant.ops.quantize)");
  return conv_shape(op, weight.sizes(), groups);
}

inline void check_conv_channels(const char* op, const ConvSizes& sizes, const at::Tensor& weight_scale,
                                const OptTensor& bias) {
  check_channels(op, "weight_scale", weight_scale, at::kFloat, sizes.weight.outputs, true);
  if (present(bias)) check_bias(op, *bias, false, sizes.weight.outputs);
}

inline void check_conv_input(const char* op, const at::Tensor& input) {  // of conv_static
  TORCH_CHECK_TYPE(is_float_input(input.scalar_type()) || input.scalar_type() == at::kChar, op,
                   ": input must be int8, float32, bfloat16 or float16, got ", describe(input));
}

// conv_static's input_scale or input_zero_point: one value, or one for each sample of int8 input.
inline void check_conv_parameter(const char* op, const char* name, const at::Tensor& t, at::ScalarType type,
                                 const at::Tensor& input) {
  check_dtype(op, name, t, type);
  const bool per_tensor_only = is_float_input(input.scalar_type()), one = t.numel() == 1 && t.dim() <= 1;
  TORCH_CHECK_VALUE(one || (!per_tensor_only && t.dim() == 1 && t.size(0) == input.size(0)), op, ": ", name,
                    " must hold one value",
                    per_tensor_only ? " (float input is quantized per tensor)" : ", or one per sample of input [N]",
                    ", got ", describe(t), " for input ", describe(input));
}

inline void check_conv_input_range(const char* op, int64_t qmin, int64_t qmax) {
  TORCH_CHECK_VALUE(-128 <= qmin && qmin < qmax && qmax <= 127, op,
                    ": input_qmin < input_qmax must lie within -128 .. 127, got ", qmin, " and ", qmax);
}

inline void check_conv_residual(const char* op, const ConvSizes& sizes, const OptTensor& residual,
                                const OptTensor& scale, int64_t zero_point) {
  TORCH_CHECK_VALUE(present(residual) || !present(scale), op,
                    ": residual_scale must come with a residual, got residual_scale alone");
  if (!present(residual)) return;
  const at::ScalarType type = residual->scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kChar, op, ": residual must be float32 or int8, got ",
                   describe(*residual));
  TORCH_CHECK_VALUE(residual->sizes() == at::IntArrayRef(sizes.output()), op,
                    ": residual must have the result's shape ", at::IntArrayRef(sizes.output()), ", got ",
                    describe(*residual));
  TORCH_CHECK_VALUE(present(scale) == (type == at::kChar), op,
                    ": residual_scale must be given exactly where residual is int8, got ", describe(*residual),
                    present(scale) ? " with" : " without", " residual_scale");
  if (!present(scale)) return;
  check_dtype(op, "residual_scale", *scale, at::kFloat);
  TORCH_CHECK_VALUE(scale->numel() == 1, op, ": residual_scale must hold one value, got ", describe(*scale));
  TORCH_CHECK_VALUE(-128 <= zero_point && zero_point <= 127, op, ": residual_zero_point must be from -128 to 127, got ",
                    zero_point);
}

// An int8 output with output_scale, a float output without.
inline void check_conv_output(const char* op, at::ScalarType dtype, const OptTensor& scale, int64_t zero_point,
                              int64_t qmin, int64_t qmax) {
  TORCH_CHECK_TYPE(present(scale) == (dtype == at::kChar) && (dtype == at::kChar || is_float_input(dtype)), op,
                   ": output_dtype must be float32, bfloat16 or float16, or int8 exactly where output_scale is given, "
                   "got ",
                   dtype_name(dtype), present(scale) ? " with" : " without", " output_scale");
  if (!present(scale)) return;
  check_dtype(op, "output_scale", *scale, at::kFloat);
  TORCH_CHECK_VALUE(scale->numel() == 1, op, ": output_scale must hold one value, got ", describe(*scale));
  TORCH_CHECK_VALUE(-128 <= qmin && qmin < qmax && qmax <= 127 && qmin <= zero_point && zero_point <= qmax, op,
                    ": output_qmin <= output_zero_point <= output_qmax must lie within -128 .. 127, got ", qmin, ", ",
                    zero_point, ", ", qmax);
}

}  // namespace torchquant
