// quantize, dequantize, quantize_per_token: float <-> int8/uint8 at every granularity (spans.h).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/spans.h"
#include "isa.h"

namespace torchquant {
namespace {

template <class Kernel>
void run_spans(const Spans& s, int64_t scales, SpanArgs args, int64_t in_bytes, int64_t out_bytes, Kernel kernel) {
  const char* in = static_cast<const char*>(args.in);
  char* out = static_cast<char*>(args.out);
  const SpanArgs base = args;
  auto run = [&](int64_t span, int64_t from, int64_t to) {
    const int64_t row = span / s.per_row, at = span % s.per_row * s.length;
    const int64_t length = std::min(s.length, s.row - at);
    const int64_t first = row * s.row + at + from;
    SpanArgs a = base;
    a.n = std::min(to, length) - from;
    if (a.n <= 0) return;
    a.in = in + first * in_bytes;
    a.out = out + first * out_bytes;
    const int64_t i = scale_index(s, span, scales) + (s.by_element ? from : 0);
    a.scale += i;
    a.real_zero += i;
    a.zero += i;
    if (a.lo) a.lo += i, a.hi += i;
    kernel(a);
  };
  if (s.count == 1) {  // one long span: threads share it
    at::parallel_for(0, s.length, kGrain, [&](int64_t from, int64_t to) { run(0, from, to); });
  } else {
    at::parallel_for(0, s.count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, s.length)),
                     [&](int64_t first, int64_t last) {
                       for (int64_t span = first; span < last; ++span) run(span, 0, s.length);
                     });
  }
}

at::Tensor quantize(const at::Tensor& input, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                    int64_t qmin, int64_t qmax, std::optional<int64_t> axis, std::optional<int64_t> group_size,
                    at::ScalarType dtype) {
  const char* op = "quantize";
  check_float(op, "input", input);
  check_byte_range(op, dtype, qmin, qmax);
  const Spans spans = make_spans(op, input, scale, axis, group_size);
  const Params p = make_params(op, scale, zero_point, qmin, qmax, true);
  const at::Tensor x = input.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(dtype));
  if (x.numel() == 0) return out;
  const SpanArgs args{x.const_data_ptr(),
                      out.mutable_data_ptr(),
                      0,
                      float_type(x.scalar_type()),
                      dtype == at::kChar,
                      spans.by_element,
                      p.inverse.data(),
                      p.real_zero.data(),
                      p.zero.data(),
                      p.lo.data(),
                      p.hi.data()};
  run_spans(spans, scale.numel(), args, x.element_size(), 1, kernels().quantize_span);
  return out;
}

at::Tensor dequantize(const at::Tensor& input, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                      std::optional<int64_t> axis, std::optional<int64_t> group_size, at::ScalarType dtype) {
  const char* op = "dequantize";
  check_byte(op, "input", input);
  check_float_type(op, "dtype", dtype);
  const Spans spans = make_spans(op, input, scale, axis, group_size);
  const Params p = make_params(op, scale, zero_point, 0, 0, false);
  const at::Tensor q = input.contiguous();
  at::Tensor out = at::empty(q.sizes(), q.options().dtype(dtype));
  if (q.numel() == 0) return out;
  const SpanArgs args{q.const_data_ptr(),
                      out.mutable_data_ptr(),
                      0,
                      float_type(dtype),
                      q.scalar_type() == at::kChar,
                      spans.by_element,
                      p.scale.const_data_ptr<float>(),
                      p.real_zero.data(),
                      p.zero.data(),
                      nullptr,
                      nullptr};
  run_spans(spans, scale.numel(), args, 1, out.element_size(), kernels().dequantize_span);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_per_token(const at::Tensor& input, bool symmetric) {
  const char* op = "quantize_per_token";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  const at::Tensor x = input.contiguous();
  const int64_t k = x.size(-1), rows = k ? x.numel() / k : 0;
  std::vector<int64_t> token_sizes(x.sizes().begin(), x.sizes().end());
  token_sizes.back() = 1;
  at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  at::Tensor scale = at::empty(token_sizes, x.options().dtype(at::kFloat));
  at::Tensor zero = at::empty(token_sizes, x.options().dtype(at::kInt));
  if (k == 0) {  // rows without elements: the range is zero
    scale.fill_(1.0f);
    zero.zero_();
    return {q, scale, zero};
  }
  QuantizeRowsArgs g{};
  g.x = x.const_data_ptr();
  g.x_type = float_type(x.scalar_type());
  g.x_stride = g.k = k;
  g.mode = symmetric ? RowMode::kSymmetric : RowMode::kAsymmetric;
  g.qmin = symmetric ? -127 : -128;
  g.qmax = 127;
  g.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  g.row_scale = scale.mutable_data_ptr<float>();
  g.row_zero = zero.mutable_data_ptr<int32_t>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / k),
                   [&](int64_t m0, int64_t m1) { kernels().quantize_rows(g, m0, m1); });
  return {q, scale, zero};
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("quantize", &quantize);
  m.impl("dequantize", &dequantize);
  m.impl("quantize_per_token", &quantize_per_token);
}

}  // namespace
}  // namespace torchquant
