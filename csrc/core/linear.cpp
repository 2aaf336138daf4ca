// How one linear call is cut into work: panels of quantized rows, tiles of output channels, threads.
//
// Rows are quantized into a panel that should stay in a core's second-level cache, and the panel is multiplied by the
// packed weight. There are three ways to share the work among threads, chosen by shape alone (no result depends on the
// choice, because the sums are integers):
//   one thread      little work: starting a second thread costs more than it brings;
//   by rows every thread quantizes and multiplies its own rows and threads never wait for each other; every thread
//                   reads all weights, therefore only where they are small or the rows many;
//   by columns      rows are quantized once (by all threads where that pays), then each thread takes a share of the
//                   weight tiles: every weight is read by one thread.
#include <algorithm>
#include <atomic>

#include "core/convert.h"
#include "core/threads.h"
#include "core/workspace.h"
#include "formats/int8_panel.h"
#include "isa.h"

namespace torchquant {
namespace {

constexpr int64_t kPanelBytes = 1 << 20;         // half of a common second-level cache
constexpr float kThreadingPays = 4500.0f;        // ns of work from which on a second thread is faster
constexpr int64_t kSerialQuantize = 1 << 15;     // elements below which one thread quantizes
constexpr int64_t kSharedWeightBytes = 1 << 20;  // weights that every thread may read for itself
constexpr int64_t kManyRows = 256;               // rows of a thread that make up for reading all weights

struct Panel {         // rows of quantized activations and what the epilogue needs about each of them
  uint8_t* q;          // null: no memory
  int64_t block_rows;  // int8_panel.h: panel_rows
  float* row_scale;
  int32_t* row_zero;
  int32_t* row_term;  // null unless the weight has zero points
};

// The linears of one call: usually one, more where several share their input. Their weight tiles are numbered through.
struct Parts {
  const tq_linear_part* begin_;
  int64_t count;
  const tq_linear_part* begin() const { return begin_; }
  const tq_linear_part* end() const { return begin_ + count; }
};

struct Call {
  const KernelTable& table;
  Parts parts;
  int64_t m, n, k, tiles;
  bool same_row_zero, want_term;
};

// One thread's time for the whole call, in ns, roughly: weights from the second-level cache, products, rows. Measured
// at 1 to 128 rows; the constants are those of a 3 GHz server core, and only their order of magnitude matters.
float estimated_ns(const Call& call) {
  const float rows = static_cast<float>(call.m), outputs = static_cast<float>(call.n),
              inputs = static_cast<float>(call.k);
  return static_cast<float>(packed_bytes(call.n, call.k)) / 128.0f +
         rows * outputs * inputs / call.table.products_per_ns + rows * (20.0f + 0.06f * (outputs + inputs));
}

Panel make_panel(const Call& call, int64_t rows) {
  const int64_t block_rows = balanced(rows, call.table.panel_rows);
  const int64_t bytes = panel_bytes(rows, call.k, block_rows), arrays = ceil_div(rows, 16) * 64;  // whole lines
  uint8_t* base = Workspace::of_this_thread().get(bytes + 3 * arrays);
  if (!base) return {};
  uint8_t* tail = base + bytes;
  return {base, block_rows, reinterpret_cast<float*>(tail), reinterpret_cast<int32_t*>(tail + arrays),
          call.want_term ? reinterpret_cast<int32_t*>(tail + 2 * arrays) : nullptr};
}

// Rows of a panel where `rows` are to be done: as few panels as fit the cache, all of about the same height, because
// each of them reads the whole weight again.
int64_t panel_height(int64_t rows, int64_t k, int64_t block) {
  const int64_t most = std::max(block, kPanelBytes / panel_row_bytes(k) / block * block);
  return ceil_div(ceil_div(rows, ceil_div(rows, most)), block) * block;
}

GemmArgs gemm_args(const Call& call, const tq_linear_part& part, const Panel& panel, int64_t first_row) {
  GemmArgs g{};
  g.a = panel.q;
  g.panel_rows = panel.block_rows;
  g.k = call.k;
  g.n = part.n;
  g.packed = part.packed;
  g.row_scale = panel.row_scale;
  g.row_zero = panel.row_zero;
  g.same_row_zero = call.same_row_zero;
  g.row_term = panel.row_term;
  g.weight_scale = part.weight_scale;
  g.weight_zero = part.weight_zero_point;
  g.bias = part.bias;
  g.bias_i32 = part.integer_bias;
  g.activation = activation_of(part.activation);
  g.out_type = out_type(part.out_type);
  if (part.out_type == TQ_I8 || part.out_type == TQ_U8) {
    g.inv_out_scale = 1.0f / part.out_scale;
    g.out_lo = static_cast<float>(part.out_qmin - part.out_zero_point);
    g.out_hi = static_cast<float>(part.out_qmax - part.out_zero_point);
    g.out_zero = part.out_zero_point;
  }
  if (part.residual) {
    g.residual.data = element_at(part.residual, part.residual_type, first_row * part.residual_stride);
    g.residual.stride = part.residual_stride;
    g.residual.is_int8 = part.residual_type == TQ_I8;
    g.residual.scale = part.residual_scale;
    g.residual.zero = part.residual_zero_point;
  }
  g.c = element_at(part.out, part.out_type, first_row * part.out_stride);
  g.ldc = part.out_stride;
  return g;
}

// A panel of rows times the weight tiles [tile0, tile1).
void multiply(const Call& call, const Panel& panel, int64_t first_row, int64_t rows, int64_t tile0, int64_t tile1) {
  for (const tq_linear_part& part : call.parts) {
    const int64_t tiles = num_tiles(part.n);
    const int64_t begin = std::max<int64_t>(0, tile0), end = std::min(tiles, tile1);
    if (begin < end) call.table.gemm(gemm_args(call, part, panel, first_row), 0, rows, begin, end);
    tile0 -= tiles;
    tile1 -= tiles;
  }
}

// `make_rows(panel, m0, m1, first)` writes the rows m0 .. m1 of the input to the panel's rows m0 - first .. m1 - first.
template <class MakeRows>
tq_status run(const Call& call, const tq_parallel* parallel, const MakeRows& make_rows) {
  const int64_t m = call.m, k = call.k, block = call.table.row_block;

  const auto rows_alone = [&](int64_t m0, int64_t m1) {  // this thread, panel by panel
    const int64_t panel_rows = panel_height(m1 - m0, k, block);
    for (int64_t first = m0; first < m1; first += panel_rows) {
      const int64_t last = std::min(m1, first + panel_rows);
      const Panel panel = make_panel(call, last - first);
      if (!panel.q) return TQ_OUT_OF_MEMORY;
      make_rows(panel, first, last, first);
      multiply(call, panel, first, last - first, 0, call.tiles);
    }
    return TQ_OK;
  };

  if (!parallel || estimated_ns(call) < kThreadingPays) return rows_alone(0, m);
  const int64_t threads = threads_of(parallel);
  if (threads == 1) return rows_alone(0, m);

  const int64_t row_blocks = ceil_div(m, block);
  const bool by_rows =
      row_blocks >= threads && (call.tiles * tile_bytes(k) <= kSharedWeightBytes || m >= kManyRows * threads);
  if (by_rows) {
    std::atomic<tq_status> status{TQ_OK};
    parallel_for(parallel, 0, row_blocks, 1, [&](int64_t first, int64_t last) {
      if (rows_alone(first * block, std::min(m, last * block)) != TQ_OK) status = TQ_OUT_OF_MEMORY;
    });
    return status;
  }
  const int64_t panel_rows = panel_height(m, k, block), tile_block = call.table.tile_block;
  for (int64_t first = 0; first < m; first += panel_rows) {
    const int64_t last = std::min(m, first + panel_rows);
    const Panel panel = make_panel(call, last - first);
    if (!panel.q) return TQ_OUT_OF_MEMORY;
    if ((last - first) * k < kSerialQuantize) make_rows(panel, first, last, first);
    else parallel_for(parallel, first, last, 1, [&](int64_t m0, int64_t m1) { make_rows(panel, m0, m1, first); });
    parallel_for(parallel, 0, ceil_div(call.tiles, tile_block), 1, [&](int64_t block0, int64_t block1) {
      multiply(call, panel, first, last - first, block0 * tile_block, block1 * tile_block);
    });
  }
  return TQ_OK;
}

struct QuantizeRows {  // float rows into a panel
  const KernelTable& table;
  const tq_rows& rows;
  const tq_row_quantization& how;

  void operator()(const Panel& panel, int64_t m0, int64_t m1, int64_t first) const {
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
    q.offset = table.panel_offset;
    q.q = panel.q;
    q.panel_rows = panel.block_rows;
    q.row_scale = panel.row_scale;
    q.row_zero = panel.row_zero;
    q.row_term = panel.row_term;
    table.quantize_rows(q, m0 - first, m1 - first);
  }
};

struct CopyRows {  // integer rows into a panel
  const KernelTable& table;
  const tq_linear_input& input;

  void operator()(const Panel& panel, int64_t m0, int64_t m1, int64_t first) const {
    const tq_rows& rows = input.rows;
    const bool is_signed = rows.type == TQ_I8;
    CopyRowsArgs g{};
    g.x = static_cast<const uint8_t*>(rows.x) + first * rows.stride;
    g.x_stride = rows.stride;
    g.k = rows.k;
    g.x_signed = is_signed;
    g.shift = is_signed ? table.panel_offset : table.panel_offset - 128;
    g.q = panel.q;
    g.panel_rows = panel.block_rows;
    g.row_zero = panel.row_zero;
    g.row_term = panel.row_term;
    for (int64_t m = m0; m < m1; ++m) {
      panel.row_scale[m - first] = input.scale ? input.scale[input.scale_per_row ? m : 0] : 1.0f;
      const int32_t zero = input.zero_point ? input.zero_point[input.zero_point_per_row ? m : 0] : 0;
      panel.row_zero[m - first] = zero + g.shift;
    }
    table.copy_rows(g, m0 - first, m1 - first);
  }
};

}  // namespace
}  // namespace torchquant

using namespace torchquant;

tq_status tq_linear(const tq_linear_input* input, const tq_linear_part* parts, int64_t count,
                    const tq_parallel* parallel) {
  const tq_rows& rows = input->rows;
  if (rows.m == 0 || count == 0) return TQ_OK;
  const KernelTable& table = kernels();
  Call call{table, {parts, count}, rows.m, 0, rows.k, 0, true, false};
  for (const tq_linear_part& part : call.parts) {
    call.n += part.n;
    call.tiles += num_tiles(part.n);
    call.want_term |= part.weight_zero_point != nullptr;
  }
  if (is_float(rows.type)) {
    call.same_row_zero = input->quantization.mode != TQ_ASYMMETRIC;
    return run(call, parallel, QuantizeRows{table, rows, input->quantization});
  }
  call.same_row_zero = !input->zero_point || !input->zero_point_per_row;
  return run(call, parallel, CopyRows{table, *input});
}
