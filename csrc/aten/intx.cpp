// pack_intx_weight, unpack_intx_weight, linear_dynamic_intx, linear_static_intx, linear_intx:
// torchquant/functional/intx.py in ATen. A packed row is the canonical one: its integers as a string of bits, then its
// scales (float32), then its zero points (int8).
//
//   row n:  | bits of k = 0, 1, ...; the lowest first, two's complement | scales, 4 bytes each | zero points, 1 byte each |
#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>

#include "aten/activations.h"
#include "aten/blocks.h"
#include "aten/register.h"
#include "aten/rows.h"
#include "common/arithmetic.h"
#include "common/device.h"
#include "common/intx_arguments.h"

namespace torchquant::intx {
namespace {

int64_t bit_bytes(const IntxShape& s) { return ceil_div(s.k * s.bits, 8); }
int64_t row_bytes(const IntxShape& s) { return bit_bytes(s) + s.groups() * (s.has_zero ? 5 : 4); }

at::Tensor places(const at::Tensor& like, int64_t count) { return at::arange(count, like.options().dtype(at::kByte)); }

// int8 [N, K] -> uint8 [N, bytes]
at::Tensor to_bits(const at::Tensor& weight, const IntxShape& s) {
  const at::Tensor bytes = weight.contiguous().view(at::kByte).unsqueeze(-1);
  const at::Tensor bits = bytes.bitwise_right_shift(places(weight, s.bits)).bitwise_and(1).reshape({s.n, -1});
  const at::Tensor padded = at::constant_pad_nd(bits, {0, 8 * bit_bytes(s) - s.k * s.bits});
  return padded.reshape({s.n, bit_bytes(s), 8}).bitwise_left_shift(places(weight, 8)).sum(-1, false, at::kByte);
}

at::Tensor from_bits(const at::Tensor& bytes, const IntxShape& s) {
  const at::Tensor bits = bytes.unsqueeze(-1).bitwise_right_shift(places(bytes, 8)).bitwise_and(1);
  const at::Tensor integers = bits.reshape({s.n, -1}).narrow(1, 0, s.k * s.bits).reshape({s.n, s.k, s.bits});
  const at::Tensor u = integers.bitwise_left_shift(places(bytes, s.bits)).sum(-1, false, at::kByte);
  const int64_t middle = s.middle();  // of two's complement: (u ^ middle) - middle
  return u.bitwise_xor(middle).to(at::kShort).sub_(middle).to(at::kChar);
}

struct Weight {
  at::Tensor q, scale, zero;  // int8 [N, K], float32 and int8 [N, groups]
};

at::Tensor pack_intx_weight(const at::Tensor& weight, const at::Tensor& weight_scale,
                            const OptTensor& weight_zero_point, int64_t bits, std::optional<int64_t> group_size) {
  const char* op = "pack_intx_weight";
  const IntxShape s = check_intx_weight(op, weight, weight_scale, weight_zero_point, bits, group_size);
  check_device(op, "weight_scale", weight_scale, weight, "weight");
  check_device(op, "weight_zero_point", weight_zero_point, weight, "weight");
  std::vector<at::Tensor> parts{to_bits(weight, s),
                                weight_scale.reshape({s.n, s.groups()}).contiguous().view(at::kByte)};
  if (s.has_zero) parts.push_back(weight_zero_point->reshape({s.n, s.groups()}).contiguous().view(at::kByte));
  return at::cat(parts, 1);
}

Weight unpacked(const at::Tensor& packed, const IntxShape& s) {
  const int64_t at = bit_bytes(s), groups = s.groups();
  // A copy: floats must begin at a multiple of four bytes, and of a single row contiguous() would be the row itself.
  const at::Tensor scale = packed.narrow(1, at, 4 * groups).clone(at::MemoryFormat::Contiguous).view(at::kFloat);
  const at::Tensor zero = s.has_zero ? packed.narrow(1, at + 4 * groups, groups).contiguous().view(at::kChar)
                                     : at::zeros({s.n, groups}, packed.options().dtype(at::kChar));
  return {from_bits(packed.narrow(1, 0, at), s), scale, zero};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> unpack_intx_weight(const at::Tensor& packed, int64_t out_features,
                                                                  int64_t in_features, int64_t bits,
                                                                  std::optional<int64_t> group_size,
                                                                  bool has_zero_point) {
  const char* op = "unpack_intx_weight";
  const IntxShape s = intx_shape(op, out_features, in_features, bits, group_size, has_zero_point);
  check_intx_packed(op, packed, s.n, row_bytes(s));
  const Weight w = unpacked(packed, s);
  if (group_size) return {w.q, w.scale, w.zero};
  return {w.q, w.scale.reshape({s.n}), w.zero.reshape({s.n})};
}

// What is checked in every layer, and what follows from it.
struct Layer {
  IntxShape shape;
  bool per_channel;
  at::ScalarType dtype;
  Activation activation;
};

Layer check_layer(const char* op, const at::Tensor& input, const at::Tensor& packed, const OptTensor& bias,
                  int64_t out_features, int64_t bits, std::optional<int64_t> group_size, bool has_zero_point,
                  std::string_view activation, at::ScalarType dtype) {
  const IntxShape s = intx_shape(op, out_features, input.size(-1), bits, group_size, has_zero_point);
  check_device(op, "packed", packed, input);
  check_device(op, "bias", bias, input);
  check_intx_packed(op, packed, s.n, row_bytes(s));
  if (present(bias)) check_bias(op, *bias, false, s.n);
  check_float_type(op, "output_dtype", dtype);
  return {s, !group_size, dtype, activation_from(op, activation)};
}

at::Tensor empty_output(const at::Tensor& input, const Layer& layer) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = layer.shape.n;
  return at::empty(sizes, input.options().dtype(layer.dtype));
}

// The rows x [M, K] with these parameters through the layer, to out.
void linear_into(const at::Tensor& out, const at::Tensor& x, const RowParams& rows, int64_t qmin, int64_t qmax,
                 const at::Tensor& packed, const OptTensor& bias, const Layer& layer) {
  const IntxShape& s = layer.shape;
  const at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  quantize_into(q, x, rows, qmin, qmax);
  const Weight w = unpacked(packed, s);
  at::Tensor centred = q.to(at::kDouble);  // integers are exact in float64
  if (rows.zero.defined()) centred = centred - rows.zero;
  at::Tensor t;
  for (int64_t g = 0; g < s.groups(); ++g) {
    const int64_t first = g * s.group(), count = s.inputs(g);
    const at::Tensor u = w.q.narrow(1, first, count).to(at::kDouble) - w.zero.narrow(1, g, 1);
    const at::Tensor acc = (at::matmul(centred.narrow(1, first, count), u.t()) + 0.0).to(at::kFloat);
    const at::Tensor scale = w.scale.select(1, g).unsqueeze(0);
    if (layer.per_channel) t = acc;
    else t = t.defined() ? fmaf(acc, scale, t) : fmaf(acc, scale, 0.0);
  }
  const at::Tensor scale = layer.per_channel ? rows.scale * w.scale.reshape({1, -1}) : rows.scale;
  const at::Tensor y = present(bias) ? fmaf(t, scale, bias->to(at::kFloat).unsqueeze(0)) : t * scale;
  out.copy_(apply_activation(y, layer.activation));
}

at::Tensor linear_dynamic_intx(const at::Tensor& input, const at::Tensor& packed, const OptTensor& bias,
                               int64_t out_features, int64_t bits, std::optional<int64_t> group_size,
                               bool has_zero_point, bool symmetric, std::string_view activation,
                               std::optional<at::ScalarType> output_dtype, int64_t activation_bits) {
  const char* op = "linear_dynamic_intx";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  check_activation_bits(op, activation_bits);
  const Layer layer = check_layer(op, input, packed, bias, out_features, bits, group_size, has_zero_point, activation,
                                  output_dtype.value_or(input.scalar_type()));
  const at::Tensor out = empty_output(input, layer);
  if (out.numel() == 0) return out;
  const at::Tensor x = as_matrix(input);
  const int64_t qmax = (1 << (activation_bits - 1)) - 1, qmin = -qmax - 1;
  linear_into(as_matrix(out), x, dynamic_params(x, qmin, qmax, symmetric), qmin, qmax, packed, bias, layer);
  return out;
}

at::Tensor linear_static_intx(const at::Tensor& input, const at::Tensor& input_scale, const OptTensor& input_zero_point,
                              const at::Tensor& packed, const OptTensor& bias, int64_t out_features, int64_t bits,
                              std::optional<int64_t> group_size, bool has_zero_point, std::string_view activation,
                              at::ScalarType output_dtype, int64_t input_qmin, int64_t input_qmax) {
  const char* op = "linear_static_intx";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  check_device(op, "input_scale", input_scale, input);
  check_device(op, "input_zero_point", input_zero_point, input);
  check_static_input(op, input, input_scale, input_zero_point, input_qmin, input_qmax);
  const Layer layer =
      check_layer(op, input, packed, bias, out_features, bits, group_size, has_zero_point, activation, output_dtype);
  const at::Tensor out = empty_output(input, layer);
  if (out.numel() == 0) return out;
  const at::Tensor x = as_matrix(input), scale = input_scale.reshape({1, 1});
  const at::Tensor zero = present(input_zero_point) ? input_zero_point->reshape({1, 1}) : at::Tensor();
  linear_into(as_matrix(out), x, static_params(x, scale, zero), input_qmin, input_qmax, packed, bias, layer);
  return out;
}

// The weights of linear_intx without their scales, float32 [N, K]: exact.
at::Tensor float_integers(const Weight& w, const IntxShape& s) {
  const at::Tensor zero = w.zero.to(at::kFloat).repeat_interleave(s.group(), 1).narrow(1, 0, s.k);
  return w.q.to(at::kFloat) - zero;
}

// x float32 [M, K] -> float32 [M, N]. The sums of all groups advance together, one input of each at a time.
at::Tensor product_in_order(const at::Tensor& x, const at::Tensor& integers, const Weight& w, const IntxShape& s) {
  const int64_t groups = s.groups(), size = s.group(), last = s.inputs(groups - 1), missing = groups * size - s.k;
  const at::Tensor left = at::constant_pad_nd(x, {0, missing}).reshape({x.size(0), 1, groups, size});
  const at::Tensor right = at::constant_pad_nd(integers, {0, missing}).reshape({s.n, groups, size});
  const at::Tensor sums = at::zeros({x.size(0), s.n, groups}, x.options());
  for (int64_t i = 0; i < size; ++i) {
    const int64_t count = i < last ? groups : groups - 1;
    const at::Tensor sum = sums.narrow(2, 0, count);
    sum.copy_(fmaf(left.select(3, i).narrow(2, 0, count), right.select(2, i).narrow(1, 0, count), sum));
  }
  at::Tensor t = at::zeros({}, x.options());
  for (int64_t g = 0; g < groups; ++g) t = fmaf(sums.select(2, g), w.scale.select(1, g), t);
  return t;
}

// The device's own product, in which the order of a sum is not known. In the specification's order it would be thousands
// of kernels, one after the other.
at::Tensor product_of_device(const at::Tensor& x, const at::Tensor& integers, const Weight& w, const IntxShape& s) {
  const at::Tensor scale = w.scale.repeat_interleave(s.group(), 1).narrow(1, 0, s.k);
  return at::matmul(x, (integers * scale).t());
}

template <bool kInOrder>
at::Tensor linear_intx(const at::Tensor& input, const at::Tensor& packed, const OptTensor& bias, int64_t out_features,
                       int64_t bits, std::optional<int64_t> group_size, bool has_zero_point,
                       std::string_view activation, std::optional<at::ScalarType> output_dtype) {
  const char* op = "linear_intx";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  const Layer layer = check_layer(op, input, packed, bias, out_features, bits, group_size, has_zero_point, activation,
                                  output_dtype.value_or(input.scalar_type()));
  const at::Tensor out = empty_output(input, layer);
  if (out.numel() == 0) return out;
  const IntxShape& s = layer.shape;
  const Weight w = unpacked(packed, s);
  const at::Tensor x = as_matrix(input), y = as_matrix(out), integers = float_integers(w, s);
  const int64_t rows = x.size(0), at_once = kInOrder ? std::max<int64_t>(1, kBlockElements / (s.n * s.groups())) : rows;
  for (int64_t first = 0; first < rows; first += at_once) {
    const int64_t count = std::min(at_once, rows - first);
    const at::Tensor part = x.narrow(0, first, count).to(at::kFloat);
    at::Tensor t = kInOrder ? product_in_order(part, integers, w, s) : product_of_device(part, integers, w, s);
    if (present(bias)) t = t + bias->to(at::kFloat);
    y.narrow(0, first, count).copy_(apply_activation(t, layer.activation));
  }
  return out;
}

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::pack_intx_weight>(&pack_intx_weight);
  m.impl<ops::unpack_intx_weight>(&unpack_intx_weight);
  m.impl<ops::linear_dynamic_intx>(&linear_dynamic_intx);
  m.impl<ops::linear_static_intx>(&linear_static_intx);
}

TORCHQUANT_ATEN_KERNEL_ON_CUDA(ops::linear_intx, &linear_intx<false>)
TORCHQUANT_ATEN_KERNEL_AS_ATEN(ops::linear_intx, &linear_intx<true>)

}  // namespace
}  // namespace torchquant::intx
