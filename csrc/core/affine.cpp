// quantize, dequantize, quantize_rows: float <-> int8 and uint8 at every granularity.
#include "core/convert.h"
#include "core/spans.h"
#include "core/threads.h"
#include "formats/int8_tiles.h"
#include "isa.h"

namespace torchquant {
namespace {

template <class Kernel>
void run_spans(const tq_spans& s, int64_t scales, const SpanArgs& base, int64_t in_bytes, int64_t out_bytes,
               const tq_parallel* parallel, Kernel kernel) {
  const char* in = static_cast<const char*>(base.in);
  char* out = static_cast<char*>(base.out);
  const auto run = [&](int64_t span, int64_t from, int64_t to) {
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
    parallel_for(parallel, 0, s.length, kThreadElements, [&](int64_t from, int64_t to) { run(0, from, to); });
  } else {
    parallel_for(parallel, 0, s.count, std::max<int64_t>(1, kThreadElements / std::max<int64_t>(1, s.length)),
                 [&](int64_t first, int64_t last) {
                   for (int64_t span = first; span < last; ++span) run(span, 0, s.length);
                 });
  }
}

SpanArgs span_args(const void* in, void* out, tq_type float_side, tq_type q_side, const tq_spans& spans,
                   const KernelScales& p) {
  SpanArgs args{};
  args.in = in;
  args.out = out;
  args.float_type = float_type(float_side);
  args.q_signed = q_side == TQ_I8;
  args.by_element = spans.by_element;
  args.scale = p.scale;
  args.real_zero = p.real_zero.data();
  args.zero = p.zero.data();
  return args;
}

}  // namespace
}  // namespace torchquant

using namespace torchquant;

tq_spans tq_spans_per_tensor(int64_t elements) { return {1, elements, 1, elements, 1, false}; }

tq_spans tq_spans_per_channel(int64_t outer, int64_t channels, int64_t inner) {
  if (channels == 1) return tq_spans_per_tensor(outer * inner);
  const bool by_element = inner == 1;
  const int64_t length = by_element ? channels : inner;
  const int64_t count = length ? outer * (by_element ? 1 : channels) : 0;
  return {count, length, 1, length, channels, by_element};
}

tq_spans tq_spans_per_group(int64_t rows, int64_t row, int64_t group_size) {
  const int64_t length = std::max<int64_t>(1, std::min(group_size, row));
  const int64_t per_row = ceil_div(row, length);
  return {rows * per_row, length, per_row, row, 1, false};
}

tq_status tq_quantize(const void* x, tq_type x_type, void* q, tq_type q_type, const tq_spans* spans,
                      const tq_scales* scales, const tq_parallel* parallel) {
  return status_of([&] {
    if (elements_of(*spans) == 0) return;
    const KernelScales p(*scales, true);
    SpanArgs args = span_args(x, q, x_type, q_type, *spans, p);
    args.scale = p.inverse.data();
    args.lo = p.lo.data();
    args.hi = p.hi.data();
    run_spans(*spans, scales->count, args, element_bytes(x_type), 1, parallel, kernels().quantize_span);
  });
}

tq_status tq_dequantize(const void* q, tq_type q_type, void* x, tq_type x_type, const tq_spans* spans,
                        const tq_scales* scales, const tq_parallel* parallel) {
  return status_of([&] {
    if (elements_of(*spans) == 0) return;
    const KernelScales p(*scales, false);
    const SpanArgs args = span_args(q, x, x_type, q_type, *spans, p);
    run_spans(*spans, scales->count, args, 1, element_bytes(x_type), parallel, kernels().dequantize_span);
  });
}

tq_status tq_quantize_rows(const tq_rows* rows, const tq_row_quantization* how, int8_t* q, float* scale,
                           int32_t* zero_point, const tq_parallel* parallel) {
  if (rows->k == 0) {  // rows without elements: the range is zero
    const bool given = how->mode == TQ_STATIC;
    std::fill_n(scale, rows->m, given ? how->scale : 1.0f);
    std::fill_n(zero_point, rows->m, given ? how->zero_point : 0);
    return TQ_OK;
  }
  QuantizeRowsArgs g{};
  g.x = rows->x;
  g.x_type = float_type(rows->type);
  g.x_stride = rows->stride;
  g.k = rows->k;
  g.mode = row_mode(how->mode);
  g.scale = how->scale;
  g.zero_point = how->zero_point;
  g.qmin = how->qmin;
  g.qmax = how->qmax;
  g.q = reinterpret_cast<uint8_t*>(q);
  g.row_scale = scale;
  g.row_zero = zero_point;
  const KernelTable& table = kernels();
  parallel_for(parallel, 0, rows->m, std::max<int64_t>(1, kThreadElements / rows->k),
               [&](int64_t m0, int64_t m1) { table.quantize_rows(g, m0, m1); });
  return TQ_OK;
}
