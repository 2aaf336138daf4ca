// tq_image_max_pool, tq_image_avg_pool, tq_image_adaptive_avg_pool: rows of windows, each cut to the image.
#include <vector>

#include "core/image.h"
#include "isa.h"

namespace torchquant {
namespace {

// The taps of one window along one dimension.
struct Taps {
  int64_t first, count;  // inside the image
  int64_t counted;       // of an average: with the padding or without
};

Taps window_taps(int64_t index, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                 bool count_padding) {
  const int64_t start = index * stride - pad;
  const int64_t skipped = start < 0 ? ceil_div(-start, dilation) : 0;
  const int64_t before_end = start < size ? ceil_div(size - start, dilation) : 0;  // taps below `size`
  const int64_t count = std::max<int64_t>(0, std::min(kernel, before_end) - skipped);
  const int64_t padded = std::min(start + kernel, size + pad) - start;  // dilation is 1 where it is asked for
  return {count > 0 ? start + skipped * dilation : 0, count, count_padding ? padded : count};
}

Taps adaptive_taps(int64_t index, int64_t size, int64_t out) {
  const int64_t first = index * size / out, last = ceil_div((index + 1) * size, out);
  return {first, last - first, last - first};
}

using PoolKernel = void (*)(const ImagePoolArgs&);

// taps_h(y), taps_w(x): those of the result's row y and column x.
template <class TapsH, class TapsW>
tq_status pool(const tq_image& in, const tq_image& out, ImagePoolArgs args, int64_t dilation_h, int64_t dilation_w,
               PoolKernel kernel, const TapsH& taps_h, const TapsW& taps_w, const tq_parallel* parallel) {
  if (is_empty(out)) return TQ_OK;
  return status_of([&] {
    std::vector<PoolColumns> columns(static_cast<size_t>(out.w));
    int64_t most = 0;
    for (int64_t x = 0; x < out.w; ++x) {
      const Taps taps = taps_w(x);
      columns[static_cast<size_t>(x)] = {taps.first * in.pixel_stride, taps.count, taps.counted};
      most += taps.count;
    }
    args.columns = columns.data();
    args.pixels = out.w;
    args.channels = out.c;
    args.out_pixel = out.pixel_stride;
    args.row_step = dilation_h * in.row_stride;
    args.column_step = dilation_w * in.pixel_stride;
    const int64_t row_work = std::max<int64_t>(1, most * taps_h(out.h / 2).count * out.c / 4);
    parallel_for(parallel, 0, out.n * out.h, std::max<int64_t>(1, kImageElements / row_work),
                 [&](int64_t first, int64_t last) {
                   for (int64_t i = first; i < last; ++i) {
                     const int64_t n = i / out.h, y = i % out.h;
                     const Taps taps = taps_h(y);
                     ImagePoolArgs g = args;
                     g.in = pixel_at(in, n, taps.first, 0);
                     g.rows = taps.count;
                     g.counted_rows = taps.counted;
                     g.out = pixel_at(out, n, y, 0);
                     kernel(g);
                   }
                 });
  });
}

ImagePoolArgs average_args(tq_qparams inq, const tq_image& out, tq_qparams outq) {
  ImagePoolArgs args{};
  args.scale = inq.scale;
  args.zero = inq.zero_point;
  args.result = result_args(out, outq, nullptr);
  return args;
}

PoolKernel average_kernel(const tq_image& in) {
  return in.type == TQ_I8 ? kernels().average_pool_row : kernels().average_floats_row;
}

}  // namespace
}  // namespace torchquant

using namespace torchquant;

tq_status tq_image_max_pool(const tq_image* in, const tq_window* window, const tq_image* out,
                            const tq_parallel* parallel) {
  const tq_window& w = *window;
  return pool(
      *in, *out, ImagePoolArgs{}, w.dilation_h, w.dilation_w, kernels().max_pool_row,
      [&](int64_t y) { return window_taps(y, in->h, w.kernel_h, w.stride_h, w.pad_h, w.dilation_h, false); },
      [&](int64_t x) { return window_taps(x, in->w, w.kernel_w, w.stride_w, w.pad_w, w.dilation_w, false); }, parallel);
}

tq_status tq_image_avg_pool(const tq_image* in, tq_qparams in_qparams, const tq_window* window, bool count_include_pad,
                            int64_t divisor, const tq_image* out, tq_qparams out_qparams, const tq_parallel* parallel) {
  const tq_window& w = *window;
  ImagePoolArgs args = average_args(in_qparams, *out, out_qparams);
  args.divisor = divisor;
  return pool(
      *in, *out, args, 1, 1, average_kernel(*in),
      [&](int64_t y) { return window_taps(y, in->h, w.kernel_h, w.stride_h, w.pad_h, 1, count_include_pad); },
      [&](int64_t x) { return window_taps(x, in->w, w.kernel_w, w.stride_w, w.pad_w, 1, count_include_pad); },
      parallel);
}

tq_status tq_image_adaptive_avg_pool(const tq_image* in, tq_qparams in_qparams, const tq_image* out,
                                     tq_qparams out_qparams, const tq_parallel* parallel) {
  return pool(
      *in, *out, average_args(in_qparams, *out, out_qparams), 1, 1, average_kernel(*in),
      [&](int64_t y) { return adaptive_taps(y, in->h, out->h); },
      [&](int64_t x) { return adaptive_taps(x, in->w, out->w); }, parallel);
}

tq_status tq_image_adaptive_max_pool(const tq_image* in, const tq_image* out, const tq_parallel* parallel) {
  return pool(
      *in, *out, ImagePoolArgs{}, 1, 1, kernels().max_pool_row,
      [&](int64_t y) { return adaptive_taps(y, in->h, out->h); },
      [&](int64_t x) { return adaptive_taps(x, in->w, out->w); }, parallel);
}
