// int8_mm, linear_dynamic, linear_static: one fused call each, from rows of activations to the finished output.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "isa.h"
#include "cpu/gemm_driver.h"
#include "cpu/output.h"
#include "cpu/rows.h"

namespace torchquant {
namespace {

std::vector<int64_t> output_sizes(const at::Tensor& input, int64_t out_features) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = out_features;
  return sizes;
}

// The tensor itself where its rows lie a fixed distance apart, else a copy.
at::Tensor as_rows(const at::Tensor& input) {
  return input.is_contiguous() || row_stride(input) ? input : input.contiguous();
}
int64_t distance(const at::Tensor& rows) { return row_stride(rows).value_or(rows.size(-1)); }  // none: no rows at all

OutType out_type_from(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16: return OutType::kBF16;
    case at::kHalf: return OutType::kF16;
    case at::kChar: return OutType::kI8;
    case at::kByte: return OutType::kU8;
    default: return OutType::kF32;
  }
}

// What is the same for every kind of input: the weight's side of the call. Tensors that had to be converted live in
// `keep` until the call is over.
struct WeightSide {
  GemmArgs args{};
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
  side.keep.reserve(3);
  side.args.k = k;
  side.args.n = n;
  side.args.packed = packed.const_data_ptr<int8_t>();
  side.args.weight_scale = contiguous_in(side, weight_scale, n).const_data_ptr<float>();
  if (weight_zero_point && weight_zero_point->defined()) {
    check_channels(op, "weight_zero_point", *weight_zero_point, at::kInt, n, true);
    side.args.weight_zero = contiguous_in(side, *weight_zero_point, n).const_data_ptr<int32_t>();
    check_zero_points(op, "weight_zero_point", side.args.weight_zero, n, -128, 127);
  }
  if (bias && bias->defined()) {
    const bool integer = check_bias(op, *bias, integer_bias_allowed, n);
    const at::Tensor& b = contiguous_in(side, *bias, n);
    if (integer) side.args.bias_i32 = b.const_data_ptr<int32_t>();
    else side.args.bias = b.const_data_ptr<float>();
  }
  side.args.activation = activation_from(op, activation);
  return side;
}

QuantizeRowsArgs float_rows(const at::Tensor& rows, int64_t k, RowMode mode, int64_t bits = 8) {
  QuantizeRowsArgs q{};
  q.x = rows.const_data_ptr();
  q.x_type = float_type(rows.scalar_type());
  q.x_stride = distance(rows);
  q.k = k;
  q.mode = mode;
  q.qmax = (1 << (bits - 1)) - 1;
  q.qmin = -q.qmax - 1;
  return q;
}

// Rows [m0, m1) of the input into panel rows from m0 - first on.
void quantize_into(QuantizeRowsArgs q, const KernelTable& table, const Panel& panel, int64_t m0, int64_t m1,
                   int64_t first) {
  const int64_t element = q.x_type == FloatType::kF32 ? 4 : 2;
  q.x = static_cast<const char*>(q.x) + first * q.x_stride * element;
  q.offset = table.panel_offset;
  q.q = panel.q;
  q.panel_rows = panel.block_rows;
  q.row_scale = panel.row_scale;
  q.row_zero = panel.row_zero;
  q.row_term = panel.row_term;
  table.quantize_rows(q, m0 - first, m1 - first);
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
  const int64_t m = rows.numel() / k;
  at::Tensor out = empty_output(output_sizes(input, n), input.options().dtype(out_dtype));
  if (m == 0) return out;
  side.args.out_type = out_type_from(out_dtype);
  side.args.c = out.mutable_data_ptr();
  side.args.ldc = n;
  side.args.same_row_zero = symmetric;
  const KernelTable& table = kernels();
  const QuantizeRowsArgs q =
      float_rows(rows, k, symmetric ? RowMode::kSymmetric : RowMode::kAsymmetric, activation_bits);
  run_linear(table, side.args, m, out.element_size(), side.args.weight_zero != nullptr,
             [&](const Panel& panel, int64_t m0, int64_t m1, int64_t first) {
               quantize_into(q, table, panel, m0, m1, first);
             });
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
  const int64_t m = rows.numel() / k;
  const std::vector<std::string> names = activations.vec();
  std::vector<at::Tensor> outputs;
  std::vector<WeightSide> sides;
  c10::SmallVector<GemmArgs, 4> parts;
  const auto part_of = [](const std::optional<at::Tensor>& t, int64_t first, int64_t n) -> std::optional<at::Tensor> {
    return t && t->defined() ? std::optional<at::Tensor>(t->narrow(0, first, n)) : std::nullopt;
  };
  int64_t first = 0, tile = 0;
  for (size_t i = 0; i < out_features.size(); ++i) {
    const int64_t n = out_features[i];
    sides.push_back(weight_side(op, packed.narrow(0, tile, num_tiles(n)), weight_scale.narrow(0, first, n),
                                part_of(weight_zero_point, first, n), part_of(bias, first, n), false, n, k,
                                activations.empty() ? std::string_view("none") : std::string_view(names[i])));
    outputs.push_back(empty_output(output_sizes(input, n), input.options().dtype(out_dtype)));
    GemmArgs args = sides.back().args;
    args.out_type = out_type_from(out_dtype);
    args.c = outputs.back().mutable_data_ptr();
    args.ldc = n;
    args.same_row_zero = symmetric;
    parts.push_back(args);
    first += n;
    tile += num_tiles(n);
  }
  if (m == 0) return outputs;
  const KernelTable& table = kernels();
  const QuantizeRowsArgs q = float_rows(rows, k, symmetric ? RowMode::kSymmetric : RowMode::kAsymmetric);
  run_linear(
      table, parts, m, c10::elementSize(out_dtype), parts[0].weight_zero != nullptr,
      [&](const Panel& panel, int64_t m0, int64_t m1, int64_t row0) { quantize_into(q, table, panel, m0, m1, row0); });
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

void copy_into(const at::Tensor& rows, const InputParams& params, const KernelTable& table, const Panel& panel,
               int64_t m0, int64_t m1, int64_t first) {
  const bool is_signed = rows.scalar_type() == at::kChar;
  const int64_t stride = distance(rows);
  CopyRowsArgs g{};
  g.x = static_cast<const uint8_t*>(rows.const_data_ptr()) + first * stride;
  g.x_stride = stride;
  g.k = rows.size(-1);
  g.x_signed = is_signed;
  g.shift = is_signed ? table.panel_offset : table.panel_offset - 128;
  g.q = panel.q;
  g.panel_rows = panel.block_rows;
  g.row_zero = panel.row_zero;
  g.row_term = panel.row_term;
  const float* scale = params.scale.defined() ? params.scale.const_data_ptr<float>() : nullptr;
  const int32_t* zero = params.zero.defined() ? params.zero.const_data_ptr<int32_t>() : nullptr;
  const bool row_scales = scale && params.scale.numel() > 1, row_zeros = zero && params.zero.numel() > 1;
  for (int64_t m = m0; m < m1; ++m) {
    panel.row_scale[m - first] = scale ? scale[row_scales ? m : 0] : 1.0f;
    panel.row_zero[m - first] = (zero ? zero[row_zeros ? m : 0] : 0) + g.shift;
  }
  table.copy_rows(g, m0 - first, m1 - first);
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
  const int64_t m = rows.numel() / k;
  const InputParams params = input_params(op, input, input_scale, input_zero_point);

  check_linear_output(op, output_dtype, output_scale, output_zero_point, output_qmin, output_qmax);
  side.args.out_type = out_type_from(output_dtype);
  if (output_scale && output_scale->defined()) {
    check_scale(op, "output_scale", *output_scale->const_data_ptr<float>());
    side.args.inv_out_scale = 1.0f / *output_scale->const_data_ptr<float>();
    side.args.out_zero = static_cast<int32_t>(output_zero_point);
    side.args.out_lo = static_cast<float>(output_qmin - output_zero_point);
    side.args.out_hi = static_cast<float>(output_qmax - output_zero_point);
  }

  QuantizeRowsArgs q{};
  if (float_input) {
    q = float_rows(rows, k, RowMode::kStatic);
    q.scale = *params.scale.const_data_ptr<float>();
    check_scale(op, "input_scale", q.scale);
    q.zero_point = params.zero.defined() ? *params.zero.const_data_ptr<int32_t>() : 0;
    TORCH_CHECK_VALUE(-128 <= input_qmin && input_qmin < input_qmax && input_qmax <= 127 &&
                          input_qmin <= q.zero_point && q.zero_point <= input_qmax,
                      op, ": input_qmin <= input_zero_point <= input_qmax must lie within -128 .. 127, got ",
                      input_qmin, ", ", q.zero_point, ", ", input_qmax);
    q.qmin = static_cast<int32_t>(input_qmin);
    q.qmax = static_cast<int32_t>(input_qmax);
  }

  at::Tensor out = empty_output(output_sizes(input, n), input.options().dtype(output_dtype));
  if (m == 0) return out;
  side.args.c = out.mutable_data_ptr();
  side.args.ldc = n;
  side.args.same_row_zero = !params.zero.defined() || params.zero.numel() == 1;
  const KernelTable& table = kernels();
  const bool want_term = side.args.weight_zero != nullptr;
  if (float_input) {
    run_linear(table, side.args, m, out.element_size(), want_term,
               [&](const Panel& panel, int64_t m0, int64_t m1, int64_t first) {
                 quantize_into(q, table, panel, m0, m1, first);
               });
  } else {
    run_linear(table, side.args, m, out.element_size(), want_term,
               [&](const Panel& panel, int64_t m0, int64_t m1, int64_t first) {
                 copy_into(rows, params, table, panel, m0, m1, first);
               });
  }
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
  const int64_t m = rows.numel() / k;
  at::Tensor out = empty_output(output_sizes(input, n), input.options().dtype(at::kInt));
  if (m == 0) return out;
  GemmArgs args{};
  args.k = k;
  args.n = n;
  args.packed = packed.const_data_ptr<int8_t>();
  args.out_type = OutType::kI32;
  args.c = out.mutable_data_ptr();
  args.ldc = n;
  args.same_row_zero = true;
  const KernelTable& table = kernels();
  run_linear(table, args, m, 4, false, [&](const Panel& panel, int64_t m0, int64_t m1, int64_t first) {
    copy_into(rows, InputParams{}, table, panel, m0, m1, first);
  });
  return out;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("int8_mm", &int8_mm);
  m.impl("linear_dynamic", &linear_dynamic);
  m.impl("linear_dynamic_split", &linear_dynamic_split);
  m.impl("linear_static", &linear_static);
}

}  // namespace
}  // namespace torchquant
