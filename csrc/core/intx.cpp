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

constexpr int64_t kPanelBytes = 1 << 19;      // a quarter to a half of a common second-level cache
constexpr int64_t kSerialQuantize = 1 << 15;  // elements below which one thread quantizes
constexpr float kThreadingPays = 4500.0f;     // ns of work from which on a second thread is faster
constexpr int64_t kTilesOfAThread = 1 << 18;  // bytes that a thread should pack at least

IntxShape shape_of(const tq_intx_shape& s) { return {s.n, s.k, s.bits, s.group_size, s.has_zero_point}; }

constexpr int64_t lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

struct Panel {
  int8_t* a;  // null: no memory
  int64_t block_rows;
  IntxPanel kind;
  int8_t* q;  // [rows, k]
  float* row_scale;
  int32_t* row_zero;
  int32_t* sums;
  IntxRest* rests;
};

// Rows of a panel where m are to be done: as few panels as fit the cache, all of about the same height, whole blocks.
int64_t panel_height(const KernelTable& table, const IntxShape& shape, int64_t m) {
  const int64_t block = table.intx_panel_rows;
  const int64_t most = std::max(block, kPanelBytes / panel_row_bytes(intx_columns(shape)) / block * block);
  return ceil_div(balanced(m, most), block) * block;
}

// `ones` are a row of each block.
int64_t block_rows_of(int64_t rows, int64_t most, bool ones) {
  return ones ? balanced(rows, most - 1) + 1 : balanced(rows, most);
}

// Memory for a panel: plain, or cut with room for ones, which it gets if its lists are too long.
Panel make_panel(const KernelTable& table, const IntxShape& shape, int64_t rows, bool zero_rows) {
  const bool cut = zero_rows && table.intx_cut;
  const int64_t block_rows = block_rows_of(rows, table.intx_panel_rows, false), columns = intx_columns(shape);
  int64_t a = panel_bytes(rows, columns, block_rows), rests = 0;
  if (cut) {
    const int64_t height = block_rows_of(rows, table.intx_panel_rows, true);
    a = std::max(a, panel_bytes(ceil_div(rows, height - 1) * height, columns, height));
    rests = lines(rows * (intx_most_rests(shape.k) + 1) * static_cast<int64_t>(sizeof(IntxRest)));
  }
  a = lines(a);
  const int64_t q = lines(rows * shape.k), array = lines(rows * 4), sums = lines(rows * shape.groups() * 4);
  uint8_t* base = Workspace::of_this_thread().get(a + q + 2 * array + sums + rests);
  if (!base) return {};
  uint8_t* tail = base + a + q;
  return {reinterpret_cast<int8_t*>(base),
          block_rows,
          cut ? IntxPanel::kCut : IntxPanel::kPlain,
          reinterpret_cast<int8_t*>(base + a),
          reinterpret_cast<float*>(tail),
          reinterpret_cast<int32_t*>(tail + array),
          reinterpret_cast<int32_t*>(tail + 2 * array),
          cut ? reinterpret_cast<IntxRest*>(tail + 2 * array + sums) : nullptr};
}

bool has_many_rests(const Panel& panel, int64_t rows, int64_t k) {
  for (int64_t m = 0; panel.rests && m < rows; ++m)
    if (panel.rests[m * (intx_most_rests(k) + 1)].quad == kIntxManyRests) return true;
  return false;
}

// One thread's time for the whole call, in ns, roughly.
float estimated_ns(const KernelTable& table, const IntxShape& s, int64_t m) {
  const float rows = static_cast<float>(m), n = static_cast<float>(s.n), k = static_cast<float>(s.k);
  return static_cast<float>(num_tiles(s.n) * s.tile_bytes()) / 64.0f + rows * n * k / table.products_per_ns +
         rows * (20.0f + 0.06f * (n + k));
}

// Rows [m0, m1) of the input -> plain integers [rows, k], which begin with row `first`.
void quantize(const KernelTable& table, const tq_rows& rows, const tq_row_quantization& how, const Panel& panel,
              int64_t m0, int64_t m1, int64_t first) {
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
}

// Rows [m0, m1) of the integers -> the same rows of the panel.
void arrange(const KernelTable& table, const IntxShape& shape, const Panel& panel, int64_t m0, int64_t m1) {
  table.intx_rows({panel.q, shape, panel.row_zero, panel.a, panel.block_rows, panel.kind, panel.sums, panel.rests}, m0,
                  m1);
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
  const int64_t height = panel_height(table, shape, m);
  const bool zero_rows = how->mode == TQ_ASYMMETRIC || (how->mode == TQ_STATIC && how->zero_point != 0);
  for (int64_t first = 0; first < m; first += height) {
    const int64_t last = std::min(m, first + height), count = last - first;
    Panel panel = make_panel(table, shape, count, zero_rows);
    if (!panel.a) return TQ_OUT_OF_MEMORY;
    const tq_parallel* for_rows = count * rows->k < kSerialQuantize ? nullptr : threads;
    parallel_for(for_rows, first, last, 1, [&](int64_t m0, int64_t m1) {
      quantize(table, *rows, *how, panel, m0, m1, first);
      arrange(table, shape, panel, m0 - first, m1 - first);
    });
    if (has_many_rests(panel, count, shape.k)) {
      panel.kind = IntxPanel::kOnes;
      panel.block_rows = block_rows_of(count, table.intx_panel_rows, true);
      parallel_for(for_rows, 0, count, 1, [&](int64_t m0, int64_t m1) { arrange(table, shape, panel, m0, m1); });
    }
    IntxArgs g{};
    g.a = panel.a;
    g.panel_rows = panel.block_rows;
    g.kind = panel.kind;
    g.sums = panel.sums;
    g.row_scale = panel.row_scale;
    g.row_zero = panel.row_zero;
    g.zero_rows = zero_rows;
    g.rests = panel.rests;
    g.shape = shape;
    g.packed = part->packed;
    g.bias = part->bias;
    g.activation = activation_of(part->activation);
    g.out_type = out_type(part->out_type);
    g.c = element_at(part->out, part->out_type, first * part->out_stride);
    g.ldc = part->out_stride;
    const int64_t block = table.intx_tile_block;
    parallel_for(threads, 0, ceil_div(num_tiles(shape.n), block), 1, [&](int64_t first_block, int64_t last_block) {
      table.intx_gemm(g, 0, count, first_block * block, std::min(num_tiles(shape.n), last_block * block));
    });
  }
  return TQ_OK;
}

}  // namespace
}  // namespace torchquant::intx

using namespace torchquant;

int64_t tq_intx_tile_bytes(const tq_intx_shape* shape) { return intx::shape_of(*shape).tile_bytes(); }

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
