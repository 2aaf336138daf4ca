// tq_image_upsample_nearest, tq_image_flatten: bytes that move.
#include <cmath>
#include <cstring>
#include <vector>

#include "core/image.h"

namespace torchquant {
namespace {

// torch's rule, in fp32.
int64_t nearest(int64_t index, float scale, int64_t size) {
  return std::min(static_cast<int64_t>(std::floor(static_cast<float>(index) * scale)), size - 1);
}

}  // namespace
}  // namespace torchquant

using namespace torchquant;

tq_status tq_image_upsample_nearest(const tq_image* in, float scale_h, float scale_w, const tq_image* out,
                                    const tq_parallel* parallel) {
  if (is_empty(*out)) return TQ_OK;
  return status_of([&] {
    const size_t bytes = static_cast<size_t>(out->c * element_bytes(out->type));
    std::vector<int64_t> columns(static_cast<size_t>(out->w));
    for (int64_t x = 0; x < out->w; ++x) columns[static_cast<size_t>(x)] = nearest(x, scale_w, in->w);
    const bool dense = out->pixel_stride == out->c;
    parallel_for(
        parallel, 0, out->n * out->h, std::max<int64_t>(1, kImageElements / (out->w * out->c)),
        [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t n = i / out->h, y = i % out->h, from = nearest(y, scale_h, in->h);
            if (dense && i > first && y > 0 && nearest(y - 1, scale_h, in->h) == from) {  // the row above
              std::memcpy(pixel_at(*out, n, y, 0), pixel_at(*out, n, y - 1, 0), bytes * static_cast<size_t>(out->w));
              continue;
            }
            for (int64_t x = 0; x < out->w; ++x)
              std::memcpy(pixel_at(*out, n, y, x), pixel_at(*in, n, from, columns[static_cast<size_t>(x)]), bytes);
          }
        });
  });
}

tq_status tq_image_flatten(const tq_image* in, int8_t* out, int64_t out_stride, const tq_parallel* parallel) {
  if (is_empty(*in)) return TQ_OK;
  constexpr int64_t kBlock = 64;  // channels: each of them is one line that is written to
  const int64_t blocks = ceil_div(in->c, kBlock), area = in->h * in->w;
  parallel_for(parallel, 0, in->n * blocks, std::max<int64_t>(1, kImageElements / (kBlock * area)),
               [&](int64_t first, int64_t last) {
                 for (int64_t i = first; i < last; ++i) {
                   const int64_t n = i / blocks, c0 = i % blocks * kBlock, c1 = std::min(in->c, c0 + kBlock);
                   int8_t* const row = out + n * out_stride;
                   for (int64_t y = 0; y < in->h; ++y)
                     for (int64_t x = 0; x < in->w; ++x) {
                       const int8_t* const pixel = reinterpret_cast<const int8_t*>(pixel_at(*in, n, y, x));
                       for (int64_t c = c0; c < c1; ++c) row[c * area + y * in->w + x] = pixel[c];
                     }
                 }
               });
  return TQ_OK;
}
