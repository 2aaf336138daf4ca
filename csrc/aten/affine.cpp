// quantize, dequantize, quantize_per_token: torchquant/functional/affine.py in ATen.
#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/arithmetic.h"
#include "aten/blocks.h"
#include "common/device.h"
#include "aten/register.h"
#include "aten/rows.h"
#include "aten/spans.h"
#include "common/tensors.h"

namespace torchquant {
namespace {

struct ZeroPoint {
  at::Tensor value;  // float32 of scale's shape, exact for the integers allowed; undefined: 0
  bool real = false;
};

ZeroPoint check_parameters(const char* op, const at::Tensor& input, const at::Tensor& scale,
                           const OptTensor& zero_point) {
  check_device(op, "scale", scale, input);
  check_device(op, "zero_point", zero_point, input);
  check_dtype(op, "scale", scale, at::kFloat);
  if (!present(zero_point)) return {};
  const bool real = check_zero_point(op, *zero_point, scale);
  const at::Tensor value = zero_point->to(at::kFloat);
  return {value.numel() == 1 ? value.reshape({}).expand(scale.sizes()) : value, real};
}

// Calls run(in, out, scale, zero) with corresponding elements, block by block. All have dimensions, so that a product with
// a half type is float32.
template <class Run>
void for_scales(const Parts& parts, const at::Tensor& in, const at::Tensor& out, const at::Tensor& scale,
                const at::Tensor& zero, const Run& run) {
  in_blocks<4>(
      {parts.elements(in), parts.elements(out), parts.spread(scale), zero.defined() ? parts.spread(zero) : zero},
      [&](const std::array<at::Tensor, 4>& t) { run(t[0], t[1], t[2], t[3]); });
}

at::Tensor quantize(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
                    int64_t qmax, OptInt axis, OptInt group_size, at::ScalarType dtype) {
  const char* op = "quantize";
  check_float(op, "input", input);
  check_byte_range(op, dtype, qmin, qmax);
  const Parts parts = make_parts(op, input, scale, axis, group_size);
  const ZeroPoint zero = check_parameters(op, input, scale, zero_point);
  const at::Tensor out = at::empty(input.sizes(), input.options().dtype(dtype));
  if (out.numel() == 0) return out;
  for_scales(parts, input, out, torchquant::reciprocal(scale), zero.value,
             [&](const at::Tensor& x, const at::Tensor& q, const at::Tensor& inverse, const at::Tensor& z) {
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
  const Parts parts = make_parts(op, input, scale, axis, group_size);
  const ZeroPoint zero = check_parameters(op, input, scale, zero_point);
  const at::Tensor out = at::empty(input.sizes(), input.options().dtype(dtype));
  if (out.numel() == 0) return out;
  for_scales(parts, input, out, scale, zero.value,
             [&](const at::Tensor& q, const at::Tensor& x, const at::Tensor& s, const at::Tensor& z) {
               // the difference of integers is exact in float32
               at::Tensor y = z.defined() && !zero.real ? at::sub(q, z).mul_(s) : at::mul(q, s);
               if (zero.real) y.add_(z);
               x.copy_(y);
             });
  return out;
}

QuantizedRows quantize_per_token(const at::Tensor& input, bool symmetric) {
  const char* op = "quantize_per_token";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  if (input.size(-1) == 0) return empty_rows(input, {}, {});
  return quantized_rows(input, symmetric ? -127 : -128, 127, symmetric);
}

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::quantize>(&quantize);
  m.impl<ops::dequantize>(&dequantize);
  m.impl<ops::quantize_per_token>(&quantize_per_token);
}

}  // namespace
}  // namespace torchquant
