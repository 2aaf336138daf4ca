// How one linear call is cut into work: panels of quantized rows, tiles of output channels, threads.
//
// Rows are quantized into a panel that should stay in a core's second-level cache, then multiplied with the packed
// weight. Three ways to share that among threads, by shape alone (results never depend on it: the sums are integers):
//   one thread      little work: starting a second one costs more than it brings;
//   by rows         every thread quantizes and multiplies its own rows, no meeting point; the weights are read by all,
//                   so only where they are small or the rows many;
//   by columns      rows are quantized once (by all threads where that pays), then each thread takes a share of the
//                   weight tiles: every weight is read by one thread.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "cpu/workspace.h"
#include "kernels/kernel_table.h"
#include "formats/int8_panel.h"

namespace torchquant {

struct Panel {  // rows [0, rows) of quantized activations and what the epilogue needs to know of each
  uint8_t* q;
  int64_t block_rows;  // int8_tiles.h: panel_rows
  float* row_scale;
  int32_t* row_zero;
  int32_t* row_term;  // null unless the weight has zero points
};

inline constexpr int64_t kPanelBytes = 1 << 20;         // half of a common second-level cache
inline constexpr float kThreadingPays = 4500.0f;        // ns of work from which a second thread is faster
inline constexpr int64_t kSerialQuantize = 1 << 15;     // elements below which one thread quantizes
inline constexpr int64_t kSharedWeightBytes = 1 << 20;  // weights that every thread may read for itself
inline constexpr int64_t kManyRows = 256;               // rows a thread that make up for reading all weights

// One thread's time for the whole call, in ns, roughly: weights from the second-level cache, products, rows. Measured
// at 1 to 128 rows; the constants are those of a 3 GHz server core, and only their order of magnitude matters.
inline float estimated_ns(const KernelTable& table, int64_t m, int64_t n, int64_t k) {
  const float rows = static_cast<float>(m), outputs = static_cast<float>(n), inputs = static_cast<float>(k);
  return static_cast<float>(packed_bytes(n, k)) / 128.0f + rows * outputs * inputs / table.products_per_ns +
         rows * (20.0f + 0.06f * (outputs + inputs));
}

inline Panel make_panel(const KernelTable& table, Workspace& workspace, int64_t rows, int64_t k, bool want_term) {
  const int64_t block_rows = balanced(rows, table.panel_rows);
  const int64_t bytes = panel_bytes(rows, k, block_rows), arrays = ceil_div(rows, 16) * 64;  // whole lines
  uint8_t* base = workspace.get(bytes + 3 * arrays);
  uint8_t* tail = base + bytes;
  return {base, block_rows, reinterpret_cast<float*>(tail), reinterpret_cast<int32_t*>(tail + arrays),
          want_term ? reinterpret_cast<int32_t*>(tail + 2 * arrays) : nullptr};
}

// Rows of a panel where `rows` are to be done: as few panels as fit the cache, all of about the same height, because
// each of them reads the whole weight again.
inline int64_t panel_height(int64_t rows, int64_t k, int64_t block) {
  const int64_t most = std::max(block, kPanelBytes / padded_k(k) / block * block);
  return ceil_div(ceil_div(rows, ceil_div(rows, most)), block) * block;
}

// The linears of one call: usually one, more where several share their input. Their weight tiles are numbered through.
using Parts = c10::ArrayRef<GemmArgs>;

inline int64_t outputs_of(Parts parts) {
  int64_t n = 0;
  for (const GemmArgs& part : parts) n += part.n;
  return n;
}
inline int64_t tiles_of(Parts parts) {
  int64_t tiles = 0;
  for (const GemmArgs& part : parts) tiles += num_tiles(part.n);
  return tiles;
}

inline GemmArgs with_panel(const GemmArgs& args, const Panel& panel, int64_t first_row, int64_t c_bytes) {
  GemmArgs g = args;
  g.a = panel.q;
  g.panel_rows = panel.block_rows;
  g.row_scale = panel.row_scale;
  g.row_zero = panel.row_zero;
  g.row_term = panel.row_term;
  g.c = static_cast<char*>(args.c) + first_row * args.ldc * c_bytes;
  return g;
}

// A panel of rows times the weight tiles [tile0, tile1).
inline void multiply(const KernelTable& table, Parts parts, const Panel& panel, int64_t first_row, int64_t rows,
                     int64_t c_bytes, int64_t tile0, int64_t tile1) {
  for (const GemmArgs& part : parts) {
    const int64_t tiles = num_tiles(part.n);
    const int64_t begin = std::max<int64_t>(0, tile0), end = std::min(tiles, tile1);
    if (begin < end) table.gemm(with_panel(part, panel, first_row, c_bytes), 0, rows, begin, end);
    tile0 -= tiles;
    tile1 -= tiles;
  }
}

// `make_rows(panel, m0, m1, first)` writes rows m0 .. m1 of the input to panel rows m0 - first .. m1 - first.
// A part lacks only the panel; its output starts at part.c, c_bytes an element. All have the same k.
template <class MakeRows>
void run_linear(const KernelTable& table, Parts parts, int64_t m, int64_t c_bytes, bool want_term,
                const MakeRows& make_rows) {
  const int64_t tiles = tiles_of(parts), n = outputs_of(parts), k = parts[0].k;
  const int64_t block = table.row_block;

  auto rows_alone = [&](int64_t m0, int64_t m1) {  // this thread, panel by panel
    const int64_t panel_rows = panel_height(m1 - m0, k, block);
    for (int64_t first = m0; first < m1; first += panel_rows) {
      const int64_t last = std::min(m1, first + panel_rows);
      const Panel panel = make_panel(table, Workspace::of_this_thread(), last - first, k, want_term);
      make_rows(panel, first, last, first);
      multiply(table, parts, panel, first, last - first, c_bytes, 0, tiles);
    }
  };

  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads == 1 || estimated_ns(table, m, n, k) < kThreadingPays) return rows_alone(0, m);

  const int64_t row_blocks = ceil_div(m, block);
  const bool by_rows =
      row_blocks >= threads && (tiles * tile_bytes(k) <= kSharedWeightBytes || m >= kManyRows * threads);
  if (by_rows) {
    at::parallel_for(0, row_blocks, 1,
                     [&](int64_t first, int64_t last) { rows_alone(first * block, std::min(m, last * block)); });
    return;
  }
  const int64_t panel_rows = panel_height(m, k, block);
  for (int64_t first = 0; first < m; first += panel_rows) {
    const int64_t last = std::min(m, first + panel_rows);
    const Panel panel = make_panel(table, Workspace::of_this_thread(), last - first, k, want_term);
    if ((last - first) * k < kSerialQuantize) make_rows(panel, first, last, first);
    else at::parallel_for(first, last, 1, [&](int64_t m0, int64_t m1) { make_rows(panel, m0, m1, first); });
    at::parallel_for(0, ceil_div(tiles, table.tile_block), 1, [&](int64_t block0, int64_t block1) {
      multiply(table, parts, panel, first, last - first, c_bytes, block0 * table.tile_block, block1 * table.tile_block);
    });
  }
}

}  // namespace torchquant
