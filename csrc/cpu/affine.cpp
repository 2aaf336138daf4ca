// quantize, dequantize, quantize_per_token: float <-> int8/uint8 at every granularity.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "cpu/core_call.h"
#include "cpu/spans.h"
#include "operators.h"

namespace torchquant {
namespace {

at::Tensor quantize(const at::Tensor& input, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                    int64_t qmin, int64_t qmax, std::optional<int64_t> axis, std::optional<int64_t> group_size,
                    at::ScalarType dtype) {
  const char* op = "quantize";
  check_float(op, "input", input);
  check_byte_range(op, dtype, qmin, qmax);
  const tq_spans spans = make_spans(op, input, scale, axis, group_size);
  const Scales s = make_scales(op, scale, zero_point, qmin, qmax, true);
  const tq_scales scales = s.view();
  const at::Tensor x = input.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(dtype));
  check_status(tq_quantize(x.const_data_ptr(), type_of(x), out.mutable_data_ptr(), type_of(dtype), &spans, &scales,
                           &kTorchThreads));
  return out;
}

at::Tensor dequantize(const at::Tensor& input, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                      std::optional<int64_t> axis, std::optional<int64_t> group_size, at::ScalarType dtype) {
  const char* op = "dequantize";
  check_byte(op, "input", input);
  check_float_type(op, "dtype", dtype);
  const tq_spans spans = make_spans(op, input, scale, axis, group_size);
  const Scales s = make_scales(op, scale, zero_point, 0, 0, false);
  const tq_scales scales = s.view();
  const at::Tensor q = input.contiguous();
  at::Tensor out = at::empty(q.sizes(), q.options().dtype(dtype));
  check_status(tq_dequantize(q.const_data_ptr(), type_of(q), out.mutable_data_ptr(), type_of(dtype), &spans, &scales,
                             &kTorchThreads));
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_per_token(const at::Tensor& input, bool symmetric) {
  const char* op = "quantize_per_token";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  const at::Tensor x = input.contiguous();
  std::vector<int64_t> token_sizes(x.sizes().begin(), x.sizes().end());
  token_sizes.back() = 1;
  at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  at::Tensor scale = at::empty(token_sizes, x.options().dtype(at::kFloat));
  at::Tensor zero = at::empty(token_sizes, x.options().dtype(at::kInt));
  tq_rows rows = rows_of(x, x.size(-1));
  rows.m = scale.numel();  // also where the rows have no elements
  tq_row_quantization how{};
  how.mode = symmetric ? TQ_SYMMETRIC : TQ_ASYMMETRIC;
  how.qmin = symmetric ? -127 : -128;
  how.qmax = 127;
  check_status(tq_quantize_rows(&rows, &how, q.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>(),
                                zero.mutable_data_ptr<int32_t>(), &kTorchThreads));
  return {q, scale, zero};
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::quantize::implement(m, &quantize);
  ops::dequantize::implement(m, &dequantize);
  ops::quantize_per_token::implement(m, &quantize_per_token);
}

}  // namespace
}  // namespace torchquant
