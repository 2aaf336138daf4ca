// quantize, dequantize, quantize_per_token: float <-> int8/uint8 at every granularity.
//
// One shape serves all: the tensor is a sequence of spans that share a scale. Per tensor: one span. Per channel along
// `axis`: outer x C spans of `inner` elements, or, along the last axis, rows whose scale changes with every element.
// Per group: rows x groups, the last one possibly shorter; per token is a group of the whole row.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"

namespace torchquant {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have at least

struct Spans {
  bool by_element = false;
  int64_t count = 1, length = 1;               // spans and elements in each (the last of a row may be shorter)
  int64_t per_row = 1, row = 1, channels = 1;  // spans in a row, elements of a row, scales along axis
};

Spans make_spans(const char* op, const at::Tensor& input, const at::Tensor& scale, std::optional<int64_t> axis,
                 std::optional<int64_t> group_size) {
  TORCH_CHECK_VALUE(!(axis && group_size), op, ": axis and group_size exclude each other, got both; leave one out");
  Spans s;
  if (axis) {
    check_dim(op, "input", input, 1);
    const int64_t a = *axis < 0 ? *axis + input.dim() : *axis;
    TORCH_CHECK_VALUE(a >= 0 && a < input.dim(), op, ": axis must be within the ", input.dim(),
                      " dimensions of input, got ", *axis);
    TORCH_CHECK_VALUE(scale.dim() == 1 && scale.size(0) == input.size(a), op, ": scale must have shape [",
                      input.size(a), "], one value per slice along axis ", *axis, " of input, got ", describe(scale));
    s.channels = input.size(a);
    int64_t inner = 1;
    for (int64_t d = a + 1; d < input.dim(); ++d) inner *= input.size(d);
    s.by_element = inner == 1;
    s.length = s.by_element ? s.channels : inner;
    s.count = s.length ? input.numel() / s.length : 0;
    s.row = s.length;
  } else if (group_size) {
    check_dim(op, "input", input, 1);
    TORCH_CHECK_VALUE(*group_size >= 1, op, ": group_size must be at least 1, got ", *group_size);
    s.row = input.size(-1);
    s.length = std::max<int64_t>(1, std::min(*group_size, s.row));
    s.per_row = s.row ? ceil_div(s.row, s.length) : 0;
    std::vector<int64_t> want(input.sizes().begin(), input.sizes().end());
    // Rows without elements have no groups; as tokens (a group each) they have a scale all the same.
    const bool tokens = s.row == 0 && scale.dim() == input.dim() && scale.size(-1) == 1;
    want.back() = tokens ? 1 : ceil_div(s.row, *group_size);
    TORCH_CHECK_VALUE(scale.sizes() == at::IntArrayRef(want), op, ": scale must have shape ", at::IntArrayRef(want),
                      " (one value per group of ", *group_size, "), got ", describe(scale));
    s.count = s.row ? input.numel() / s.row * s.per_row : 0;
  } else {
    TORCH_CHECK_VALUE(scale.numel() == 1, op, ": scale must hold one value without axis or group_size, got ",
                      describe(scale), "; pass axis=... or group_size=...");
    s.length = s.row = input.numel();
  }
  return s;
}

// Scales, zero points and limits as the kernels want them.
struct Params {
  at::Tensor scale, inverse, zero, real_zero, lo, hi;
};

Params make_params(const char* op, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point, int64_t qmin,
                   int64_t qmax, bool inverse) {
  check_dtype(op, "scale", scale, at::kFloat);
  Params p;
  const int64_t n = scale.numel();
  p.scale = scale.contiguous();
  const auto floats = scale.options();
  p.zero = at::empty({n}, floats.dtype(at::kInt));
  p.real_zero = at::empty({n}, floats);
  int32_t* zero = p.zero.mutable_data_ptr<int32_t>();
  float* real = p.real_zero.mutable_data_ptr<float>();
  std::fill_n(zero, n, 0);
  std::fill_n(real, n, 0.0f);
  if (zero_point && zero_point->defined()) {
    const bool is_real = zero_point->scalar_type() == at::kFloat;
    TORCH_CHECK_TYPE(is_real || zero_point->scalar_type() == at::kInt, op,
                     ": zero_point must be int32, or float32 for a real-valued one, got ", describe(*zero_point));
    const bool one = zero_point->numel() == 1 && zero_point->dim() <= 1;
    TORCH_CHECK_VALUE(one || zero_point->sizes() == scale.sizes(), op, ": zero_point must have scale's shape ",
                      scale.sizes(), " or hold one value, got ", describe(*zero_point));
    const at::Tensor z = (one ? zero_point->reshape({}) : *zero_point).expand(scale.sizes()).contiguous();
    if (is_real) {
      std::copy_n(z.const_data_ptr<float>(), n, real);
    } else if (n > 0) {  // so far fp32 holds every difference of integers exactly
      constexpr int64_t kLimit = int64_t{1} << 22;
      check_zero_points(op, "zero_point", z.const_data_ptr<int32_t>(), n, -kLimit, kLimit);
      std::copy_n(z.const_data_ptr<int32_t>(), n, zero);
    }
  }
  if (inverse) {
    p.inverse = at::empty({n}, floats);
    p.lo = at::empty({n}, floats);
    p.hi = at::empty({n}, floats);
    const float* s = p.scale.const_data_ptr<float>();
    float *inv = p.inverse.mutable_data_ptr<float>(), *lo = p.lo.mutable_data_ptr<float>(),
          *hi = p.hi.mutable_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) {
      check_scale(op, "scale", s[i]);
      inv[i] = 1.0f / s[i];
      lo[i] = static_cast<float>(qmin - zero[i]);
      hi[i] = static_cast<float>(qmax - zero[i]);
    }
  }
  return p;
}

int64_t scale_index(const Spans& s, int64_t span, int64_t scales) {
  if (s.by_element || scales == 1) return 0;
  return s.per_row == 1 && s.channels > 1 ? span % s.channels : span;
}

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
  TORCH_CHECK_TYPE(dtype == at::kChar || dtype == at::kByte, op, ": dtype must be int8 or uint8, got ",
                   dtype_name(dtype));
  const int64_t least = dtype == at::kChar ? -128 : 0, most = dtype == at::kChar ? 127 : 255;
  TORCH_CHECK_VALUE(least <= qmin && qmin < qmax && qmax <= most, op, ": qmin < qmax must lie within ", least, " .. ",
                    most, " for ", dtype_name(dtype), ", got ", qmin, " and ", qmax);
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
                      p.inverse.const_data_ptr<float>(),
                      p.real_zero.const_data_ptr<float>(),
                      p.zero.const_data_ptr<int32_t>(),
                      p.lo.const_data_ptr<float>(),
                      p.hi.const_data_ptr<float>()};
  run_spans(spans, scale.numel(), args, x.element_size(), 1, kernels().quantize_span);
  return out;
}

at::Tensor dequantize(const at::Tensor& input, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                      std::optional<int64_t> axis, std::optional<int64_t> group_size, at::ScalarType dtype) {
  const char* op = "dequantize";
  check_byte(op, "input", input);
  TORCH_CHECK_TYPE(is_float_input(dtype), op, ": dtype must be float32, bfloat16 or float16, got ", dtype_name(dtype));
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
                      p.real_zero.const_data_ptr<float>(),
                      p.zero.const_data_ptr<int32_t>(),
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
