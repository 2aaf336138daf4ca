// Linear layers of weights of 2 to 8 bits: how one call is cut into work.
//
// Rows are quantized into a panel by all threads where that pays; then each thread takes a share of the weight tiles, so
// that one thread reads every weight. No result depends on the division: a group's sum is an integer, and the groups of
// an output are added by one thread, in ascending order.
#include <algorithm>

#include "core/convert.h"
#include "core/threads.h"
#include "core/torchquant_intx.h"
#include "core/workspace.h"
#include "isa.h"

namespace torchquant::intx {
namespace {

constexpr int64_t kPanelBytes = 1 << 20;      // half of a common second-level cache
constexpr int64_t kSerialQuantize = 1 << 15;  // elements below which one thread quantizes
constexpr float kThreadingPays = 4500.0f;     // ns of work from which on a second thread is faster
constexpr int64_t kTilesOfAThread = 1 << 18;  // bytes that a thread should pack at least

IntxShape shape_of(const tq_intx_shape& s) { return {s.n, s.k, s.bits, s.group_size, s.has_zero_point}; }

constexpr int64_t lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

struct Panel {
  int8_t* a;  // null: no memory
  int64_t block_rows;
  int8_t* q;  // [rows, k]
  float* row_scale;
  int32_t* row_zero;
  int32_t* sums;
};

Panel make_panel(const IntxShape& shape, int64_t rows, int64_t panel_rows) {
  const int64_t block_rows = balanced(rows, panel_rows);
  const int64_t a = lines(panel_bytes(rows, intx_columns(shape), block_rows)), q = lines(rows * shape.k);
  const int64_t array = lines(rows * 4), sums = lines(rows * shape.groups() * 4);
  uint8_t* base = Workspace::of_this_thread().get(a + q + 2 * array + sums);
  if (!base) return {};
  return {reinterpret_cast<int8_t*>(base),
          block_rows,
          reinterpret_cast<int8_t*>(base + a),
          reinterpret_cast<float*>(base + a + q),
          reinterpret_cast<int32_t*>(base + a + q + array),
          reinterpret_cast<int32_t*>(base + a + q + 2 * array)};
}

// One thread's time for the whole call, in ns, roughly.
float estimated_ns(const KernelTable& table, const IntxShape& s, int64_t m) {
  const float rows = static_cast<float>(m), n = static_cast<float>(s.n), k = static_cast<float>(s.k);
  return static_cast<float>(num_tiles(s.n) * s.tile_bytes()) / 64.0f + rows * n * k / table.products_per_ns +
         rows * (20.0f + 0.06f * (n + k));
}

// Rows [m0, m1) of the input -> the same rows of a panel that begins with row `first`.
void make_rows(const KernelTable& table, const tq_rows& rows, const tq_row_quantization& how, const IntxShape& shape,
               const Panel& panel, int64_t m0, int64_t m1, int64_t first) {
  QuantizeRowsArgs q{};
  q.x = element_at(rows.x, rows.type, first * rows.stride);
  q.x_type = float_type(rows.type);
  q.x_stride = rows.stride;
  q.k = rows.k;
  q.mode = row_mode(how.mode);
  q.scale = how.scale;
  q.zero_point = how.zero_point;
  q.qmin = how.qmin;
  q.qmax = how.qmax;
  q.offset = 0;
  q.q = reinterpret_cast<uint8_t*>(panel.q);
  q.panel_rows = 0;
  q.row_scale = panel.row_scale;
  q.row_zero = panel.row_zero;
  table.quantize_rows(q, m0 - first, m1 - first);
  table.intx_rows({panel.q, shape, panel.row_zero, panel.a, panel.block_rows, panel.sums}, m0 - first, m1 - first);
}

// body(first, last) for parts of the tiles, each large enough for a thread.
template <class Body>
void for_tiles(const IntxShape& s, const tq_parallel* parallel, const Body& body) {
  parallel_for(parallel, 0, num_tiles(s.n), ceil_div(kTilesOfAThread, s.tile_bytes()), body);
}

tq_status run(const tq_rows* rows, const tq_row_quantization* how, const tq_intx_part* part,
              const tq_parallel* parallel) {
  const IntxShape shape = shape_of(part->shape);
  const int64_t m = rows->m;
  if (m == 0) return TQ_OK;
  const KernelTable& table = kernels();
  const tq_parallel* threads = estimated_ns(table, shape, m) < kThreadingPays ? nullptr : parallel;
  const int64_t most = std::max<int64_t>(1, kPanelBytes / panel_row_bytes(intx_columns(shape)));
  const int64_t height = balanced(m, std::max(most, table.intx_panel_rows));
  for (int64_t first = 0; first < m; first += height) {
    const int64_t last = std::min(m, first + height);
    const Panel panel = make_panel(shape, last - first, table.intx_panel_rows);
    if (!panel.a) return TQ_OUT_OF_MEMORY;
    const bool serial = (last - first) * rows->k < kSerialQuantize;
    parallel_for(serial ? nullptr : threads, first, last, 1,
                 [&](int64_t m0, int64_t m1) { make_rows(table, *rows, *how, shape, panel, m0, m1, first); });
    IntxArgs g{};
    g.a = panel.a;
    g.panel_rows = panel.block_rows;
    g.sums = panel.sums;
    g.row_scale = panel.row_scale;
    g.row_zero = panel.row_zero;
    g.zero_rows = how->mode == TQ_ASYMMETRIC || (how->mode == TQ_STATIC && how->zero_point != 0);
    g.shape = shape;
    g.packed = part->packed;
    g.bias = part->bias;
    g.activation = activation_of(part->activation);
    g.out_type = out_type(part->out_type);
    g.c = element_at(part->out, part->out_type, first * part->out_stride);
    g.ldc = part->out_stride;
    const int64_t block = table.intx_tile_block;
    parallel_for(threads, 0, ceil_div(num_tiles(shape.n), block), 1, [&](int64_t first_block, int64_t last_block) {
      table.intx_gemm(g, 0, last - first, first_block * block, std::min(num_tiles(shape.n), last_block * block));
    });
  }
  return TQ_OK;
}

}  // namespace
}  // namespace torchquant::intx

using namespace torchquant;

int64_t tq_intx_tile_bytes(const tq_intx_shape* shape) { return intx::shape_of(*shape).tile_bytes(); }
int64_t tq_intx_most_inputs(int64_t bits) { return intx_most_inputs(bits); }

tq_status tq_pack_intx(const int8_t* weight, const float* scale, const int8_t* zero_point, const tq_intx_shape* shape,
                       uint8_t* packed, const tq_parallel* parallel) {
  const IntxShape s = intx::shape_of(*shape);
  intx::for_tiles(s, parallel,
                  [&](int64_t first, int64_t last) { pack_intx(weight, scale, zero_point, s, first, last, packed); });
  return TQ_OK;
}

tq_status tq_unpack_intx(const uint8_t* packed, const tq_intx_shape* shape, int8_t* weight, float* scale,
                         int8_t* zero_point, const tq_parallel* parallel) {
  const IntxShape s = intx::shape_of(*shape);
  intx::for_tiles(s, parallel,
                  [&](int64_t first, int64_t last) { unpack_intx(packed, s, first, last, weight, scale, zero_point); });
  return TQ_OK;
}

tq_status tq_linear_intx(const tq_rows* rows, const tq_row_quantization* how, const tq_intx_part* part,
                         const tq_parallel* parallel) {
  return intx::run(rows, how, part, parallel);
}
