// tq_image_quantize, tq_image_dequantize: float images of any strides <-> int8 images.
#include <atomic>

#include "core/image.h"
#include "isa.h"

namespace torchquant {
namespace {

struct FloatStrides {
  int64_t image, row, pixel, channel;
};

// A single channel counts as contiguous, and then pixels are what matters.
FloatStrides strides_of(const tq_image_float& x) {
  return {x.image_stride, x.row_stride, x.pixel_stride, x.c == 1 ? 1 : x.channel_stride};
}

using ConvertKernel = void (*)(const ImageConvertArgs&);

// has_nonfinite: null where int8 becomes float.
void convert(const tq_image_float& x, const tq_image& q, ImageConvertArgs args, std::atomic<bool>* has_nonfinite,
             ConvertKernel kernel, const tq_parallel* parallel) {
  const bool quantize = has_nonfinite;
  const FloatStrides s = strides_of(x);
  args.float_type = float_type(x.type);
  const auto call = [&](ImageConvertArgs a, int64_t x_at, int64_t q_at) {
    char* const floats = element_at(x.data, x.type, x_at);
    char* const bytes = static_cast<char*>(q.data) + q_at;
    a.in = quantize ? floats : bytes;
    a.out = quantize ? bytes : floats;
    bool found = false;
    a.has_nonfinite = &found;
    kernel(a);
    if (found) has_nonfinite->store(true, std::memory_order_relaxed);
  };
  if (s.channel == 1) {
    const Runs<2> runs({q.n, q.h, q.w, q.c},
                       {{{s.image, q.image_stride}, {s.row, q.row_stride}, {s.pixel, q.pixel_stride}, {1, 1}}});
    args.x_channel = 1;
    args.x_pixel = runs.row_stride()[0];
    args.q_pixel = runs.row_stride()[1];
    runs.run(parallel, [&](const Runs<2>::Offsets& at, int64_t rows, int64_t length) {
      ImageConvertArgs a = args;
      a.pixels = rows;
      a.channels = length;
      call(a, at[0], at[1]);
    });
    return;
  }
  // Planes: the innermost loop runs over pixels, of one row or, without a gap between rows, of the whole image.
  const bool one_run = q.h == 1 || (s.row == q.w * s.pixel && q.row_stride == q.w * q.pixel_stride);
  const int64_t lines = one_run ? 1 : q.h, length = one_run ? q.h * q.w : q.w;
  const int64_t x_step = q.h * q.w == 1 ? 0 : s.pixel, unit = one_run ? 64 : 1;
  args.x_channel = s.channel;
  args.x_pixel = x_step;
  args.q_pixel = q.pixel_stride;
  args.channels = q.c;
  const int64_t units = one_run ? ceil_div(length, unit) : lines;
  parallel_for(parallel, 0, q.n * units, std::max<int64_t>(1, kImageElements / ((one_run ? unit : length) * q.c)),
               [&](int64_t first, int64_t last) {
                 while (first < last) {
                   const int64_t n = first / units, at = first % units, count = std::min(units - at, last - first);
                   for (int64_t i = 0; i < (one_run ? 1 : count); ++i) {
                     const int64_t pixel = one_run ? at * unit : 0, row = one_run ? 0 : at + i;
                     ImageConvertArgs a = args;
                     a.pixels = one_run ? std::min(length, (at + count) * unit) - pixel : length;
                     call(a, n * s.image + row * s.row + pixel * s.pixel,
                          n * q.image_stride + row * q.row_stride + pixel * q.pixel_stride);
                   }
                   first += count;
                 }
               });
}

}  // namespace

void quantize_image(const tq_image_float& x, tq_qparams qparams, const tq_image& q, std::atomic<bool>& has_nonfinite,
                    const tq_parallel* parallel) {
  if (is_empty(q)) return;
  ImageConvertArgs args{};
  args.scale = 1.0f / qparams.scale;
  args.zero = qparams.zero_point;
  args.lo = static_cast<float>(qparams.qmin - qparams.zero_point);
  args.hi = static_cast<float>(qparams.qmax - qparams.zero_point);
  convert(x, q, args, &has_nonfinite, kernels().quantize_pixels, parallel);
}

}  // namespace torchquant

using namespace torchquant;

tq_status tq_image_quantize(const tq_image_float* x, tq_qparams qparams, const tq_image* q,
                            const tq_parallel* parallel) {
  std::atomic<bool> has_nonfinite{false};
  quantize_image(*x, qparams, *q, has_nonfinite, parallel);
  return TQ_OK;
}

tq_status tq_image_dequantize(const tq_image* q, tq_qparams qparams, const tq_image_float* x,
                              const tq_parallel* parallel) {
  if (is_empty(*q)) return TQ_OK;
  ImageConvertArgs args{};
  args.scale = qparams.scale;
  args.zero = qparams.zero_point;
  convert(*x, *q, args, nullptr, kernels().dequantize_pixels, parallel);
  return TQ_OK;
}
