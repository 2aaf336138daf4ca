// Linear layers of weights of 2 to 8 bits: how one call is cut into work.
//
// Rows are quantized into a panel by all threads where that pays; then each thread takes a share of the weight tiles, so
// that one thread reads every weight. No result depends on the division: a group's sum is an integer, and the groups of
// an output are added by one thread, in ascending order.
#include <algorithm>

#include "core/intx_panel.h"
#include "core/threads.h"
#include "core/workspace.h"
#include "isa.h"

namespace torchquant::intx {
namespace {

constexpr int64_t kPanelBytes = 1 << 19;      // a quarter to a half of a common second-level cache
constexpr int64_t kSerialQuantize = 1 << 15;  // elements below which one thread quantizes
constexpr float kThreadingPays = 4500.0f;     // ns of work from which on a second thread is faster
constexpr int64_t kTilesOfAThread = 1 << 18;  // bytes that a thread should pack at least

// The linears of one call: usually one, more where several share their input. Their blocks of tiles are numbered
// through.
struct Parts {
  const tq_intx_part* begin_;
  int64_t count;
  const tq_intx_part* begin() const { return begin_; }
  const tq_intx_part* end() const { return begin_ + count; }
};

int64_t blocks_of(const KernelTable& table, const tq_intx_part& part) {
  return ceil_div(num_tiles(part.shape.n), table.intx_tile_block);
}

// Rows of a panel where m are to be done: as few panels as fit the cache, all of about the same height, whole blocks.
int64_t panel_height(const KernelTable& table, const IntxShape& shape, int64_t m) {
  const int64_t block = table.intx_panel_rows;
  const int64_t most = std::max(block, kPanelBytes / panel_row_bytes(intx_columns(shape)) / block * block);
  return ceil_div(balanced(m, most), block) * block;
}

// One thread's time for the whole call, in ns, roughly.
float estimated_ns(const KernelTable& table, const Parts& parts, int64_t m) {
  const float rows = static_cast<float>(m);
  float ns = 0.0f;
  for (const tq_intx_part& part : parts) {
    const IntxShape s = intx_shape_of(part.shape);
    const float n = static_cast<float>(s.n), k = static_cast<float>(s.k);
    ns += static_cast<float>(num_tiles(s.n) * s.tile_bytes()) / 64.0f + rows * n * k / table.products_per_ns +
          rows * (20.0f + 0.06f * (n + k));
  }
  return ns;
}

// The panel's rows times the blocks of tiles [block0, block1).
void multiply(const KernelTable& table, const Parts& parts, const Panel& panel, bool zero_rows, int64_t first,
              int64_t count, int64_t block0, int64_t block1) {
  const int64_t block = table.intx_tile_block;
  for (const tq_intx_part& part : parts) {
    const int64_t blocks = blocks_of(table, part);
    const int64_t begin = std::max<int64_t>(0, block0) * block;
    const int64_t end = std::min(num_tiles(part.shape.n), std::min(blocks, block1) * block);
    if (begin < end) table.intx_gemm(product_args(panel, part, zero_rows, first), 0, count, begin, end);
    block0 -= blocks;
    block1 -= blocks;
  }
}

// body(first, last) for parts of the tiles, each large enough for a thread.
template <class Body>
void for_tiles(const IntxShape& s, const tq_parallel* parallel, const Body& body) {
  parallel_for(parallel, 0, num_tiles(s.n), ceil_div(kTilesOfAThread, s.tile_bytes()), body);
}

// The parts have the same inputs in the same groups.
tq_status run(const tq_rows* rows, const tq_row_quantization* how, const Parts& parts, const tq_parallel* parallel) {
  const int64_t m = rows->m;
  if (m == 0 || parts.count == 0) return TQ_OK;
  const IntxShape shape = intx_shape_of(parts.begin()->shape);
  const KernelTable& table = kernels();
  const tq_parallel* threads = estimated_ns(table, parts, m) < kThreadingPays ? nullptr : parallel;
  const int64_t height = panel_height(table, shape, m);
  const bool zero_rows = has_zero_rows(*how);
  int64_t blocks = 0;
  for (const tq_intx_part& part : parts) blocks += blocks_of(table, part);
  for (int64_t first = 0; first < m; first += height) {
    const int64_t last = std::min(m, first + height), count = last - first;
    uint8_t* memory = Workspace::of_this_thread().get(place_panel(table, shape, count, zero_rows, nullptr).bytes);
    if (!memory) return TQ_OUT_OF_MEMORY;
    Panel panel = place_panel(table, shape, count, zero_rows, memory);
    const tq_parallel* for_rows = count * rows->k < kSerialQuantize ? nullptr : threads;
    parallel_for(for_rows, first, last, 1, [&](int64_t m0, int64_t m1) {
      quantize(table, *rows, *how, panel, m0, m1, first);
      arrange(table, shape, panel, m0 - first, m1 - first);
    });
    if (has_many_rests(panel, count, shape.k)) {
      take_ones(table, count, panel);
      parallel_for(for_rows, 0, count, 1, [&](int64_t m0, int64_t m1) { arrange(table, shape, panel, m0, m1); });
    }
    parallel_for(threads, 0, blocks, 1, [&](int64_t block0, int64_t block1) {
      multiply(table, parts, panel, zero_rows, first, count, block0, block1);
    });
  }
  return TQ_OK;
}

}  // namespace
}  // namespace torchquant::intx

using namespace torchquant;

int64_t tq_intx_tile_bytes(const tq_intx_shape* shape) { return intx_shape_of(*shape).tile_bytes(); }

tq_status tq_pack_intx(const int8_t* weight, const float* scale, const int8_t* zero_point, const tq_intx_shape* shape,
                       uint8_t* packed, const tq_parallel* parallel) {
  const IntxShape s = intx_shape_of(*shape);
  intx::for_tiles(s, parallel,
                  [&](int64_t first, int64_t last) { pack_intx(weight, scale, zero_point, s, first, last, packed); });
  return TQ_OK;
}

tq_status tq_unpack_intx(const uint8_t* packed, const tq_intx_shape* shape, int8_t* weight, float* scale,
                         int8_t* zero_point, const tq_parallel* parallel) {
  const IntxShape s = intx_shape_of(*shape);
  intx::for_tiles(s, parallel,
                  [&](int64_t first, int64_t last) { unpack_intx(packed, s, first, last, weight, scale, zero_point); });
  return TQ_OK;
}

tq_status tq_linear_intx(const tq_rows* rows, const tq_row_quantization* how, const tq_intx_part* part,
                         const tq_parallel* parallel) {
  return intx::run(rows, how, {part, 1}, parallel);
}

tq_status tq_linear_intx_parts(const tq_rows* rows, const tq_row_quantization* how, const tq_intx_part* parts,
                               int64_t count, const tq_parallel* parallel) {
  return intx::run(rows, how, {parts, count}, parallel);
}
