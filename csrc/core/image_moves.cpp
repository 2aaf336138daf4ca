// tq_image_channels, tq_image_pad, tq_image_pixel_shuffle: elements that move.
#include <cstring>

#include "core/image.h"
#include "isa.h"

namespace torchquant {
namespace {

// The groups of a channel shuffle that the index is, or 0.
int64_t shuffled_groups(const int32_t* index, int64_t channels) {
  if (channels < 2 || index[0] != 0) return 0;
  const int64_t size = index[1], groups = size > 0 && channels % size == 0 ? channels / size : 0;
  if (groups < 2 || groups > 4) return 0;
  for (int64_t c = 0; c < channels; ++c)
    if (index[c] != c % groups * size + c / groups) return 0;
  return groups;
}

int64_t rows_of_a_thread(const tq_image& image) { return std::max<int64_t>(1, kImageElements / (image.w * image.c)); }

// row(n, y) for every row of an image.
template <class Row>
void for_each_row(const tq_image& image, const tq_parallel* parallel, const Row& row) {
  parallel_for(parallel, 0, image.n * image.h, rows_of_a_thread(image), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) row(i / image.h, i % image.h);
  });
}

void copy_pixels(const tq_image& in, const char* from, const tq_image& out, char* to, int64_t pixels) {
  const int64_t size = element_bytes(out.type);
  if (in.pixel_stride == in.c && out.pixel_stride == in.c) {
    std::memcpy(to, from, static_cast<size_t>(pixels * in.c * size));
    return;
  }
  for (int64_t x = 0; x < pixels; ++x)
    std::memcpy(to + x * out.pixel_stride * size, from + x * in.pixel_stride * size, static_cast<size_t>(in.c * size));
}

void fill_pixels(const tq_image& out, char* to, int64_t pixels, int32_t byte) {
  const int64_t size = element_bytes(out.type);
  if (pixels <= 0) return;
  if (out.pixel_stride == out.c) {
    std::memset(to, byte, static_cast<size_t>(pixels * out.c * size));
    return;
  }
  for (int64_t x = 0; x < pixels; ++x)
    std::memset(to + x * out.pixel_stride * size, byte, static_cast<size_t>(out.c * size));
}

// Element (n, y, x, c) of the larger image, which has fewer channels, and its place in the smaller one.
template <class T>
void shuffle_row(const tq_image& small, const tq_image& large, int64_t factor, bool inverse, int64_t n, int64_t y) {
  for (int64_t x = 0; x < large.w; ++x) {
    T* const s = reinterpret_cast<T*>(pixel_at(small, n, y / factor, x / factor)) + y % factor * factor + x % factor;
    T* const l = reinterpret_cast<T*>(pixel_at(large, n, y, x));
    if (inverse)
      for (int64_t c = 0; c < large.c; ++c) s[c * factor * factor] = l[c];
    else
      for (int64_t c = 0; c < large.c; ++c) l[c] = s[c * factor * factor];
  }
}

}  // namespace
}  // namespace torchquant

using namespace torchquant;

tq_status tq_image_channels(const tq_image* in, const int32_t* index, const tq_image* out,
                            const tq_parallel* parallel) {
  if (is_empty(*out)) return TQ_OK;
  ImageChannelsArgs args{};
  args.index = index;
  args.pixels = out->w;
  args.channels = out->c;
  args.in_pixel = in->pixel_stride;
  args.out_pixel = out->pixel_stride;
  args.interleaved = in->c == out->c ? shuffled_groups(index, out->c) : 0;
  args.floats = out->type == TQ_F32;
  const KernelTable& table = kernels();
  for_each_row(*out, parallel, [&](int64_t n, int64_t y) {
    ImageChannelsArgs g = args;
    g.in = pixel_at(*in, n, y, 0);
    g.out = pixel_at(*out, n, y, 0);
    table.pick_channels(g);
  });
  return TQ_OK;
}

tq_status tq_image_pad(const tq_image* in, int64_t top, int64_t left, int32_t zero_point, const tq_image* out,
                       const tq_parallel* parallel) {
  if (is_empty(*out)) return TQ_OK;
  const int32_t byte = out->type == TQ_I8 ? zero_point : 0;
  const int64_t x0 = std::min(out->w, std::max<int64_t>(0, left));
  const int64_t x1 = std::max(x0, std::min(out->w, left + in->w));
  for_each_row(*out, parallel, [&](int64_t n, int64_t y) {
    const bool inside = top <= y && y < top + in->h;
    const int64_t first = inside ? x0 : out->w, last = inside ? x1 : out->w;
    fill_pixels(*out, pixel_at(*out, n, y, 0), first, byte);
    if (first < last)
      copy_pixels(*in, pixel_at(*in, n, y - top, first - left), *out, pixel_at(*out, n, y, first), last - first);
    if (last < out->w) fill_pixels(*out, pixel_at(*out, n, y, last), out->w - last, byte);
  });
  return TQ_OK;
}

tq_status tq_image_pixel_shuffle(const tq_image* in, int64_t factor, bool inverse, const tq_image* out,
                                 const tq_parallel* parallel) {
  if (is_empty(*out)) return TQ_OK;
  const tq_image &small = inverse ? *out : *in, &large = inverse ? *in : *out;
  for_each_row(large, parallel, [&](int64_t n, int64_t y) {
    if (out->type == TQ_F32) shuffle_row<float>(small, large, factor, inverse, n, y);
    else shuffle_row<int8_t>(small, large, factor, inverse, n, y);
  });
  return TQ_OK;
}
