// quantize, dequantize, quantize_per_token, quantize_rows: torchquant/functional/affine.py in ATen.
#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/spans.h"
#include "cuda/arithmetic.h"
#include "cuda/blocks.h"
#include "cuda/device.h"
#include "cuda/register.h"
#include "cuda/rows.h"

namespace torchquant {
namespace {

using OptTensor = std::optional<at::Tensor>;
using OptInt = std::optional<int64_t>;

bool present(const OptTensor& t) { return t && t->defined(); }

// Which elements share a scale, as views [a, b, c] in which scales broadcast: two where the last group is shorter.
class Granularity {
 public:
  Granularity(const char* op, const at::Tensor& input, const at::Tensor& scale, OptInt axis, OptInt group_size)
      : spans_(make_spans(op, input, scale, axis, group_size)), one_(scale.numel() == 1), grouped_(group_size) {}

  std::vector<at::Tensor> views(const at::Tensor& data) const {  // contiguous, not empty
    const Spans& s = spans_;
    if (one_) return {data.view({1, 1, data.numel()})};
    if (!grouped_) return {data.view({-1, s.channels, s.by_element ? 1 : s.length})};
    const at::Tensor rows = data.view({-1, s.row});
    const int64_t whole = s.row / s.length, tail = s.row - whole * s.length;
    std::vector<at::Tensor> parts = {rows.narrow(1, 0, s.row - tail).view({-1, whole, s.length})};
    if (tail > 0) parts.push_back(rows.narrow(1, s.row - tail, tail).unsqueeze(1));
    return parts;
  }

  std::vector<at::Tensor> parameters(const at::Tensor& t) const {  // scale, or what has its shape or holds one value
    const size_t parts = !one_ && grouped_ && spans_.row % spans_.length > 0 ? 2 : 1;
    if (!t.defined() || t.numel() == 1) return std::vector<at::Tensor>(parts, t.defined() ? t.reshape({1, 1, 1}) : t);
    if (!grouped_) return {t.reshape({1, -1, 1})};
    const at::Tensor groups = t.reshape({-1, spans_.per_row, 1});
    if (parts == 1) return {groups};
    return {groups.narrow(1, 0, spans_.per_row - 1), groups.narrow(1, spans_.per_row - 1, 1)};
  }

 private:
  Spans spans_;
  bool one_, grouped_;
};

// run(in, out, scale, zero) on corresponding views, block by block.
template <class Run>
void for_scales(const Granularity& granularity, const at::Tensor& in, const at::Tensor& out, const at::Tensor& scale,
                const at::Tensor& zero, const Run& run) {
  const auto from = granularity.views(in), to = granularity.views(out);
  const auto scales = granularity.parameters(scale), zeros = granularity.parameters(zero);
  for (size_t i = 0; i < from.size(); ++i)
    in_blocks<4>({from[i], to[i], scales[i], zeros[i]},
                 [&](const std::array<at::Tensor, 4>& t) { run(t[0], t[1], t[2], t[3]); });
}

struct ZeroPoint {
  at::Tensor value;  // float32, exact for the integers allowed; undefined: 0
  bool real = false;
};

ZeroPoint check_parameters(const char* op, const at::Tensor& input, const at::Tensor& scale,
                           const OptTensor& zero_point) {
  check_device(op, "scale", scale, input);
  check_device(op, "zero_point", zero_point, input);
  check_dtype(op, "scale", scale, at::kFloat);
  if (!present(zero_point)) return {};
  const bool real = check_zero_point(op, *zero_point, scale);
  return {zero_point->to(at::kFloat), real};
}

at::Tensor quantize(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
                    int64_t qmax, OptInt axis, OptInt group_size, at::ScalarType dtype) {
  const char* op = "quantize";
  check_float(op, "input", input);
  check_byte_range(op, dtype, qmin, qmax);
  const Granularity granularity(op, input, scale, axis, group_size);
  const ZeroPoint zero = check_parameters(op, input, scale, zero_point);
  const at::Tensor x = input.contiguous(), out = at::empty(x.sizes(), x.options().dtype(dtype));
  if (x.numel() == 0) return out;
  for_scales(granularity, x, out, torchquant::reciprocal(scale), zero.value,
             [&](const at::Tensor& x, const at::Tensor& q, const at::Tensor& inverse, const at::Tensor& z) {
               // float32, also of a half type: scale and zero point have dimensions
               at::Tensor y = zero.real ? at::sub(x, z).mul_(inverse) : at::mul(x, inverse);
               y.round_().nan_to_num_(0.0);
               // Before the clamp: adding rounds monotonically and is exact where the sum is within the limits.
               if (z.defined() && !zero.real) y.add_(z);
               q.copy_(y.clamp_(qmin, qmax));
             });
  return out;
}

at::Tensor dequantize(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, OptInt axis,
                      OptInt group_size, at::ScalarType dtype) {
  const char* op = "dequantize";
  check_byte(op, "input", input);
  check_float_type(op, "dtype", dtype);
  const Granularity granularity(op, input, scale, axis, group_size);
  const ZeroPoint zero = check_parameters(op, input, scale, zero_point);
  const at::Tensor q = input.contiguous(), out = at::empty(q.sizes(), q.options().dtype(dtype));
  if (q.numel() == 0) return out;
  for_scales(granularity, q, out, scale, zero.value,
             [&](const at::Tensor& q, const at::Tensor& x, const at::Tensor& s, const at::Tensor& z) {
               // the difference of integers is exact in float32
               at::Tensor y = z.defined() && !zero.real ? at::sub(q, z).mul_(s) : at::mul(q, s);
               if (zero.real) y.add_(z);
               x.copy_(y);
             });
  return out;
}

using Quantized = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Quantized rows_of(const at::Tensor& input, const RowParams& p, const at::Tensor& q) {  // in input's shape
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = 1;
  const at::Tensor zero = p.zero.defined() ? p.zero.expand_as(p.scale).contiguous()
                                           : at::zeros_like(p.scale, p.scale.options().dtype(at::kInt));
  return {q.view(input.sizes()), p.scale.view(sizes), zero.view(sizes)};
}

Quantized dynamic_rows(const at::Tensor& input, int64_t qmin, int64_t qmax, bool symmetric) {
  const at::Tensor x = as_matrix(input), q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const RowParams p = dynamic_params(x, qmin, qmax, symmetric);
  quantize_into(q, x, p, qmin, qmax);
  return rows_of(input, p, q);
}

// Rows without elements: the range is zero, and scale and zero point are given or 1 and 0.
Quantized empty_rows(const at::Tensor& input, const at::Tensor& scale, const at::Tensor& zero) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  const at::Tensor q = at::empty(sizes, input.options().dtype(at::kChar));
  sizes.back() = 1;
  const at::Tensor scales = at::ones(sizes, input.options().dtype(at::kFloat));
  const at::Tensor zeros = at::zeros(sizes, input.options().dtype(at::kInt));
  if (scale.defined()) scales.copy_(scale.reshape({}));
  if (zero.defined()) zeros.copy_(zero.reshape({}));
  return {q, scales, zeros};
}

Quantized quantize_per_token(const at::Tensor& input, bool symmetric) {
  const char* op = "quantize_per_token";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  if (input.size(-1) == 0) return empty_rows(input, {}, {});
  return dynamic_rows(input, symmetric ? -127 : -128, 127, symmetric);
}

Quantized quantize_rows(const at::Tensor& input, const OptTensor& scale, const OptTensor& zero_point, int64_t qmin,
                        int64_t qmax, bool symmetric) {
  const char* op = "quantize_rows";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  check_signed_range(op, qmin, qmax);
  if (!present(scale)) {
    TORCH_CHECK_VALUE(!present(zero_point), op,
                      ": zero_point must be None without scale (each row finds its own), got one");
    if (input.size(-1) == 0) return empty_rows(input, {}, {});
    return dynamic_rows(input, qmin, qmax, symmetric);
  }
  check_device(op, "scale", scale, input);
  check_dtype(op, "scale", *scale, at::kFloat);
  TORCH_CHECK_VALUE(scale->numel() == 1, op, ": scale must hold one value, got ", describe(*scale));
  at::Tensor zero;
  if (present(zero_point)) {
    check_device(op, "zero_point", zero_point, input);
    check_dtype(op, "zero_point", *zero_point, at::kInt);
    TORCH_CHECK_VALUE(zero_point->numel() == 1, op, ": zero_point must hold one value, got ", describe(*zero_point));
    zero = zero_point->reshape({1, 1});
  }
  const at::Tensor given = scale->reshape({1, 1}).clamp_min(kLeastScale);  // a learned one may get there
  if (input.size(-1) == 0) return empty_rows(input, given, zero);
  const at::Tensor x = as_matrix(input), q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const RowParams p = static_params(x, given, zero);
  quantize_into(q, x, p, qmin, qmax);
  return rows_of(input, p, q);
}

template <class Library>
void implement(Library& m) {
  m.impl("quantize", &quantize);
  m.impl("dequantize", &dequantize);
  m.impl("quantize_per_token", &quantize_per_token);
  m.impl("quantize_rows", &quantize_rows);
}

TORCHQUANT_IMPLEMENT_ATEN(implement)

}  // namespace
}  // namespace torchquant
