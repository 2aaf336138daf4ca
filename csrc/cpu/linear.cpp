// int8_mm, linear_dynamic, linear_static: one fused call each, from rows of activations to the finished output.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/core_call.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant {
namespace {

std::vector<int64_t> output_sizes(const at::Tensor& input, int64_t out_features) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = out_features;
  return sizes;
}

// What is the same for every kind of input: the weight and the output. `keep` holds tensors that had to be converted
// until the call is over.
struct WeightSide {
  tq_linear_part part{};
  std::vector<at::Tensor> keep;
};

const at::Tensor& contiguous_in(WeightSide& side, const at::Tensor& t, int64_t n) {
  if (t.numel() == n && t.is_contiguous()) return t;
  side.keep.push_back(t.expand({n}).contiguous());
  return side.keep.back();
}

WeightSide weight_side(const char* op, const at::Tensor& packed, const at::Tensor& weight_scale,
                       const std::optional<at::Tensor>& weight_zero_point, const std::optional<at::Tensor>& bias,
                       bool integer_bias_allowed, int64_t n, int64_t k, std::string_view activation) {
  check_packed(op, packed, n, k);
  check_channels(op, "weight_scale", weight_scale, at::kFloat, n, true);
  WeightSide side;
  side.part.n = n;
  side.part.packed = packed.const_data_ptr<int8_t>();
  side.part.weight_scale = contiguous_in(side, weight_scale, n).const_data_ptr<float>();
  if (weight_zero_point && weight_zero_point->defined()) {
    check_channels(op, "weight_zero_point", *weight_zero_point, at::kInt, n, true);
    side.part.weight_zero_point = contiguous_in(side, *weight_zero_point, n).const_data_ptr<int32_t>();
    check_zero_points(op, "weight_zero_point", side.part.weight_zero_point, n, -128, 127);
  }
  if (bias && bias->defined()) {
    const bool integer = check_bias(op, *bias, integer_bias_allowed, n);
    const bool converted = !integer && bias->scalar_type() != at::kFloat;
    if (converted) side.keep.push_back(bias->to(at::kFloat));  // exact
    const at::Tensor& b = contiguous_in(side, converted ? side.keep.back() : *bias, n);
    if (integer) side.part.integer_bias = b.const_data_ptr<int32_t>();
    else side.part.bias = b.const_data_ptr<float>();
  }
  side.part.activation = activation_of(op, activation);
  return side;
}

void set_output(tq_linear_part& part, const at::Tensor& out) {
  part.out_type = type_of(out);
  part.out = out.mutable_data_ptr();
  part.out_stride = part.n;
}

// Float rows with a scale of their own.
tq_linear_input dynamic_input(const at::Tensor& rows, int64_t k, bool symmetric, int64_t bits = 8) {
  tq_linear_input in{};
  in.rows = rows_of(rows, k);
  in.quantization.mode = symmetric ? TQ_SYMMETRIC : TQ_ASYMMETRIC;
  in.quantization.qmax = (1 << (bits - 1)) - 1;
  in.quantization.qmin = -in.quantization.qmax - 1;
  return in;
}

at::Tensor linear_dynamic(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                          const std::optional<at::Tensor>& weight_zero_point, const std::optional<at::Tensor>& bias,
                          int64_t out_features, bool symmetric, std::string_view activation,
                          std::optional<at::ScalarType> output_dtype, int64_t activation_bits) {
  const char* op = "linear_dynamic";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  check_activation_bits(op, activation_bits);
  const int64_t n = out_features, k = input.size(-1);
  WeightSide side = weight_side(op, packed, weight_scale, weight_zero_point, bias, false, n, k, activation);
  const at::ScalarType out_dtype = output_dtype.value_or(input.scalar_type());
  check_float_type(op, "output_dtype", out_dtype);
  const at::Tensor rows = as_rows(input);
  at::Tensor out = empty_output(output_sizes(input, n), input.options().dtype(out_dtype));
  set_output(side.part, out);
  const tq_linear_input in = dynamic_input(rows, k, symmetric, activation_bits);
  check_status(tq_linear(&in, &side.part, 1, &kTorchThreads));
  return out;
}

// linear_dynamic for several weights, one after the other in `packed`: the input is quantized once.
std::vector<at::Tensor> linear_dynamic_split(const at::Tensor& input, const at::Tensor& packed,
                                             const at::Tensor& weight_scale,
                                             const std::optional<at::Tensor>& weight_zero_point,
                                             const std::optional<at::Tensor>& bias, at::IntArrayRef out_features,
                                             bool symmetric, const c10::List<std::string>& activations,
                                             std::optional<at::ScalarType> output_dtype) {
  const char* op = "linear_dynamic_split";
  check_split(op, input, packed, weight_scale, weight_zero_point, bias, out_features, activations.size());
  const int64_t k = input.size(-1);
  const at::ScalarType out_dtype = output_dtype.value_or(input.scalar_type());
  check_float_type(op, "output_dtype", out_dtype);
  const at::Tensor rows = as_rows(input);
  const std::vector<std::string> names = activations.vec();
  std::vector<at::Tensor> outputs;
  std::vector<WeightSide> sides;
  c10::SmallVector<tq_linear_part, 4> parts;
  const auto part_of = [](const std::optional<at::Tensor>& t, int64_t first, int64_t n) -> std::optional<at::Tensor> {
    return t && t->defined() ? std::optional<at::Tensor>(t->narrow(0, first, n)) : std::nullopt;
  };
  int64_t first = 0, row = 0;
  for (size_t i = 0; i < out_features.size(); ++i) {
    const int64_t n = out_features[i], height = packed_shape(PackedFormat::kInt8Tiles, n, k).rows;
    sides.push_back(weight_side(op, packed.narrow(0, row, height), weight_scale.narrow(0, first, n),
                                part_of(weight_zero_point, first, n), part_of(bias, first, n), false, n, k,
                                activations.empty() ? std::string_view("none") : std::string_view(names[i])));
    outputs.push_back(empty_output(output_sizes(input, n), input.options().dtype(out_dtype)));
    set_output(sides.back().part, outputs.back());
    parts.push_back(sides.back().part);
    first += n;
    row += height;
  }
  const tq_linear_input in = dynamic_input(rows, k, symmetric);
  check_status(tq_linear(&in, parts.data(), static_cast<int64_t>(parts.size()), &kTorchThreads));
  return outputs;
}

// Zero points and scales of int8 or uint8 input, per tensor or per row.
struct InputParams {
  at::Tensor scale, zero;  // [1] or [m], contiguous
};

InputParams input_params(const char* op, const at::Tensor& input, const at::Tensor& scale,
                         const std::optional<at::Tensor>& zero_point) {
  check_input_parameter(op, "input_scale", scale, at::kFloat, input);
  InputParams p{scale.contiguous(), {}};
  if (zero_point && zero_point->defined()) {
    check_input_parameter(op, "input_zero_point", *zero_point, at::kInt, input);
    p.zero = zero_point->contiguous();
    const bool is_unsigned = input.scalar_type() == at::kByte;
    if (p.zero.numel() > 0)
      check_zero_points(op, "input_zero_point", p.zero.const_data_ptr<int32_t>(), p.zero.numel(),
                        is_unsigned ? 0 : -128, is_unsigned ? 255 : 127);
  }
  return p;
}

at::Tensor linear_static(const at::Tensor& input, const at::Tensor& input_scale,
                         const std::optional<at::Tensor>& input_zero_point, const at::Tensor& packed,
                         const at::Tensor& weight_scale, const std::optional<at::Tensor>& weight_zero_point,
                         const std::optional<at::Tensor>& bias, int64_t out_features, std::string_view activation,
                         at::ScalarType output_dtype, const std::optional<at::Tensor>& output_scale,
                         int64_t output_zero_point, int64_t output_qmin, int64_t output_qmax, int64_t input_qmin,
                         int64_t input_qmax) {
  const char* op = "linear_static";
  check_linear_input(op, input);
  const bool float_input = is_float_input(input.scalar_type());
  const int64_t n = out_features, k = input.size(-1);
  WeightSide side = weight_side(op, packed, weight_scale, weight_zero_point, bias, true, n, k, activation);
  const at::Tensor rows = as_rows(input);
  const InputParams params = input_params(op, input, input_scale, input_zero_point);

  check_linear_output(op, output_dtype, output_scale, output_zero_point, output_qmin, output_qmax);
  if (output_scale && output_scale->defined()) {
    side.part.out_scale = *output_scale->const_data_ptr<float>();
    check_scale(op, "output_scale", side.part.out_scale);
    side.part.out_zero_point = static_cast<int32_t>(output_zero_point);
    side.part.out_qmin = static_cast<int32_t>(output_qmin);
    side.part.out_qmax = static_cast<int32_t>(output_qmax);
  }

  tq_linear_input in{};
  in.rows = rows_of(rows, k);
  if (float_input) {
    tq_row_quantization& q = in.quantization;
    q.mode = TQ_STATIC;
    q.scale = *params.scale.const_data_ptr<float>();
    check_scale(op, "input_scale", q.scale);
    q.zero_point = params.zero.defined() ? *params.zero.const_data_ptr<int32_t>() : 0;
    TORCH_CHECK_VALUE(-128 <= input_qmin && input_qmin < input_qmax && input_qmax <= 127 &&
                          input_qmin <= q.zero_point && q.zero_point <= input_qmax,
                      op, ": input_qmin <= input_zero_point <= input_qmax must lie within -128 .. 127, got ",
                      input_qmin, ", ", q.zero_point, ", ", input_qmax);
    q.qmin = static_cast<int32_t>(input_qmin);
    q.qmax = static_cast<int32_t>(input_qmax);
  } else {
    in.scale = params.scale.const_data_ptr<float>();
    in.scale_per_row = params.scale.numel() > 1;
    if (params.zero.defined()) {
      in.zero_point = params.zero.const_data_ptr<int32_t>();
      in.zero_point_per_row = params.zero.numel() > 1;
    }
  }

  at::Tensor out = empty_output(output_sizes(input, n), input.options().dtype(output_dtype));
  set_output(side.part, out);
  check_status(tq_linear(&in, &side.part, 1, &kTorchThreads));
  return out;
}

at::Tensor int8_mm(const at::Tensor& input, const at::Tensor& packed, int64_t out_features) {
  const char* op = "int8_mm";
  check_byte(op, "input", input);
  check_dim(op, "input", input, 1);
  const int64_t n = out_features, k = input.size(-1);
  check_packed(op, packed, n, k);
  check_product_inputs(op, k);
  const at::Tensor rows = as_rows(input);
  at::Tensor out = empty_output(output_sizes(input, n), input.options().dtype(at::kInt));
  tq_linear_part part{};
  part.n = n;
  part.packed = packed.const_data_ptr<int8_t>();
  set_output(part, out);
  tq_linear_input in{};
  in.rows = rows_of(rows, k);
  check_status(tq_linear(&in, &part, 1, &kTorchThreads));
  return out;
}

// The canonical int8 [N, K] <-> the layout that the kernels read (csrc/formats/int8_tiles.h).
at::Tensor pack_weight(const at::Tensor& weight) {
  check_weight("pack_weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  const PackedShape shape = packed_shape(PackedFormat::kInt8Tiles, n, k);
  at::Tensor packed = at::empty({shape.rows, shape.columns}, weight.options());
  check_status(tq_pack_weight(weight.const_data_ptr<int8_t>(), weight.stride(0), weight.stride(1), n, k,
                              packed.mutable_data_ptr<int8_t>(), &kTorchThreads));
  return packed;
}

at::Tensor unpack_weight(const at::Tensor& packed, int64_t out_features, int64_t in_features) {
  check_packed("unpack_weight", packed, out_features, in_features);
  at::Tensor weight = at::empty({out_features, in_features}, packed.options());
  check_status(tq_unpack_weight(packed.const_data_ptr<int8_t>(), out_features, in_features,
                                weight.mutable_data_ptr<int8_t>(), &kTorchThreads));
  return weight;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::pack_weight::implement(m, &pack_weight);
  ops::unpack_weight::implement(m, &unpack_weight);
  ops::int8_mm::implement(m, &int8_mm);
  ops::linear_dynamic::implement(m, &linear_dynamic);
  ops::linear_dynamic_split::implement(m, &linear_dynamic_split);
  ops::linear_static::implement(m, &linear_static);
}

}  // namespace
}  // namespace torchquant
