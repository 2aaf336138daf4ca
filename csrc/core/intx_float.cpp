// Linear layers of float rows and weights of 2 to 8 bits: how one call is cut into work.
//
// Rows become a panel of floats, then each thread takes a share of the weight tiles, so that one thread reads every
// weight. No result depends on the division: one thread adds the products of an output, in the specification's order.
#include <algorithm>

#include "core/convert.h"
#include "core/threads.h"
#include "core/torchquant_intx.h"
#include "core/workspace.h"
#include "isa.h"

namespace torchquant::intx_float {
namespace {

constexpr int64_t kPanelBytes = 1 << 19;   // a quarter of a common second-level cache
constexpr int64_t kSerialRows = 1 << 15;   // elements below which one thread makes the panel
constexpr float kThreadingPays = 4500.0f;  // ns of work from which on a second thread is faster
constexpr float kProductsOfBytes = 8.0f;   // products of bytes in the time of one product of floats

// One thread's time for the whole call, in ns, roughly.
float estimated_ns(const KernelTable& table, const IntxShape& s, int64_t m) {
  const float rows = static_cast<float>(m), n = static_cast<float>(s.n), k = static_cast<float>(s.k);
  return (rows + 1.0f) * n * k * kProductsOfBytes / table.products_per_ns + rows * (20.0f + 0.06f * (n + k));
}

// Row `first` of the call is the panel's first.
void make_panel(const KernelTable& table, const tq_rows& rows, int64_t first, int64_t count, float* panel,
                int64_t panel_rows, const tq_parallel* threads) {
  const FloatRowsArgs args{element_at(rows.x, rows.type, first * rows.stride),
                           float_type(rows.type),
                           rows.stride,
                           count,
                           rows.k,
                           panel,
                           panel_rows};
  const bool serial = count * rows.k < kSerialRows;
  parallel_for(serial ? nullptr : threads, 0, ceil_div(count, panel_rows), 1,
               [&](int64_t block0, int64_t block1) { table.float_rows(args, block0, block1); });
}

tq_status run(const tq_rows& rows, const tq_intx_part& part, const tq_parallel* parallel) {
  const IntxShape shape = intx_shape_of(part.shape);
  const KernelTable& table = kernels();
  const int64_t m = rows.m, k = shape.k;
  if (m == 0) return TQ_OK;
  const tq_parallel* threads = estimated_ns(table, shape, m) < kThreadingPays ? nullptr : parallel;
  const int64_t most = std::max<int64_t>(1, kPanelBytes / (k * int64_t{sizeof(float)}));
  const int64_t height = balanced(m, std::max(most, table.float_panel_rows));
  for (int64_t first = 0; first < m; first += height) {
    const int64_t count = std::min(height, m - first), panel_rows = balanced(count, table.float_panel_rows);
    const float* x = static_cast<const float*>(rows.x) + first * rows.stride;
    if (rows.type != TQ_F32 || count > 1) {  // one row of floats is its own panel
      const int64_t bytes = float_panel_elements(count, k, panel_rows) * int64_t{sizeof(float)};
      float* panel = reinterpret_cast<float*>(Workspace::of_this_thread().get(bytes));
      if (!panel) return TQ_OUT_OF_MEMORY;
      make_panel(table, rows, first, count, panel, panel_rows, threads);
      x = panel;
    }
    IntxFloatArgs g{};
    g.x = x;
    g.panel_rows = panel_rows;
    g.shape = shape;
    g.packed = part.packed;
    g.bias = part.bias;
    g.activation = activation_of(part.activation);
    g.out_type = out_type(part.out_type);
    g.c = element_at(part.out, part.out_type, first * part.out_stride);
    g.ldc = part.out_stride;
    const int64_t block = table.float_tile_block, tiles = num_tiles(shape.n);
    parallel_for(threads, 0, ceil_div(tiles, block), 1, [&](int64_t first_block, int64_t last_block) {
      table.intx_float(g, 0, count, first_block * block, std::min(tiles, last_block * block));
    });
  }
  return TQ_OK;
}

}  // namespace
}  // namespace torchquant::intx_float

tq_status tq_linear_intx_float(const tq_rows* rows, const tq_intx_part* part, const tq_parallel* parallel) {
  return torchquant::intx_float::run(*rows, *part, parallel);
}
