// pack_intx_weight, unpack_intx_weight, linear_dynamic_intx, linear_static_intx, linear_intx.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "common/intx_arguments.h"
#include "core/torchquant_intx.h"
#include "cpu/core_call.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant::intx {
namespace {

tq_intx_shape core_shape(const IntxShape& s) { return {s.n, s.k, s.bits, s.group_size, s.has_zero}; }

void check_integers(const char* op, const char* name, const at::Tensor& t, const IntxShape& s) {
  if (s.bits == 8) return;
  const int8_t* values = t.const_data_ptr<int8_t>();
  int32_t lowest = 0, highest = 0;
  for (int64_t i = 0; i < t.numel(); ++i) {
    lowest = std::min<int32_t>(lowest, values[i]);
    highest = std::max<int32_t>(highest, values[i]);
  }
  TORCH_CHECK_VALUE(-s.middle() <= lowest && highest < s.middle(), op, ": ", name, " must be from ", -s.middle(),
                    " to ", s.middle() - 1, " for bits = ", s.bits, ", got ", lowest < -s.middle() ? lowest : highest);
}

at::Tensor pack_intx_weight(const at::Tensor& weight, const at::Tensor& weight_scale,
                            const OptTensor& weight_zero_point, int64_t bits, std::optional<int64_t> group_size) {
  const char* op = "pack_intx_weight";
  const IntxShape shape = check_intx_weight(op, weight, weight_scale, weight_zero_point, bits, group_size);
  const at::Tensor w = weight.contiguous(), scale = weight_scale.contiguous();
  const at::Tensor zero = shape.has_zero ? weight_zero_point->contiguous() : at::Tensor();
  check_integers(op, "weight", w, shape);
  if (shape.has_zero) check_integers(op, "weight_zero_point", zero, shape);
  at::Tensor packed = at::empty({num_tiles(shape.n), shape.tile_bytes()}, weight.options().dtype(at::kByte));
  const tq_intx_shape core = core_shape(shape);
  check_status(tq_pack_intx(w.const_data_ptr<int8_t>(), scale.const_data_ptr<float>(),
                            shape.has_zero ? zero.const_data_ptr<int8_t>() : nullptr, &core,
                            packed.mutable_data_ptr<uint8_t>(), &kTorchThreads));
  return packed;
}

void check_packed(const char* op, const at::Tensor& packed, const IntxShape& shape) {
  check_intx_packed(op, packed, num_tiles(shape.n), shape.tile_bytes());
  const uint8_t* tile = packed.const_data_ptr<uint8_t>();
  const int32_t* header = intx_header(tile, shape);
  TORCH_CHECK_VALUE(is_intx_tile_of(tile, shape), op, ": packed was made for out_features = ", header[1],
                    ", in_features = ", header[2], ", bits = ", header[3], ", group_size = ", header[4], " (layout ",
                    header[0], "), but this call has out_features = ", shape.n, ", in_features = ", shape.k,
                    ", bits = ", shape.bits, ", group_size = ", shape.group_size, " (layout ", kIntxVersion,
                    "); pack the weight again with pack_intx_weight");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> unpack_intx_weight(const at::Tensor& packed, int64_t out_features,
                                                                  int64_t in_features, int64_t bits,
                                                                  std::optional<int64_t> group_size,
                                                                  bool has_zero_point) {
  const char* op = "unpack_intx_weight";
  const IntxShape shape = intx_shape(op, out_features, in_features, bits, group_size, has_zero_point);
  check_packed(op, packed, shape);
  at::Tensor weight = at::empty({shape.n, shape.k}, packed.options().dtype(at::kChar));
  c10::SmallVector<int64_t, 2> sizes{shape.n};
  if (group_size) sizes.push_back(shape.groups());
  at::Tensor scale = at::empty(sizes, packed.options().dtype(at::kFloat));
  at::Tensor zero = at::zeros(sizes, packed.options().dtype(at::kChar));
  const tq_intx_shape core = core_shape(shape);
  check_status(tq_unpack_intx(packed.const_data_ptr<uint8_t>(), &core, weight.mutable_data_ptr<int8_t>(),
                              scale.mutable_data_ptr<float>(),
                              has_zero_point ? zero.mutable_data_ptr<int8_t>() : nullptr, &kTorchThreads));
  return {weight, scale, zero};
}

// What all layers do after their own checks; rows are quantized, or stay floats (how is null).
at::Tensor linear_of_rows(const char* op, const at::Tensor& input, const tq_row_quantization* how,
                          const at::Tensor& packed, const OptTensor& bias, const IntxShape& shape,
                          std::string_view activation, at::ScalarType output_dtype) {
  at::Tensor b;
  if (present(bias)) {
    check_bias(op, *bias, false, shape.n);
    b = bias->to(at::kFloat).contiguous();  // exact
  }
  check_float_type(op, "output_dtype", output_dtype);
  const at::Tensor rows = as_rows(input);
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = shape.n;
  tq_intx_part part{};
  part.shape = core_shape(shape);
  part.packed = packed.const_data_ptr<uint8_t>();
  part.bias = b.defined() ? b.const_data_ptr<float>() : nullptr;
  part.activation = activation_of(op, activation);
  at::Tensor out = empty_output(sizes, input.options().dtype(output_dtype));
  part.out_type = type_of(out);
  part.out = out.mutable_data_ptr();
  part.out_stride = shape.n;
  const tq_rows x = rows_of(rows, shape.k);
  check_status(how ? tq_linear_intx(&x, how, &part, &kTorchThreads) : tq_linear_intx_float(&x, &part, &kTorchThreads));
  return out;
}

at::Tensor linear_dynamic_intx(const at::Tensor& input, const at::Tensor& packed, const OptTensor& bias,
                               int64_t out_features, int64_t bits, std::optional<int64_t> group_size,
                               bool has_zero_point, bool symmetric, std::string_view activation,
                               std::optional<at::ScalarType> output_dtype, int64_t activation_bits) {
  const char* op = "linear_dynamic_intx";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  check_activation_bits(op, activation_bits);
  const IntxShape shape = intx_shape(op, out_features, input.size(-1), bits, group_size, has_zero_point);
  check_packed(op, packed, shape);
  tq_row_quantization how{};
  how.mode = symmetric ? TQ_SYMMETRIC : TQ_ASYMMETRIC;
  how.qmax = (1 << (activation_bits - 1)) - 1;
  how.qmin = -how.qmax - 1;
  return linear_of_rows(op, input, &how, packed, bias, shape, activation, output_dtype.value_or(input.scalar_type()));
}

at::Tensor linear_static_intx(const at::Tensor& input, const at::Tensor& input_scale, const OptTensor& input_zero_point,
                              const at::Tensor& packed, const OptTensor& bias, int64_t out_features, int64_t bits,
                              std::optional<int64_t> group_size, bool has_zero_point, std::string_view activation,
                              at::ScalarType output_dtype, int64_t input_qmin, int64_t input_qmax) {
  const char* op = "linear_static_intx";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  check_static_input(op, input, input_scale, input_zero_point, input_qmin, input_qmax);
  const IntxShape shape = intx_shape(op, out_features, input.size(-1), bits, group_size, has_zero_point);
  check_packed(op, packed, shape);
  tq_row_quantization how{};
  how.mode = TQ_STATIC;
  how.scale = *input_scale.const_data_ptr<float>();
  check_scale(op, "input_scale", how.scale);
  how.zero_point = present(input_zero_point) ? *input_zero_point->const_data_ptr<int32_t>() : 0;
  how.qmin = static_cast<int32_t>(input_qmin);
  how.qmax = static_cast<int32_t>(input_qmax);
  TORCH_CHECK_VALUE(how.qmin <= how.zero_point && how.zero_point <= how.qmax, op,
                    ": input_zero_point must be from input_qmin = ", how.qmin, " to input_qmax = ", how.qmax, ", got ",
                    how.zero_point);
  return linear_of_rows(op, input, &how, packed, bias, shape, activation, output_dtype);
}

at::Tensor linear_intx(const at::Tensor& input, const at::Tensor& packed, const OptTensor& bias, int64_t out_features,
                       int64_t bits, std::optional<int64_t> group_size, bool has_zero_point,
                       std::string_view activation, std::optional<at::ScalarType> output_dtype) {
  const char* op = "linear_intx";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  const IntxShape shape = intx_shape(op, out_features, input.size(-1), bits, group_size, has_zero_point);
  check_packed(op, packed, shape);
  return linear_of_rows(op, input, nullptr, packed, bias, shape, activation,
                        output_dtype.value_or(input.scalar_type()));
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::pack_intx_weight::implement(m, &pack_intx_weight);
  ops::unpack_intx_weight::implement(m, &unpack_intx_weight);
  ops::linear_dynamic_intx::implement(m, &linear_dynamic_intx);
  ops::linear_static_intx::implement(m, &linear_static_intx);
  ops::linear_intx::implement(m, &linear_intx);
}

}  // namespace
}  // namespace torchquant::intx
