// pack_conv_weight, unpack_conv_weight, conv_static, conv_dynamic: torchquant/functional/conv.py in ATen. The packed
// weight is the canonical one, int8 [O, (C / groups) * kh * kw]. The sum over the positions of the kernel is taken in
// float64, in which integers are exact to 2^53; no library is asked for a convolution, because it may choose an
// algorithm that rounds.
#include <ATen/ATen.h>

#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "aten/activations.h"
#include "aten/register.h"
#include "aten/rows.h"
#include "common/arithmetic.h"
#include "common/checks.h"
#include "common/conv_arguments.h"
#include "common/device.h"
#include "common/tensors.h"

namespace torchquant::conv {
namespace {

at::Tensor pack_conv_weight(const at::Tensor& weight, int64_t groups) {
  const ConvShape shape = check_conv_weight("pack_conv_weight", weight, groups);
  return weight.reshape({shape.outputs, shape.k()}).clone(at::MemoryFormat::Contiguous);
}

void check_packed_conv(const char* op, const at::Tensor& packed, const ConvShape& shape) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kChar, op, ": packed must be the int8 result of pack_conv_weight, got ",
                   describe(packed));
  TORCH_CHECK_VALUE(packed.dim() == 2 && packed.size(0) == shape.outputs && packed.size(1) == shape.k(), op,
                    ": packed must be the int8 [", shape.outputs, ", ", shape.k(), "] result of pack_conv_weight on ",
                    packed.device(), " for weight_shape and groups = ", shape.groups, ", got ", describe(packed),
                    "; a weight packed on another type of device goes through unpack_conv_weight there and "
                    "pack_conv_weight here");
}

at::Tensor unpack_conv_weight(const at::Tensor& packed, at::IntArrayRef weight_shape, int64_t groups) {
  const char* op = "unpack_conv_weight";
  check_packed_conv(op, packed, conv_shape(op, weight_shape, groups));
  return packed.reshape(weight_shape).clone(at::MemoryFormat::Contiguous);
}

// The sum of (q - zero) w, float32 [N, O, out_h, out_w]. zero: int32 [N, 1, 1, 1] or [1, 1, 1, 1], or undefined.
at::Tensor sums(const at::Tensor& q, const at::Tensor& zero, const at::Tensor& packed, const ConvSizes& s) {
  const ConvShape& shape = s.weight;
  const int64_t groups = shape.groups, pixels = s.out_h * s.out_w;
  at::Tensor x = q.reshape({s.n, shape.channels * groups, s.h, s.w}).to(at::kDouble);
  if (zero.defined()) x = x - zero;
  x = at::constant_pad_nd(x, {s.pad_left, s.pad_right, s.pad_top, s.pad_bottom});
  const at::Tensor w =
      packed.to(at::kDouble).reshape({groups, shape.n(), shape.channels, shape.kernel_h, shape.kernel_w});
  at::Tensor total = at::zeros({s.n, groups, shape.n(), pixels}, x.options());
  for (int64_t i = 0; i < shape.kernel_h; ++i) {
    const int64_t row = i * s.dilation_h;
    const at::Tensor lines = x.slice(2, row, row + (s.out_h - 1) * s.stride_h + 1, s.stride_h);
    for (int64_t j = 0; j < shape.kernel_w; ++j) {
      const int64_t column = j * s.dilation_w;
      const at::Tensor part = lines.slice(3, column, column + (s.out_w - 1) * s.stride_w + 1, s.stride_w);
      total.add_(at::matmul(w.select(4, j).select(3, i), part.reshape({s.n, groups, shape.channels, pixels})));
    }
  }
  return (total + 0.0).to(at::kFloat).reshape({s.n, shape.outputs, s.out_h, s.out_w});  // + 0: no -0
}

at::Tensor per_channel(const at::Tensor& t) { return t.reshape({1, -1, 1, 1}); }
at::Tensor per_sample(const at::Tensor& t) { return t.reshape({-1, 1, 1, 1}); }

// Quantized samples: int8 in input's shape; scale float32, zero int32 or undefined, [N, 1, 1, 1] or [1, 1, 1, 1].
struct Samples {
  at::Tensor q, scale, zero;
};

Samples quantized_samples(const at::Tensor& input, const at::Tensor& x, const RowParams& p, int64_t qmin,
                          int64_t qmax) {
  const at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  quantize_into(q, x, p, qmin, qmax);
  return {q.reshape(input.sizes()), per_sample(p.scale), p.zero.defined() ? per_sample(p.zero) : p.zero};
}

at::Tensor as_samples(const at::Tensor& input) { return input.reshape({input.size(0), -1}); }  // [N, elements]

at::Tensor real_result(const Samples& samples, const at::Tensor& packed, const at::Tensor& weight_scale,
                       const OptTensor& bias, const ConvSizes& sizes) {
  const at::Tensor scale = samples.scale * per_channel(weight_scale);
  const at::Tensor acc = sums(samples.q, samples.zero, packed, sizes);
  if (!present(bias)) return acc * scale;
  return fmaf(acc, scale, per_channel(bias->to(at::kFloat)));
}

at::Tensor empty_result(const at::Tensor& input, const ConvSizes& sizes, at::ScalarType dtype) {
  const bool last = sizes.spatial == 2 && input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return at::empty(sizes.output(), input.options().dtype(dtype),
                   last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

ConvSizes checked(const char* op, const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                  const OptTensor& bias, at::IntArrayRef weight_shape, at::IntArrayRef stride, at::IntArrayRef padding,
                  at::IntArrayRef dilation, int64_t groups) {
  const ConvSizes sizes = conv_sizes(op, input, weight_shape, stride, padding, dilation, groups);
  check_device(op, "packed", packed, input);
  check_device(op, "weight_scale", weight_scale, input);
  check_device(op, "bias", bias, input);
  check_packed_conv(op, packed, sizes.weight);
  check_conv_channels(op, sizes, weight_scale, bias);
  return sizes;
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
  const ConvSizes sizes =
      checked(op, input, packed, weight_scale, bias, weight_shape, stride, padding, dilation, groups);
  check_device(op, "input_scale", input_scale, input);
  check_device(op, "input_zero_point", input_zero_point, input);
  check_device(op, "residual", residual, input);
  check_device(op, "residual_scale", residual_scale, input);
  check_device(op, "output_scale", output_scale, input);
  check_conv_parameter(op, "input_scale", input_scale, at::kFloat, input);
  if (present(input_zero_point)) check_conv_parameter(op, "input_zero_point", *input_zero_point, at::kInt, input);
  check_conv_residual(op, sizes, residual, residual_scale, residual_zero_point);
  check_conv_output(op, output_dtype, output_scale, output_zero_point, output_qmin, output_qmax);
  const bool float_input = is_float_input(input.scalar_type());
  if (float_input) check_conv_input_range(op, input_qmin, input_qmax);
  const Activation function = activation_from(op, activation);
  at::Tensor out = empty_result(input, sizes, output_dtype);
  if (sizes.n == 0) return out;

  Samples samples{input, per_sample(input_scale),
                  present(input_zero_point) ? per_sample(*input_zero_point) : at::Tensor()};
  if (float_input) {
    const at::Tensor x = as_samples(input), scale = input_scale.reshape({1, 1});
    const at::Tensor zero = present(input_zero_point) ? input_zero_point->reshape({1, 1}) : at::Tensor();
    samples = quantized_samples(input, x, static_params(x, scale, zero), input_qmin, input_qmax);
  }
  at::Tensor y = real_result(samples, packed, weight_scale, bias, sizes);
  if (present(residual)) {
    at::Tensor r = residual->reshape(y.sizes());
    if (present(residual_scale))
      r = (r.to(at::kInt) - residual_zero_point).to(at::kFloat) * residual_scale->reshape({});
    y = y + r;
  }
  y = apply_activation(y, function);
  if (present(output_scale))
    y = at::mul(y, torchquant::reciprocal(output_scale->reshape({1})))
            .round_()
            .nan_to_num_(0.0)
            .add_(output_zero_point)
            .clamp_(output_qmin, output_qmax);
  return out.copy_(y.reshape(out.sizes()));
}

at::Tensor conv_dynamic(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                        const OptTensor& bias, at::IntArrayRef weight_shape, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool symmetric,
                        std::string_view activation, std::optional<at::ScalarType> output_dtype,
                        int64_t activation_bits) {
  const char* op = "conv_dynamic";
  check_float(op, "input", input);
  check_activation_bits(op, activation_bits);
  const ConvSizes sizes =
      checked(op, input, packed, weight_scale, bias, weight_shape, stride, padding, dilation, groups);
  const at::ScalarType dtype = output_dtype.value_or(input.scalar_type());
  check_float_type(op, "output_dtype", dtype);
  const Activation function = activation_from(op, activation);
  at::Tensor out = empty_result(input, sizes, dtype);
  if (sizes.n == 0) return out;
  const at::Tensor x = as_samples(input);
  const int64_t qmax = (1 << (activation_bits - 1)) - 1, qmin = -qmax - 1;
  const Samples samples = quantized_samples(input, x, dynamic_params(x, qmin, qmax, symmetric), qmin, qmax);
  const at::Tensor y = apply_activation(real_result(samples, packed, weight_scale, bias, sizes), function);
  return out.copy_(y.reshape(out.sizes()));
}

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::pack_conv_weight>(&pack_conv_weight);
  m.impl<ops::unpack_conv_weight>(&unpack_conv_weight);
  m.impl<ops::conv_static>(&conv_static);
  m.impl<ops::conv_dynamic>(&conv_dynamic);
}

}  // namespace
}  // namespace torchquant::conv
