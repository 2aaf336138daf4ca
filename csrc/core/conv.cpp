// How one convolution is cut into work: blocks of output pixels, groups, tiles of output channels, threads.
//
// The values that the kernel covers at a block of output pixels are gathered into a panel, which stays in a core's
// caches, and the panel is multiplied by the packed weight of its group. A matrix of the whole image is never made.
// Threads share either the output pixels (each reads all weights) or, where the image is small and the weights are
// large, the output channels (each gathers all pixels for itself: a copy of K bytes costs far less than their products
// with a share of the channels). No result depends on the choice, because the sums are integers.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "core/convert.h"
#include "core/threads.h"
#include "core/workspace.h"
#include "formats/int8_conv.h"
#include "formats/int8_panel.h"
#include "isa.h"

namespace torchquant::conv {
namespace {

constexpr int64_t kPanelBytes = 1 << 18;         // a quarter of a common second-level cache
constexpr int64_t kSmallPanelBytes = 1 << 15;    // where rows are read in one pass over all channels
constexpr int64_t kLeastRows = 49;               // rows of a panel, unless there are fewer: a 7 x 7 image
constexpr float kThreadingPays = 4500.0f;        // ns of work from which on a second thread is faster
constexpr int64_t kSharedWeightBytes = 1 << 19;  // weights that every thread may read for itself

struct Conv {
  const KernelTable& table;
  const tq_conv_call& call;
  ConvShape shape;
  int64_t rows;     // output pixels of all images
  int64_t uniform;  // from row to row of so many rows, output and residual have one stride
  int64_t tiles;    // of a group
  int64_t panel_rows = table.panel_rows, most_rows = panel_rows;
  int64_t row_block = table.row_block, tile_block = table.tile_block;
  Int8Channels channels{};  // of the first group; start is null unless the product has an int8 output of its own
};

// Rows from which on the distance of two pixels in memory may differ.
int64_t uniform_rows(const tq_image& image) {
  if (image.row_stride != image.w * image.pixel_stride && image.h > 1) return image.w;
  if (image.image_stride != image.h * image.w * image.pixel_stride && image.n > 1) return image.h * image.w;
  return image.n * image.h * image.w;
}

int64_t pixel_at(const tq_image& image, int64_t row) {
  const int64_t pixels = image.h * image.w, in_image = row % pixels;
  return row / pixels * image.image_stride + in_image / image.w * image.row_stride +
         in_image % image.w * image.pixel_stride;
}

// A panel and what the epilogue needs about each of its rows.
struct Panel {
  uint8_t* q;  // null: no memory
  int64_t height, block_rows;
  float* row_scale;
  int32_t* row_zero;
};

// The rows of a block of a panel for the product with an int8 output: the usual number, unless another one leaves less
// for the last block. A block of one or two rows takes as long as one of three: it waits for the weights.
int64_t block_height(int64_t rows, int64_t usual, int64_t most) {
  if (rows <= most) return rows;
  const auto cost = [&](int64_t height) {
    const int64_t left = rows % height;
    return rows - left + (left ? std::max<int64_t>(3, left) : 0);
  };
  int64_t best = usual;
  for (int64_t height = most; height > usual / 2; --height)
    if (cost(height) < cost(best)) best = height;
  return best;
}

// All panels have about the same height: one of few rows would read all weights for them.
int64_t panel_height(const Conv& conv, int64_t rows) {
  const int64_t block = conv.row_block, row_bytes = panel_row_bytes(conv.shape.k());
  if (!conv.channels.start) {
    const int64_t most = std::max(kLeastRows, kPanelBytes / row_bytes) / block * block;
    return rows <= most + block ? rows : std::max(block, most);
  }
  const int64_t most = std::max(kLeastRows, kSmallPanelBytes / row_bytes);
  return rows <= most + block ? rows : balanced(rows, most);
}

Panel make_panel(const Conv& conv, int64_t rows) {
  int64_t height = panel_height(conv, rows);
  const int64_t block =
      conv.channels.start ? block_height(height, conv.panel_rows, conv.most_rows) : balanced(height, conv.panel_rows);
  if (height < rows) height = ceil_div(height, block) * block;
  const int64_t bytes = panel_bytes(height, conv.shape.k(), block), arrays = ceil_div(height, 16) * 64;
  uint8_t* base = Workspace::of_this_thread().get(bytes + 2 * arrays);
  if (!base) return {};
  return {base, height, block, reinterpret_cast<float*>(base + bytes),
          reinterpret_cast<int32_t*>(base + bytes + arrays)};
}

void set_row_parameters(const Conv& conv, const Panel& panel, int64_t first, int64_t count) {
  const tq_conv_call& call = conv.call;
  const int64_t pixels = call.out.h * call.out.w;
  const auto zero_of = [&](int64_t image) {
    return (call.input_zero_point ? call.input_zero_point[image] : 0) + conv.table.panel_offset;
  };
  if (!call.per_image) {
    std::fill_n(panel.row_scale, count, *call.input_scale);
    std::fill_n(panel.row_zero, count, zero_of(0));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t image = (first + i) / pixels;
    panel.row_scale[i] = call.input_scale[image];
    panel.row_zero[i] = zero_of(image);
  }
}

void gather(const Conv& conv, const Panel& panel, int64_t group, int64_t first, int64_t count) {
  const tq_conv_call& call = conv.call;
  GatherArgs g{};
  g.x = static_cast<const int8_t*>(call.input.data) + group * conv.shape.channels;
  g.h = call.input.h;
  g.w = call.input.w;
  g.c = conv.shape.channels;
  g.image_stride = call.input.image_stride;
  g.row_stride = call.input.row_stride;
  g.pixel_stride = call.input.pixel_stride;
  g.kernel_h = call.kernel_h;
  g.kernel_w = call.kernel_w;
  g.stride_h = call.stride_h;
  g.stride_w = call.stride_w;
  g.pad_top = call.pad_top;
  g.pad_left = call.pad_left;
  g.dilation_h = call.dilation_h;
  g.dilation_w = call.dilation_w;
  g.out_h = call.out.h;
  g.out_w = call.out.w;
  g.first = first;
  g.shift = conv.table.panel_offset;
  g.q = panel.q;
  g.panel_rows = panel.block_rows;
  g.row_zero = panel.row_zero;
  conv.table.gather_rows(g, 0, count);
}

GemmArgs gemm_args(const Conv& conv, const Panel& panel, int64_t group, int64_t first) {
  const tq_conv_call& call = conv.call;
  const int64_t n = conv.shape.n(), channel = group * n;
  GemmArgs g{};
  g.a = panel.q;
  g.panel_rows = panel.block_rows;
  g.k = conv.shape.k();
  g.n = n;
  g.packed = call.packed + group * packed_group_bytes(conv.shape);
  g.row_scale = panel.row_scale;
  g.row_zero = panel.row_zero;
  g.same_row_zero = !call.per_image || !call.input_zero_point;
  g.weight_scale = call.weight_scale + channel;
  g.bias = call.bias ? call.bias + channel : nullptr;
  if (const tq_image* residual = call.residual) {
    g.residual.data = element_at(residual->data, residual->type, pixel_at(*residual, first) + channel);
    g.residual.stride = residual->pixel_stride;
    g.residual.is_int8 = residual->type == TQ_I8;
    g.residual.scale = call.residual_qparams.scale;
    g.residual.zero = call.residual_qparams.zero_point;
  }
  g.activation = activation_of(call.activation);
  g.out_type = out_type(call.out.type);
  if (call.out.type == TQ_I8) {
    const tq_qparams& q = call.out_qparams;
    g.inv_out_scale = 1.0f / q.scale;
    g.out_lo = static_cast<float>(q.qmin - q.zero_point);
    g.out_hi = static_cast<float>(q.qmax - q.zero_point);
    g.out_zero = q.zero_point;
  }
  g.c = element_at(call.out.data, call.out.type, pixel_at(call.out, first) + channel);
  g.ldc = call.out.pixel_stride;
  return g;
}

Int8Channels channels_of(const Conv& conv, int64_t group, bool fetch) {
  Int8Channels c = conv.channels;
  const int64_t first = group * conv.tiles * kTileN;
  c.start += first;
  c.scale += first;
  c.bias += first;
  c.fetch = fetch;
  return c;
}

// The number of tiles side by side that leaves the least to do for what remains of them.
int64_t tiles_side_by_side(int64_t tiles) {
  if (tiles <= 4) return tiles;
  if (tiles % 4 == 0) return 4;
  return tiles % 3 == 0 || tiles % 4 == 1 ? 3 : 4;
}

// The least and the greatest int8 output. relu and relu6 do nothing else than to move them: quantization is monotone.
struct Limits {
  bool ok;  // whether that is all that the activation does
  int32_t least, greatest;
};
Limits int8_limits(tq_activation activation, const tq_qparams& q) {
  if (activation == TQ_NONE) return {true, q.qmin, q.qmax};
  const int32_t least = std::max(q.qmin, q.zero_point);
  if (activation == TQ_RELU) return {true, least, q.qmax};
  if (activation != TQ_RELU6) return {false, 0, 0};
  const float six = std::nearbyint(6.0f * (1.0f / q.scale)), most = static_cast<float>(q.qmax - q.zero_point);
  return {true, least, six < most ? static_cast<int32_t>(six) + q.zero_point : q.qmax};
}

// Fills the channels of a group; returns what fill_int8 does.
int32_t fill_channels(const Conv& conv, int64_t group, int32_t* start, float* scale, float* bias) {
  const tq_conv_call& call = conv.call;
  Int8ChannelsArgs g{};
  g.k = conv.shape.k();
  g.n = conv.shape.n();
  g.packed = call.packed + group * packed_group_bytes(conv.shape);
  g.row_zero = (call.input_zero_point ? *call.input_zero_point : 0) + conv.table.panel_offset;
  g.input_scale = *call.input_scale;
  g.weight_scale = call.weight_scale + group * g.n;
  g.bias = call.bias ? call.bias + group * g.n : nullptr;
  g.start = start;
  g.scale = scale;
  g.bias_of_tiles = bias;
  return conv.table.fill_int8(g);
}

// The register tile of the product with an int8 output where a thread has so many tiles.
void set_register_tile(Conv& conv, int64_t tiles) {
  conv.tile_block = tiles_side_by_side(tiles);
  conv.panel_rows = conv.row_block = conv.table.int8_rows[conv.tile_block];
  conv.most_rows = conv.table.int8_most_rows[conv.tile_block];
}

// Makes the product with an int8 output the one to use, where its conditions hold (Int8Channels in kernels/conv.h).
// memory: what conv.channels points to.
void prefer_int8(Conv& conv, std::unique_ptr<float[]>& memory) {
  const tq_conv_call& call = conv.call;
  const tq_qparams& q = call.out_qparams;
  if (!conv.table.gemm_int8 || call.out.type != TQ_I8 || call.per_image || conv.shape.k() > kMaxExactK ||
      (call.residual && call.residual->type != TQ_I8))
    return;
  const Limits limits = int8_limits(call.activation, q);
  if (!limits.ok) return;
  const int64_t width = conv.tiles * kTileN, count = conv.shape.groups * width;
  memory.reset(new (std::nothrow) float[static_cast<size_t>(3 * count)]);
  if (!memory) return;
  float* const scale = memory.get();
  float* const bias = scale + count;
  int32_t* const start = reinterpret_cast<int32_t*>(bias + count);
  int32_t bits = 0;
  for (int64_t group = 0; group < conv.shape.groups; ++group)
    bits =
        std::max(bits, fill_channels(conv, group, start + group * width, scale + group * width, bias + group * width));
  float greatest;
  std::memcpy(&greatest, &bits, sizeof(greatest));
  if (call.residual) greatest += 255.0f * call.residual_qparams.scale;
  // A comparison with NaN is false. The second one: an infinity times a tiny 1 / scale would be small.
  if (!(greatest * (1.0f / q.scale) <= 0x1p30f && greatest <= 0x1p100f)) return;
  conv.channels = {start, scale, bias, static_cast<int8_t>(limits.least), static_cast<int8_t>(limits.greatest), true};
  set_register_tile(conv, conv.tiles);
}

// Rows [m0, m1) times the tiles [tile0, tile1) of the groups [group0, group1), on this thread.
tq_status convolve(const Conv& conv, int64_t m0, int64_t m1, int64_t group0, int64_t group1, int64_t tile0,
                   int64_t tile1) {
  if (m0 >= m1) return TQ_OK;
  const Panel panel = make_panel(conv, m1 - m0);
  if (!panel.q) return TQ_OUT_OF_MEMORY;
  if (!conv.call.per_image) set_row_parameters(conv, panel, m0, std::min(panel.height, m1 - m0));
  const bool weights_stay = (group1 - group0) * (tile1 - tile0) * tile_bytes(conv.shape.k()) <= kSharedWeightBytes;
  for (int64_t first = m0, count; first < m1; first += count) {
    count = std::min({panel.height, m1 - first, conv.uniform - first % conv.uniform});
    if (conv.call.per_image) set_row_parameters(conv, panel, first, count);
    for (int64_t group = group0; group < group1; ++group) {
      gather(conv, panel, group, first, count);
      const GemmArgs g = gemm_args(conv, panel, group, first);
      const bool fetch = first == m0 || !weights_stay;
      if (conv.channels.start) conv.table.gemm_int8(g, channels_of(conv, group, fetch), 0, count, tile0, tile1);
      else conv.table.gemm(g, 0, count, tile0, tile1);
    }
  }
  return TQ_OK;
}

// One thread's time for the whole call, in ns, roughly.
float estimated_ns(const Conv& conv) {
  const float rows = static_cast<float>(conv.rows), outputs = static_cast<float>(conv.shape.outputs),
              inputs = static_cast<float>(conv.shape.k());
  return rows * outputs * inputs / conv.table.products_per_ns + rows * (10.0f + 0.06f * (outputs + inputs));
}

tq_status run(const Conv& conv, const tq_parallel* parallel) {
  const int64_t groups = conv.shape.groups, rows = conv.rows;
  const int64_t threads = parallel && estimated_ns(conv) >= kThreadingPays ? threads_of(parallel) : 1;
  if (threads == 1) return convolve(conv, 0, rows, 0, groups, 0, conv.tiles);
  const int64_t row_block = conv.row_block, row_blocks = ceil_div(rows, row_block);
  const int64_t tile_block = conv.tile_block, tile_blocks = ceil_div(conv.tiles, tile_block);
  const bool small_weights = groups * packed_group_bytes(conv.shape) <= kSharedWeightBytes;
  std::atomic<tq_status> status{TQ_OK};
  const auto keep = [&](tq_status of_part) {
    if (of_part != TQ_OK) status = of_part;
  };
  const bool by_rows = row_blocks >= 8 * threads && (small_weights || rows >= conv.shape.n());
  if (!by_rows && groups >= threads) {
    parallel_for(parallel, 0, groups, 1,
                 [&](int64_t first, int64_t last) { keep(convolve(conv, 0, rows, first, last, 0, conv.tiles)); });
  } else if (!by_rows && conv.channels.start && conv.tiles >= threads) {  // equal shares, whatever fits side by side
    Conv part = conv;
    set_register_tile(part, ceil_div(conv.tiles, threads));
    parallel_for(parallel, 0, conv.tiles, 1,
                 [&](int64_t first, int64_t last) { keep(convolve(part, 0, rows, 0, groups, first, last)); });
  } else if (!by_rows && tile_blocks >= threads) {
    parallel_for(parallel, 0, tile_blocks, 1, [&](int64_t first, int64_t last) {
      keep(convolve(conv, 0, rows, 0, groups, first * tile_block, std::min(conv.tiles, last * tile_block)));
    });
  } else {
    parallel_for(parallel, 0, row_blocks, 1, [&](int64_t first, int64_t last) {
      keep(convolve(conv, first * row_block, std::min(rows, last * row_block), 0, groups, 0, conv.tiles));
    });
  }
  return status;
}

}  // namespace
}  // namespace torchquant::conv

using namespace torchquant;

bool tq_conv_is_depthwise(int64_t channels_per_group, int64_t groups) {
  return ConvShape{groups, channels_per_group, 1, 1, groups}.is_depthwise();
}

tq_status tq_conv(const tq_conv_call* call, const tq_parallel* parallel) {
  const tq_image& out = call->out;
  if (out.n == 0) return TQ_OK;
  const ConvShape shape{out.c, call->input.c / call->groups, call->kernel_h, call->kernel_w, call->groups};
  if (shape.is_depthwise()) return tq_conv_depthwise(call, parallel);
  int64_t uniform = conv::uniform_rows(out);
  if (call->residual) uniform = std::min(uniform, conv::uniform_rows(*call->residual));
  conv::Conv convolution{kernels(), *call, shape, out.n * out.h * out.w, uniform, num_tiles(shape.n())};
  std::unique_ptr<float[]> channels;
  conv::prefer_int8(convolution, channels);
  return conv::run(convolution, parallel);
}
