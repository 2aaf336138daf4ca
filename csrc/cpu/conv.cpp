// pack_conv_weight, unpack_conv_weight, conv_static, conv_dynamic. The kernels work on images whose channels are
// contiguous (channels_last); other inputs are copied, and so are results that must be contiguous.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/checks.h"
#include "common/conv_arguments.h"
#include "cpu/core_call.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant::conv {
namespace {

// ---------------------------------------------------------------- weights

at::Tensor pack_conv_weight(const at::Tensor& weight, int64_t groups) {
  const ConvShape shape = check_conv_weight("pack_conv_weight", weight, groups);
  const at::Tensor four = weight.dim() == 4 ? weight : weight.unsqueeze(2);
  const at::Tensor ordered = four.permute({0, 2, 3, 1}).contiguous();  // [O, kh, kw, C / groups]
  const PackedShape size = packed_shape(shape);
  at::Tensor packed = at::empty({size.rows, size.columns}, weight.options());
  const int8_t* const from = ordered.const_data_ptr<int8_t>();
  int8_t* const to = packed.mutable_data_ptr<int8_t>();
  if (shape.is_depthwise()) {
    check_status(tq_pack_depthwise(from, shape.outputs, shape.kernel_h, shape.kernel_w, to, &kTorchThreads));
    return packed;
  }
  const int64_t n = shape.n(), k = shape.k(), bytes = packed_group_bytes(shape);
  for (int64_t group = 0; group < groups; ++group)
    check_status(tq_pack_weight(from + group * n * k, k, 1, n, k, to + group * bytes, &kTorchThreads));
  return packed;
}

void check_packed_conv(const char* op, const at::Tensor& packed, const ConvShape& shape) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kChar, op, ": packed must be the int8 result of pack_conv_weight, got ",
                   describe(packed));
  const PackedShape size = packed_shape(shape);
  TORCH_CHECK_VALUE(packed.dim() == 2 && packed.size(0) == size.rows && packed.size(1) == size.columns &&
                        packed.is_contiguous() && is_packed_conv(packed.const_data_ptr<int8_t>(), shape),
                    op, ": packed must be the int8 [", size.rows, ", ", size.columns,
                    "] result of pack_conv_weight for weight_shape and groups = ", shape.groups, ", got ",
                    describe(packed));
}

at::Tensor unpack_conv_weight(const at::Tensor& packed, at::IntArrayRef weight_shape, int64_t groups) {
  const char* op = "unpack_conv_weight";
  const ConvShape shape = conv_shape(op, weight_shape, groups);
  check_packed_conv(op, packed, shape);
  at::Tensor ordered = at::empty({shape.outputs, shape.kernel_h, shape.kernel_w, shape.channels}, packed.options());
  const int8_t* const from = packed.const_data_ptr<int8_t>();
  int8_t* const to = ordered.mutable_data_ptr<int8_t>();
  if (shape.is_depthwise()) {
    check_status(tq_unpack_depthwise(from, shape.outputs, shape.kernel_h, shape.kernel_w, to, &kTorchThreads));
  } else {
    const int64_t n = shape.n(), k = shape.k(), bytes = packed_group_bytes(shape);
    for (int64_t group = 0; group < groups; ++group)
      check_status(tq_unpack_weight(from + group * bytes, n, k, to + group * n * k, &kTorchThreads));
  }
  return ordered.permute({0, 3, 1, 2}).contiguous().view(weight_shape);
}

// ---------------------------------------------------------------- images

// [N, C, H, W] or [N, C, L] as [N, C, H, W].
at::Tensor in_two_dimensions(const at::Tensor& t) { return t.dim() == 3 ? t.unsqueeze(2) : t; }

// The tensor itself where its channels are contiguous and its pixels do not overlap, otherwise a copy.
at::Tensor with_channels_last(const at::Tensor& t) {
  const bool last = t.size(1) == 1 || t.stride(1) == 1;
  bool positive = true;
  for (int64_t d : {0, 2, 3}) positive = positive && t.stride(d) >= 0;
  const bool apart = t.size(3) <= 1 || t.stride(3) >= t.size(1);
  return last && positive && apart ? t : t.contiguous(at::MemoryFormat::ChannelsLast);
}

tq_image image_of(const at::Tensor& t) {  // a result of with_channels_last
  return {const_cast<void*>(t.const_data_ptr()),
          type_of(t),
          t.size(0),
          t.size(2),
          t.size(3),
          t.size(1),
          t.stride(0),
          t.stride(2),
          t.stride(3)};
}

// ---------------------------------------------------------------- the call

// The struct, and what it points to.
struct Call {
  tq_conv_call call{};
  ConvSizes sizes;
  tq_image residual{};
  at::Tensor input, input_scale, input_zero, weight_scale, bias, residual_data, out;
};

const at::Tensor expanded(const at::Tensor& t, int64_t n) { return t.expand({n}).contiguous(); }

void set_weight(const char* op, Call& c, const at::Tensor& packed, const at::Tensor& weight_scale,
                const OptTensor& bias, std::string_view activation) {
  check_packed_conv(op, packed, c.sizes.weight);
  check_conv_channels(op, c.sizes, weight_scale, bias);
  const int64_t outputs = c.sizes.weight.outputs;
  c.weight_scale = expanded(weight_scale, outputs);
  if (present(bias)) c.bias = bias->to(at::kFloat).contiguous();  // exact
  c.call.packed = packed.const_data_ptr<int8_t>();
  c.call.weight_scale = c.weight_scale.const_data_ptr<float>();
  c.call.bias = c.bias.defined() ? c.bias.const_data_ptr<float>() : nullptr;
  c.call.activation = activation_of(op, activation);
  c.call.kernel_h = c.sizes.weight.kernel_h;
  c.call.kernel_w = c.sizes.weight.kernel_w;
  c.call.groups = c.sizes.weight.groups;
  c.call.stride_h = c.sizes.stride_h;
  c.call.stride_w = c.sizes.stride_w;
  c.call.pad_top = c.sizes.pad_top;
  c.call.pad_left = c.sizes.pad_left;
  c.call.dilation_h = c.sizes.dilation_h;
  c.call.dilation_w = c.sizes.dilation_w;
}

// Float input, one row of scale and zero point for each sample.
void quantize_input(Call& c, const at::Tensor& input, const tq_row_quantization& how) {
  const at::Tensor four = in_two_dimensions(input);
  const at::Tensor dense =
      four.is_contiguous(at::MemoryFormat::ChannelsLast) ? four : four.contiguous();  // a sample is one run of memory
  at::Tensor q = at::empty_like(dense, dense.options().dtype(at::kChar));
  // With given parameters the rows of pixels of an image can be divided among threads.
  const int64_t n = c.sizes.n, pieces = how.mode == TQ_STATIC ? std::max<int64_t>(1, dense.size(2)) : 1;
  const int64_t k = dense.numel() / (n * pieces);
  const auto floats = input.options().dtype(at::kFloat), ints = input.options().dtype(at::kInt);
  c.input_scale = at::empty({n * pieces}, floats);
  c.input_zero = at::empty({n * pieces}, ints);
  const tq_rows rows = {dense.const_data_ptr(), type_of(dense), n * pieces, k, k};
  float* const scale = c.input_scale.mutable_data_ptr<float>();
  int32_t* const zero = c.input_zero.mutable_data_ptr<int32_t>();
  check_status(tq_quantize_rows(&rows, &how, q.mutable_data_ptr<int8_t>(), scale, zero, &kTorchThreads));
  c.input = with_channels_last(q);
  c.call.per_image = true;
  if (how.mode != TQ_STATIC) return;
  c.call.per_image = std::any_of(scale, scale + n * pieces, [](float s) { return std::isnan(s); });
  for (int64_t i = 0; i < n; ++i) {  // an image with NaN has the scale NaN
    const float* const first = scale + i * pieces;
    const bool nan = std::any_of(first, first + pieces, [](float s) { return std::isnan(s); });
    scale[i] = nan ? std::numeric_limits<float>::quiet_NaN() : how.scale;
    zero[i] = how.zero_point;
  }
}

at::Tensor run(Call& c, const at::Tensor& input, at::ScalarType dtype) {
  const ConvSizes& s = c.sizes;
  c.call.input = image_of(c.input);
  c.call.input_scale = c.input_scale.const_data_ptr<float>();
  c.call.input_zero_point = c.input_zero.defined() ? c.input_zero.const_data_ptr<int32_t>() : nullptr;
  at::Tensor out =
      empty_output({s.n, s.out_h, s.out_w, s.weight.outputs}, input.options().dtype(dtype)).permute({0, 3, 1, 2});
  c.call.out = image_of(out);
  check_status(tq_conv(&c.call, &kTorchThreads));
  if (s.spatial == 1) return out.squeeze(2).contiguous();
  return input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ? out : out.contiguous();
}

at::Tensor empty_result(const Call& c, const at::Tensor& input, at::ScalarType dtype) {
  const bool last = c.sizes.spatial == 2 && input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return at::empty(c.sizes.output(), input.options().dtype(dtype),
                   last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

at::Tensor conv_static(const at::Tensor& input, const at::Tensor& input_scale, const OptTensor& input_zero_point,
                       const at::Tensor& packed, const at::Tensor& weight_scale, const OptTensor& bias,
                       at::IntArrayRef weight_shape, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups, std::string_view activation, const OptTensor& residual,
                       const OptTensor& residual_scale, int64_t residual_zero_point, at::ScalarType output_dtype,
                       const OptTensor& output_scale, int64_t output_zero_point, int64_t output_qmin,
                       int64_t output_qmax, int64_t input_qmin, int64_t input_qmax) {
  const char* op = "conv_static";
  check_conv_input(op, input);
  Call c;
  c.sizes = conv_sizes(op, input, weight_shape, stride, padding, dilation, groups);
  set_weight(op, c, packed, weight_scale, bias, activation);
  check_conv_parameter(op, "input_scale", input_scale, at::kFloat, input);
  if (present(input_zero_point)) check_conv_parameter(op, "input_zero_point", *input_zero_point, at::kInt, input);
  check_conv_residual(op, c.sizes, residual, residual_scale, residual_zero_point);
  check_conv_output(op, output_dtype, output_scale, output_zero_point, output_qmin, output_qmax);
  const bool float_input = is_float_input(input.scalar_type());
  if (float_input) check_conv_input_range(op, input_qmin, input_qmax);
  if (c.sizes.n == 0) return empty_result(c, input, output_dtype);

  if (present(output_scale)) {
    c.call.out_qparams = {*output_scale->const_data_ptr<float>(), static_cast<int32_t>(output_zero_point),
                          static_cast<int32_t>(output_qmin), static_cast<int32_t>(output_qmax)};
    check_scale(op, "output_scale", c.call.out_qparams.scale);
  }
  if (present(residual)) {
    c.residual_data = with_channels_last(in_two_dimensions(*residual));
    c.residual = image_of(c.residual_data);
    c.call.residual = &c.residual;
    if (present(residual_scale)) {
      c.call.residual_qparams = {*residual_scale->const_data_ptr<float>(), static_cast<int32_t>(residual_zero_point),
                                 -128, 127};
      check_scale(op, "residual_scale", c.call.residual_qparams.scale);
    }
  }
  if (float_input) {
    tq_row_quantization how{TQ_STATIC, static_cast<int32_t>(input_qmin), static_cast<int32_t>(input_qmax),
                            *input_scale.const_data_ptr<float>(), 0};
    check_scale(op, "input_scale", how.scale);
    if (present(input_zero_point)) {
      how.zero_point = *input_zero_point->const_data_ptr<int32_t>();
      check_zero_points(op, "input_zero_point", &how.zero_point, 1, input_qmin, input_qmax);
    }
    quantize_input(c, input, how);
  } else {
    const bool zeros = present(input_zero_point);
    c.call.per_image = input_scale.numel() > 1 || (zeros && input_zero_point->numel() > 1);
    const int64_t count = c.call.per_image ? c.sizes.n : 1;
    c.input_scale = expanded(input_scale, count);
    if (zeros) {
      c.input_zero = expanded(*input_zero_point, count);
      check_zero_points(op, "input_zero_point", c.input_zero.const_data_ptr<int32_t>(), count, -128, 127);
    }
    c.input = with_channels_last(in_two_dimensions(input));
  }
  return run(c, input, output_dtype);
}

at::Tensor conv_dynamic(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                        const OptTensor& bias, at::IntArrayRef weight_shape, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool symmetric,
                        std::string_view activation, std::optional<at::ScalarType> output_dtype,
                        int64_t activation_bits) {
  const char* op = "conv_dynamic";
  check_float(op, "input", input);
  check_activation_bits(op, activation_bits);
  Call c;
  c.sizes = conv_sizes(op, input, weight_shape, stride, padding, dilation, groups);
  set_weight(op, c, packed, weight_scale, bias, activation);
  const at::ScalarType dtype = output_dtype.value_or(input.scalar_type());
  check_float_type(op, "output_dtype", dtype);
  if (c.sizes.n == 0) return empty_result(c, input, dtype);
  const int32_t qmax = (1 << (activation_bits - 1)) - 1;
  quantize_input(c, input, {symmetric ? TQ_SYMMETRIC : TQ_ASYMMETRIC, -qmax - 1, qmax, 0.0f, 0});
  return run(c, input, dtype);
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::pack_conv_weight::implement(m, &pack_conv_weight);
  ops::unpack_conv_weight::implement(m, &unpack_conv_weight);
  ops::conv_static::implement(m, &conv_static);
  ops::conv_dynamic::implement(m, &conv_dynamic);
}

}  // namespace
}  // namespace torchquant::conv
