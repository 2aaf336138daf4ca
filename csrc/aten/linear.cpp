// int8_mm, linear_dynamic, linear_dynamic_split, linear_static: torchquant/functional/linear.py in ATen. The product of
// int8 matrices is ATen's _int_mm (tensor cores on CUDA), all else is elementwise on its int32 sums:
//
//   sum_k (x - zx)(w - zw) = sum x w  -  zx * sum w  -  zw * (sum x - K zx)
//                            _int_mm     packed_sums    row_term
//
// uint8 input is read as int8, 128 less, and so is its zero point. Up to K = 33,025 no step leaves int32, whatever the
// integers: |sum (x - zx) w| and |zw (sum x - K zx)| are at most 255 * 128 * K each, and so is the first product alone.
#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/checks.h"
#include "aten/activations.h"
#include "common/arithmetic.h"
#include "aten/blocks.h"
#include "common/device.h"
#include "aten/packed.h"
#include "aten/register.h"
#include "aten/rows.h"
#include "common/tensors.h"

namespace torchquant {
namespace {

// CUDA's _int_mm refuses less than 17 rows, and its library some shapes that are no multiples of 4 or 8, depending on the
// device. Rows, outputs and inputs are multiples of 32, 16 and 64 here, rows start at multiples of 16 bytes.
constexpr int64_t kRowMultiple = 32;
constexpr int64_t kRowAlignment = 16;
// 128 * 128 * K stays below 2^31: libraries may saturate their sums instead of wrapping around. A multiple of 64.
constexpr int64_t kMaxSignedChunkK = 131'008;
constexpr int64_t kProductElements = int64_t{1} << 26;  // int32 sums at a time
constexpr int64_t kLeastHeight = 64;                    // rows of such a block, a multiple of kRowMultiple

constexpr int64_t padded_m(int64_t m) { return ceil_div(m, kRowMultiple) * kRowMultiple; }

// ---------------------------------------------------------------- rows of activations

struct Rows {
  int64_t m = 0, k = 0;
  at::Tensor q;      // int8 [padded_m(m), padded_row(k)], zeros behind m and k
  at::Tensor scale;  // float32 [m, 1] or [1, 1]
  at::Tensor zero;   // int32 [m, 1] or [1, 1]; undefined: 0
};

at::Tensor padded_rows(const at::Tensor& like, int64_t m, int64_t k) {
  const int64_t rows = padded_m(m), k64 = padded_row(k);
  const at::Tensor q = at::empty({rows, k64}, like.options().dtype(at::kChar));
  if (k < k64) q.narrow(0, 0, m).narrow(1, k, k64 - k).zero_();
  if (m < rows) q.narrow(0, m, rows - m).zero_();
  return q;
}
at::Tensor filled(const at::Tensor& q, int64_t m, int64_t k) { return q.narrow(0, 0, m).narrow(1, 0, k); }

Rows float_rows(const at::Tensor& x, const RowParams& p, int64_t qmin, int64_t qmax) {
  Rows rows{x.size(0), x.size(1), padded_rows(x, x.size(0), x.size(1)), p.scale, p.zero};
  quantize_into(filled(rows.q, rows.m, rows.k), x, p, qmin, qmax);
  return rows;
}

bool is_aligned(const at::Tensor& t) {  // allocations of torch are aligned; memory from elsewhere need not be
  if (t.storage_offset() * t.element_size() % kRowAlignment != 0) return false;
  return !t.is_cuda() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kRowAlignment == 0;
}

Rows byte_rows(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero) {
  Rows rows{x.size(0), x.size(1), {}, scale, zero};
  const bool is_signed = x.scalar_type() == at::kChar;
  const bool as_it_is = is_signed && rows.m % kRowMultiple == 0 && padded_row(rows.k) == rows.k && x.stride(1) == 1 &&
                        x.stride(0) >= rows.k && x.stride(0) % kRowAlignment == 0 && is_aligned(x);
  rows.q = as_it_is ? x : padded_rows(x, rows.m, rows.k);
  at::Tensor to = filled(rows.q, rows.m, rows.k);
  if (is_signed) {
    if (!as_it_is) to.copy_(x);
    return rows;
  }
  at::Tensor bytes = to.view(at::kByte);
  at::bitwise_xor_out(bytes, x, 128);
  rows.zero = zero.defined() ? zero - 128 : at::full({1, 1}, -128, x.options().dtype(at::kInt));
  return rows;
}

// ---------------------------------------------------------------- the weight's side of a call

struct Weight {
  int64_t n = 0;
  at::Tensor q;      // int8 [N16, K64]
  at::Tensor sums;   // int32 [1, n], of each output's weights
  at::Tensor scale;  // float32 [1, n] or [1, 1]
  at::Tensor zero;   // int32 [1, n] or [1, 1]; undefined: 0
  at::Tensor bias;   // float32 or (integer_bias) int32 [1, n], or undefined
  bool integer_bias = false;
  Activation activation = Activation::kNone;
};

at::Tensor as_row(const OptTensor& t) { return present(t) ? t->reshape({1, -1}) : at::Tensor(); }

Weight packed_side(const char* op, const at::Tensor& input, const at::Tensor& packed, int64_t n, int64_t k) {
  check_device(op, "packed", packed, input);
  check_packed_rows(op, packed, n, k);
  Weight w;
  w.n = n;
  const at::Tensor aligned = packed.storage_offset() % kRowAlignment == 0 ? packed : packed.clone();
  w.q = packed_weight(aligned, n);
  w.sums = packed_sums(aligned, n).narrow(0, 0, n).unsqueeze(0);
  return w;
}

Weight weight_side(const char* op, const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                   const OptTensor& weight_zero_point, const OptTensor& bias, bool integer_bias_allowed, int64_t n,
                   int64_t k, std::string_view activation) {
  Weight w = packed_side(op, input, packed, n, k);
  check_device(op, "weight_scale", weight_scale, input);
  check_device(op, "weight_zero_point", weight_zero_point, input);
  check_device(op, "bias", bias, input);
  check_channels(op, "weight_scale", weight_scale, at::kFloat, n, true);
  if (present(weight_zero_point)) check_channels(op, "weight_zero_point", *weight_zero_point, at::kInt, n, true);
  if (present(bias)) w.integer_bias = check_bias(op, *bias, integer_bias_allowed, n);
  w.scale = as_row(weight_scale);
  w.zero = as_row(weight_zero_point);
  w.bias = as_row(bias);
  if (w.bias.defined() && !w.integer_bias) w.bias = w.bias.to(at::kFloat);  // exact
  w.activation = activation_from(op, activation);
  return w;
}

// ---------------------------------------------------------------- product and epilogue

at::Tensor int8_product(const at::Tensor& q, const at::Tensor& w) {
  return at::_int_mm(q, w.t());
}  // int32 [rows, N16]

at::Tensor wide_product(const at::Tensor& q, const at::Tensor& w) {  // int64, in chunks that int32 holds
  const int64_t k = q.size(1);
  at::Tensor sum;
  for (int64_t first = 0; first < k; first += kMaxSignedChunkK) {
    const int64_t chunk = std::min(kMaxSignedChunkK, k - first);
    const at::Tensor part = int8_product(q.narrow(1, first, chunk), w.narrow(1, first, chunk));
    if (sum.defined()) sum.add_(part);
    else sum = part.to(at::kLong);
  }
  return sum;
}

// Calls run(sums, first row, rows) with the products of all rows, some rows at a time.
template <class Run>
void for_products(const Rows& rows, const Weight& w, bool wide, const Run& run) {
  const int64_t total = rows.q.size(0), elements = wide ? kProductElements / 4 : kProductElements;
  const int64_t blocks = ceil_div(total, std::max(kLeastHeight, elements / w.q.size(0)));
  const int64_t height = padded_m(ceil_div(total, blocks));
  for (int64_t first = 0; first < total; first += height) {
    const at::Tensor q = rows.q.narrow(0, first, std::min(height, total - first));
    const at::Tensor sums = wide ? wide_product(q, w.q) : int8_product(q, w.q);
    const int64_t count = std::min(height, rows.m - first);
    run(filled(sums, count, w.n), first, count);
  }
}

// t's rows [first, first + count); t itself if it has one row for all, or is undefined.
at::Tensor rows_or_all(const at::Tensor& t, int64_t first, int64_t count) {
  return t.defined() && t.size(0) > 1 ? t.narrow(0, first, count) : t;
}

struct ToIntegers {    // an int8 or uint8 output
  at::Tensor inverse;  // 1 / scale, float32 [1, 1]; undefined: the output is float
  int64_t zero = 0, qmin = 0, qmax = 0;
};

// out [m, n] = (sum (x - zx)(w - zw)) * scales + bias, activated.
void linear_into(const at::Tensor& out, const Rows& rows, const Weight& w, const ToIntegers& to = {}) {
  const bool wide = w.integer_bias || rows.k > kMaxExactK;
  const auto exact = [&](const at::Tensor& t) { return t.defined() && wide ? t.to(at::kLong) : t; };
  const at::Tensor zero = exact(rows.zero), sums = exact(w.sums), weight_zero = exact(w.zero);
  at::Tensor term;
  if (weight_zero.defined()) {
    term = exact(row_sums(rows.q.narrow(0, 0, rows.m)));
    if (zero.defined()) term.sub_(zero * rows.k);
  }
  for_products(rows, w, wide, [&](const at::Tensor& product, int64_t first, int64_t count) {
    const auto of_rows = [&](const at::Tensor& t) { return rows_or_all(t, first, count); };
    in_blocks<9>({product, out.narrow(0, first, count), of_rows(rows.scale), of_rows(zero), of_rows(term), sums,
                  weight_zero, w.scale, w.bias},
                 [&](const std::array<at::Tensor, 9>& part) {
                   const auto& [acc, result, sx, zx, row_term, colsum, zw, sw, bias] = part;
                   if (zx.defined()) acc.addcmul_(zx, colsum, -1);
                   if (zw.defined()) acc.addcmul_(row_term, zw, -1);
                   if (w.integer_bias) acc.add_(bias);
                   const bool add = bias.defined() && !w.integer_bias;
                   const at::Tensor scale = sx * sw, sum = acc.to(at::kFloat);
                   at::Tensor y = apply_activation(add ? fmaf(sum, scale, bias) : sum.mul_(scale), w.activation);
                   if (to.inverse.defined())
                     y = at::mul(y, to.inverse).round_().nan_to_num_(0.0).add_(to.zero).clamp_(to.qmin, to.qmax);
                   result.copy_(y);
                 });
  });
}

at::Tensor empty_output(const at::Tensor& input, int64_t n, at::ScalarType dtype) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = n;
  return at::empty(sizes, input.options().dtype(dtype));
}

// ---------------------------------------------------------------- operators

at::Tensor int8_mm(const at::Tensor& input, const at::Tensor& packed, int64_t out_features) {
  const char* op = "int8_mm";
  check_byte(op, "input", input);
  check_dim(op, "input", input, 1);
  const int64_t n = out_features, k = input.size(-1);
  const Weight w = packed_side(op, input, packed, n, k);
  check_product_inputs(op, k);
  const at::Tensor out = empty_output(input, n, at::kInt);
  if (out.numel() == 0) return out;
  const Rows rows = byte_rows(as_matrix(input), {}, {});
  const at::Tensor result = as_matrix(out);
  for_products(rows, w, false, [&](const at::Tensor& sums, int64_t first, int64_t count) {
    if (rows.zero.defined()) sums.addcmul_(rows.zero, w.sums, -1);
    result.narrow(0, first, count).copy_(sums);
  });
  return out;
}

Rows dynamic_rows(const at::Tensor& input, bool symmetric, int64_t bits) {
  const at::Tensor x = as_matrix(input);
  const int64_t qmax = (1 << (bits - 1)) - 1, qmin = -qmax - 1;
  return float_rows(x, dynamic_params(x, qmin, qmax, symmetric), qmin, qmax);
}

at::Tensor linear_dynamic(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                          const OptTensor& weight_zero_point, const OptTensor& bias, int64_t out_features,
                          bool symmetric, std::string_view activation, std::optional<at::ScalarType> output_dtype,
                          int64_t activation_bits) {
  const char* op = "linear_dynamic";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  check_activation_bits(op, activation_bits);
  const Weight w = weight_side(op, input, packed, weight_scale, weight_zero_point, bias, false, out_features,
                               input.size(-1), activation);
  const at::ScalarType dtype = output_dtype.value_or(input.scalar_type());
  check_float_type(op, "output_dtype", dtype);
  const at::Tensor out = empty_output(input, out_features, dtype);
  if (out.numel() > 0) linear_into(as_matrix(out), dynamic_rows(input, symmetric, activation_bits), w);
  return out;
}

std::vector<at::Tensor> linear_dynamic_split(const at::Tensor& input, const at::Tensor& packed,
                                             const at::Tensor& weight_scale, const OptTensor& weight_zero_point,
                                             const OptTensor& bias, at::IntArrayRef out_features, bool symmetric,
                                             const c10::List<std::string>& activations,
                                             std::optional<at::ScalarType> output_dtype) {
  const char* op = "linear_dynamic_split";
  check_members(op, input, packed, weight_scale, weight_zero_point, bias, out_features, activations.size());
  const int64_t k = input.size(-1);
  TORCH_CHECK_VALUE(k <= kMaxK, op, ": in_features must be between 1 and ", kMaxK, ", got ", k);
  int64_t rows = 0;
  const auto height = [&](int64_t n) { return packed_shape(PackedFormat::kInt8Rows, n, k).rows; };
  for (int64_t n : out_features) rows += height(n);
  TORCH_CHECK_VALUE(packed.dim() == 2 && packed.size(0) == rows && packed.is_contiguous(), op, ": packed must hold ",
                    rows, " rows for out_features ", out_features, ", got ", describe(packed),
                    "; concatenate what torchquant.ops.pack_weight returned for each weight");
  const at::ScalarType dtype = output_dtype.value_or(input.scalar_type());
  check_float_type(op, "output_dtype", dtype);
  const std::vector<std::string> names = activations.vec();
  std::vector<Weight> weights;
  std::vector<at::Tensor> outputs;
  int64_t first = 0, row = 0;
  for (size_t i = 0; i < out_features.size(); ++i) {
    const int64_t n = out_features[i];
    const auto part = [&](const OptTensor& t) { return present(t) ? OptTensor(t->narrow(0, first, n)) : std::nullopt; };
    weights.push_back(weight_side(op, input, packed.narrow(0, row, height(n)), weight_scale.narrow(0, first, n),
                                  part(weight_zero_point), part(bias), false, n, k,
                                  names.empty() ? std::string_view("none") : std::string_view(names[i])));
    outputs.push_back(empty_output(input, n, dtype));
    first += n;
    row += height(n);
  }
  if (input.numel() == 0) return outputs;
  const Rows quantized = dynamic_rows(input, symmetric, 8);
  for (size_t i = 0; i < outputs.size(); ++i) linear_into(as_matrix(outputs[i]), quantized, weights[i]);
  return outputs;
}

at::Tensor linear_static(const at::Tensor& input, const at::Tensor& input_scale, const OptTensor& input_zero_point,
                         const at::Tensor& packed, const at::Tensor& weight_scale, const OptTensor& weight_zero_point,
                         const OptTensor& bias, int64_t out_features, std::string_view activation,
                         at::ScalarType output_dtype, const OptTensor& output_scale, int64_t output_zero_point,
                         int64_t output_qmin, int64_t output_qmax, int64_t input_qmin, int64_t input_qmax) {
  const char* op = "linear_static";
  check_linear_input(op, input);
  const Weight w = weight_side(op, input, packed, weight_scale, weight_zero_point, bias, true, out_features,
                               input.size(-1), activation);
  check_device(op, "input_scale", input_scale, input);
  check_device(op, "input_zero_point", input_zero_point, input);
  check_device(op, "output_scale", output_scale, input);
  check_input_parameter(op, "input_scale", input_scale, at::kFloat, input);
  if (present(input_zero_point)) check_input_parameter(op, "input_zero_point", *input_zero_point, at::kInt, input);
  check_linear_output(op, output_dtype, output_scale, output_zero_point, output_qmin, output_qmax);
  const bool float_input = is_float_input(input.scalar_type());
  TORCH_CHECK_VALUE(!float_input || (-128 <= input_qmin && input_qmin < input_qmax && input_qmax <= 127), op,
                    ": input_qmin <= input_zero_point <= input_qmax must lie within -128 .. 127, got ", input_qmin,
                    " and ", input_qmax);
  const at::Tensor out = empty_output(input, out_features, output_dtype);
  if (out.numel() == 0) return out;
  ToIntegers to;
  if (present(output_scale))
    to = {torchquant::reciprocal(output_scale->reshape({1, 1})), output_zero_point, output_qmin, output_qmax};
  const at::Tensor x = as_matrix(input), scale = input_scale.reshape({-1, 1});
  const at::Tensor zero = present(input_zero_point) ? input_zero_point->reshape({-1, 1}) : at::Tensor();
  linear_into(
      as_matrix(out),
      float_input ? float_rows(x, static_params(x, scale, zero), input_qmin, input_qmax) : byte_rows(x, scale, zero), w,
      to);
  return out;
}

// ---------------------------------------------------------------- the canonical int8 [N, K] <-> int8_rows.h

at::Tensor pack_weight(const at::Tensor& weight) {
  check_weight("pack_weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  const at::Tensor packed = empty_packed(weight, n, k);
  weights_of(packed, n, k).copy_(weight);
  complete_packed(packed, n, k);
  return packed;
}

at::Tensor unpack_weight(const at::Tensor& packed, int64_t out_features, int64_t in_features) {
  check_packed_rows("unpack_weight", packed, out_features, in_features);
  return weights_of(packed, out_features, in_features).clone(at::MemoryFormat::Contiguous);
}

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::pack_weight>(&pack_weight);
  m.impl<ops::unpack_weight>(&unpack_weight);
  m.impl<ops::int8_mm>(&int8_mm);
  m.impl<ops::linear_dynamic>(&linear_dynamic);
  m.impl<ops::linear_dynamic_split>(&linear_dynamic_split);
  m.impl<ops::linear_static>(&linear_static);
}

}  // namespace
}  // namespace torchquant
