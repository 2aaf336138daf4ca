// tq_conv_depthwise: images, rows of the result and blocks of channels, divided among threads.
#include <atomic>

#include "core/image.h"
#include "core/workspace.h"
#include "isa.h"

namespace torchquant {
namespace {

constexpr int64_t kStripUnit = 28;            // pixels: 4 and 7 divide it
constexpr int64_t kStripBytes = 16 << 10;     // half of a common first-level cache
constexpr int64_t kRegionBytes = 256 << 10;   // of the image that blocks of channels read one after the other
constexpr int64_t kUnitProducts = 1 << 17;    // of a unit of work, about: threads share units
constexpr int64_t kPackedBlocks = 64;         // that a thread should pack at least
constexpr int64_t kThreadProducts = 1 << 18;  // from here on a second thread pays

// As many pixels of a row as have their columns in the first-level cache, but not so few that columns are made twice.
int64_t strip_pixels(const tq_conv_call& call) {
  const int64_t column_bytes = depthwise_quads(call.kernel_h) * kStripQuadBytes / 2;
  const int64_t reach = (call.kernel_w - 1) * call.dilation_w;  // columns that a strip shares with the next
  const int64_t columns = std::max(kStripBytes / column_bytes, 4 * reach);
  const int64_t pixels = std::max<int64_t>(kStripUnit, (columns - reach) / call.stride_w);
  return std::min(call.out.w, pixels / kStripUnit * kStripUnit);
}

DepthwiseArgs args_of(const tq_conv_call& call) {
  DepthwiseArgs g{};
  const tq_image& in = call.input;
  g.h = in.h;
  g.w = in.w;
  g.row_step = in.row_stride;
  g.column_step = in.pixel_stride;
  g.multiplier = call.out.c / in.c;
  g.kernel_h = call.kernel_h;
  g.kernel_w = call.kernel_w;
  g.stride_h = call.stride_h;
  g.stride_w = call.stride_w;
  g.pad_top = call.pad_top;
  g.pad_left = call.pad_left;
  g.dilation_h = call.dilation_h;
  g.dilation_w = call.dilation_w;
  g.packed = call.packed;
  g.weight_scale = call.weight_scale;
  g.bias = call.bias;
  tq_activation activation = call.activation;
  g.result = result_args(call.out, call.out_qparams, &activation);
  g.activation = activation_of(activation);
  if (call.residual) {
    g.residual_int8 = call.residual->type == TQ_I8;
    g.residual_scale = call.residual_qparams.scale;
    g.residual_zero = call.residual_qparams.zero_point;
    g.residual_row = call.residual->row_stride;
    g.residual_pixel = call.residual->pixel_stride;
  }
  g.channels = call.out.c;
  g.out_w = call.out.w;
  g.out_row = call.out.row_stride;
  g.out_pixel = call.out.pixel_stride;
  g.strip_pixels = strip_pixels(call);
  return g;
}

// The work of a call in equal shares: bands of about `rows` rows of an image, each block of channels in turn, strips of
// rows that are computed together. A strip of a whole block counts as two, of a block of at most half its channels as
// one. A share may end anywhere between two strips.
class Shares {
 public:
  Shares(const tq_image& out, int64_t rows, int64_t strip_rows)
      : images_(out.n), rows_(out.h), strip_rows_(strip_rows) {
    const int64_t strips = ceil_div(out.h, strip_rows);
    bands_ = ceil_div(strips, ceil_div(rows, strip_rows));
    strips_ = ceil_div(strips, bands_);  // of a band
    bands_ = ceil_div(strips, strips_);
    const int64_t blocks = depthwise_blocks(out.c);
    halves_ = 2 * blocks - (out.c - (blocks - 1) * kDepthwiseChannels <= kDepthwiseChannels / 2 ? 1 : 0);
  }

  int64_t total() const { return images_ * bands_ * halves_ * strips_; }

  // run(image, block, first row, last row) for the part [first, last) of the total.
  template <class Run>
  void run(int64_t first, int64_t last, const Run& run) const {
    const int64_t band_cost = halves_ * strips_, block_cost = 2 * strips_;
    while (first < last) {
      const int64_t band = first / band_cost, at = first % band_cost, block = at / block_cost;
      const int64_t begin = block * block_cost, end = std::min(begin + block_cost, band_cost);
      const int64_t stop = std::min(end, last - band * band_cost);
      const int64_t width = (end - begin) / strips_;  // what a strip counts
      const int64_t row = band % bands_ * strips_ * strip_rows_;
      const int64_t row0 = row + ceil_div(at - begin, width) * strip_rows_;
      const int64_t row1 = std::min(rows_, row + ceil_div(stop - begin, width) * strip_rows_);
      if (row0 < row1) run(band / bands_, block, row0, row1);
      first = band * band_cost + stop;
    }
  }

 private:
  int64_t images_, rows_, strip_rows_, bands_, strips_, halves_;
};

}  // namespace
}  // namespace torchquant

using namespace torchquant;

int64_t tq_depthwise_blocks(int64_t outputs) { return depthwise_blocks(outputs); }
int64_t tq_depthwise_block_bytes(int64_t kernel_h, int64_t kernel_w) {
  return depthwise_block_bytes(kernel_h, kernel_w);
}

tq_status tq_pack_depthwise(const int8_t* weight, int64_t outputs, int64_t kernel_h, int64_t kernel_w, int8_t* packed,
                            const tq_parallel* parallel) {
  parallel_for(parallel, 0, depthwise_blocks(outputs), kPackedBlocks, [&](int64_t first, int64_t last) {
    pack_depthwise(weight, outputs, kernel_h, kernel_w, first, last, packed);
  });
  return TQ_OK;
}
tq_status tq_unpack_depthwise(const int8_t* packed, int64_t outputs, int64_t kernel_h, int64_t kernel_w, int8_t* weight,
                              const tq_parallel* parallel) {
  parallel_for(parallel, 0, depthwise_blocks(outputs), kPackedBlocks, [&](int64_t first, int64_t last) {
    unpack_depthwise(packed, outputs, kernel_h, kernel_w, first, last, weight);
  });
  return TQ_OK;
}

tq_status tq_conv_depthwise(const tq_conv_call* c, const tq_parallel* parallel) {
  const tq_conv_call& call = *c;
  const tq_image &in = call.input, &out = call.out;
  if (is_empty(out)) return TQ_OK;
  const DepthwiseArgs base = args_of(call);
  const KernelTable& table = kernels();

  const int64_t blocks = depthwise_blocks(out.c), taps = call.kernel_h * call.kernel_w;
  const int64_t row_products = out.w * std::min(out.c, kDepthwiseChannels) * taps;
  int64_t rows = std::max<int64_t>(1, kUnitProducts / row_products);
  if (blocks > 1) {  // they read the same rows of the image
    const int64_t row_bytes = std::max<int64_t>(1, call.stride_h * in.w * in.pixel_stride);
    rows = std::min(rows, std::max<int64_t>(4, kRegionBytes / row_bytes));
  }
  const int64_t strip_rows = depthwise_strip_rows(call.kernel_h, call.stride_h, call.dilation_h);
  const Shares shares(out, rows, strip_rows);
  const int64_t columns = strip_columns(base.strip_pixels, call.stride_w, call.kernel_w, call.dilation_w);
  const int64_t scratch = std::max(depthwise_scratch(columns, call.kernel_h, call.kernel_w),
                                   taps * kDepthwiseChannels * int64_t{sizeof(int32_t)});
  std::atomic<tq_status> status{TQ_OK};
  const int64_t strip_products = strip_rows * row_products / 2;
  parallel_for(parallel, 0, shares.total(), std::max<int64_t>(1, kThreadProducts / 2 / strip_products),
               [&](int64_t first, int64_t last) {
                 DepthwiseArgs g = base;
                 g.scratch = Workspace::of_this_thread().get(scratch);
                 if (!g.scratch) {
                   status = TQ_OUT_OF_MEMORY;
                   return;
                 }
                 shares.run(first, last, [&](int64_t n, int64_t block, int64_t row0, int64_t row1) {
                   g.in = reinterpret_cast<const uint8_t*>(pixel_at(in, n, 0, 0));
                   g.in_end = reinterpret_cast<const uint8_t*>(pixel_at(in, n, in.h - 1, in.w - 1)) + in.c;
                   g.scale = call.input_scale[call.per_image ? n : 0];
                   g.zero = call.input_zero_point ? call.input_zero_point[call.per_image ? n : 0] : 0;
                   g.residual = call.residual ? pixel_at(*call.residual, n, 0, 0) : nullptr;
                   g.out = pixel_at(out, n, 0, 0);
                   table.depthwise(g, block, row0, row1);
                 });
               });
  return status;
}
