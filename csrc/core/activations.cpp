// activation, gated_activation: elementwise, one pass.
#include <algorithm>

#include "core/convert.h"
#include "core/threads.h"
#include "formats/int8_tiles.h"
#include "isa.h"

using namespace torchquant;

tq_status tq_activate(const tq_activation_call* call, const tq_parallel* parallel) {
  constexpr int64_t kLine = 64;                   // elements: threads share whole cache lines
  constexpr int64_t kThreadedElements = 1 << 14;  // from here on a second thread pays
  const tq_activation_call& c = *call;
  if (c.rows == 0 || c.length == 0) return TQ_OK;
  const KernelTable& table = kernels();
  const auto span = [&](int64_t x_at, int64_t up_at, int64_t out_at, int64_t count) {
    ActivationArgs a{};
    a.x = element_at(c.x, c.x_type, x_at);
    a.up = c.up ? element_at(c.up, c.x_type, up_at) : nullptr;
    a.out = element_at(c.out, c.out_type, out_at);
    a.n = count;
    a.in_type = float_type(c.x_type);
    a.out_type = float_type(c.out_type);
    a.activation = activation_of(c.activation);
    table.activate_span(a);
  };
  if (c.rows > 1) {
    parallel_for(parallel, 0, c.rows, std::max<int64_t>(1, kThreadedElements / 2 / c.length),
                 [&](int64_t first, int64_t last) {
                   for (int64_t m = first; m < last; ++m) span(m * c.x_stride, m * c.up_stride, m * c.length, c.length);
                 });
  } else {
    parallel_for(parallel, 0, ceil_div(c.length, kLine), kThreadedElements / 2 / kLine,
                 [&](int64_t first, int64_t last) {
                   const int64_t from = first * kLine;
                   span(from, from, from, std::min(c.length, last * kLine) - from);
                 });
  }
  return TQ_OK;
}
