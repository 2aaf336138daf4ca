// tq_image_blend: a number for each channel, and a second image, in one visit to each pixel.
#include "core/image.h"
#include "isa.h"

using namespace torchquant;

tq_status tq_image_blend(const tq_image_blend_call* call, const tq_parallel* parallel) {
  const tq_image &a = call->a, &out = call->out;
  if (is_empty(out)) return TQ_OK;
  const tq_image& b = call->b ? *call->b : a;
  ImageBlendArgs args{};
  args.a_float = a.type == TQ_F32;
  args.b_float = b.type == TQ_F32;
  args.a_scale = call->a_qparams.scale;
  args.a_zero = call->a_qparams.zero_point;
  args.b_scale = call->b_qparams.scale;
  args.b_zero = call->b_qparams.zero_point;
  args.gain = call->gain;
  args.shift = call->shift;
  args.multiply = call->multiply;
  tq_activation activation = call->activation;
  args.result = result_args(out, call->out_qparams, &activation);
  args.activation = activation_of(activation);
  const KernelTable& table = kernels();
  if (!call->gain && !call->shift) {
    const Runs<3> runs = runs_of<3>(out, {&a, &b, &out});
    args.a_row = runs.row_stride()[0];
    args.b_row = runs.row_stride()[1];
    args.out_row = runs.row_stride()[2];
    runs.run(parallel, [&](const Runs<3>::Offsets& at, int64_t rows, int64_t length) {
      ImageBlendArgs g = args;
      g.a = element_at(a.data, a.type, at[0]);
      g.b = call->b ? element_at(b.data, b.type, at[1]) : nullptr;
      g.out = element_at(out.data, out.type, at[2]);
      g.rows = rows;
      g.length = length;
      table.blend_pixels(g);
    });
    return TQ_OK;
  }
  // A run is the channels of one pixel: pixels one after the other are its rows.
  const auto dense = [](const tq_image& i) {
    return i.row_stride == i.w * i.pixel_stride && i.image_stride == i.h * i.row_stride;
  };
  const bool one = dense(a) && dense(b) && dense(out);
  const int64_t rows = one ? 1 : out.n * out.h, pixels = one ? out.n * out.h * out.w : out.w;
  const int64_t unit = std::max<int64_t>(1, kImageElements / out.c), units = ceil_div(pixels, unit);
  args.a_row = a.pixel_stride;
  args.b_row = b.pixel_stride;
  args.out_row = out.pixel_stride;
  args.length = out.c;
  parallel_for(parallel, 0, rows * units, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / units, pixel = i % units * unit, n = row / out.h, y = row % out.h;
      const auto at = [&](const tq_image& image) {
        return element_at(image.data, image.type,
                          (one ? 0 : n * image.image_stride + y * image.row_stride) + pixel * image.pixel_stride);
      };
      ImageBlendArgs g = args;
      g.a = at(a);
      g.b = call->b ? at(b) : nullptr;
      g.out = at(out);
      g.rows = std::min(unit, pixels - pixel);
      table.blend_pixels(g);
    }
  });
  return TQ_OK;
}
