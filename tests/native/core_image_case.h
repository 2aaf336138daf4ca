// Images in memory that ends where they end, and the steps between convolutions through the C interface.
#pragma once

#include "image_reference.h"

namespace native {

// ---------------------------------------------------------------- images in memory

inline int64_t elements_between(const tq_image& i) {  // from the first to the last, gaps among them
  return (i.n - 1) * i.image_stride + (i.h - 1) * i.row_stride + (i.w - 1) * i.pixel_stride + i.c;
}

// An image whose pixels, rows and images have gaps between them, or none; without memory.
inline tq_image lay_out(Draw& draw, tq_type type, int64_t n, int64_t h, int64_t w, int64_t c) {
  const bool dense = draw.one_in(2);
  tq_image i{nullptr, type, n, h, w, c, 0, 0, 0};
  i.pixel_stride = c + (dense ? 0 : draw.pick<int64_t>({0, 1, 5, 64}));
  i.row_stride = w * i.pixel_stride + (dense ? 0 : draw.pick<int64_t>({0, 0, 3}));
  i.image_stride = h * i.row_stride + (dense ? 0 : draw.pick<int64_t>({0, 0, 7}));
  return i;
}
inline void place(Memory& memory, tq_image& i) { i.data = memory.take<uint8_t>(elements_between(i) * size_of(i.type)); }

inline int64_t element(const tq_image& i, int64_t n, int64_t y, int64_t x, int64_t c) {
  return n * i.image_stride + y * i.row_stride + x * i.pixel_stride + c;
}
inline void write(const tq_image& i, const Picture& p) {
  for (int64_t n = 0; n < i.n; ++n)
    for (int64_t y = 0; y < i.h; ++y)
      for (int64_t x = 0; x < i.w; ++x)
        for (int64_t c = 0; c < i.c; ++c) {
          const float v = p.at(n, y, x, c);
          if (i.type == TQ_I8) static_cast<int8_t*>(i.data)[element(i, n, y, x, c)] = static_cast<int8_t>(v);
          else store(i.data, i.type, element(i, n, y, x, c), v);
        }
}

// The image holds what it should, and nothing was written into its gaps.
inline void check_image(const tq_image& i, const Picture& want, const std::string& what) {
  const int64_t size = size_of(i.type), bytes = elements_between(i) * size;
  std::vector<bool> in_gap(static_cast<size_t>(bytes), true);
  for (int64_t n = 0; n < i.n; ++n)
    for (int64_t y = 0; y < i.h; ++y)
      for (int64_t x = 0; x < i.w; ++x)
        for (int64_t c = 0; c < i.c; ++c) {
          const int64_t at = element(i, n, y, x, c);
          const float expected = want.at(n, y, x, c);
          const float got =
              i.type == TQ_I8 ? static_cast<float>(static_cast<int8_t*>(i.data)[at]) : load(i.data, i.type, at);
          CHECK(same_float(got, expected), "%s: [%ld, %ld, %ld, %ld] of %ld x %ld x %ld x %ld is %a, not %a",
                what.c_str(), long(n), long(y), long(x), long(c), long(i.n), long(i.h), long(i.w), long(i.c),
                static_cast<double>(got), static_cast<double>(expected));
          for (int64_t b = at * size; b < (at + 1) * size; ++b) in_gap[static_cast<size_t>(b)] = false;
        }
  for (int64_t b = 0; b < bytes; ++b)
    CHECK(!in_gap[static_cast<size_t>(b)] || static_cast<uint8_t*>(i.data)[b] == Memory::kUntouched,
          "%s: written between pixels, at byte %ld of %ld", what.c_str(), long(b), long(bytes));
}

// ---------------------------------------------------------------- what is drawn

inline tq_qparams draw_qparams(Draw& draw) {
  tq_qparams q{std::ldexp(0.5f + static_cast<float>(draw.byte()) * 0x1p-9f, static_cast<int>(draw.below(8)) - 6), 0,
               -128, 127};
  if (!draw.one_in(3)) {
    q.qmin = static_cast<int32_t>(draw.below(100)) - 128;
    q.qmax = q.qmin + 1 + static_cast<int32_t>(draw.below(127 - q.qmin));
  }
  q.zero_point = q.qmin + static_cast<int32_t>(draw.below(q.qmax - q.qmin + 1));
  return q;
}
inline tq_activation draw_activation(Draw& draw) { return static_cast<tq_activation>(draw.below(kNumActivations)); }

inline Picture random_bytes(Random& random, int64_t n, int64_t h, int64_t w, int64_t c) {
  return picture(n, h, w, c, [&](int64_t, int64_t, int64_t, int64_t) {
    return static_cast<float>(static_cast<int8_t>(random.one_in(8) ? 128 - random.below(2) : random.next()));
  });
}

struct Size {
  int64_t n, h, w, c;
};
inline Size draw_image_size(Draw& draw) {  // one in four has enough elements for a second thread
  if (draw.one_in(4)) return {1 + draw.below(3), 12 + draw.below(12), 12 + draw.below(12), 60 + draw.below(100)};
  return {1 + draw.below(3), 1 + draw.below(9), 1 + draw.below(12), draw_size(draw, 150)};
}
inline Picture random_image(Trial& trial, Random& random, const Size& s, tq_image* image) {
  Picture p = random_bytes(random, s.n, s.h, s.w, s.c);
  *image = lay_out(trial.draw, TQ_I8, s.n, s.h, s.w, s.c);
  place(trial.inputs, *image);
  write(*image, p);
  return p;
}

// call(out, parallel) on every path, with fresh memory for `out`, and the result.
template <class Call>
void check_step(Trial& trial, tq_image out, const Picture& want, const std::string& what, const Call& call) {
  on_every_path(trial, trial.draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    place(trial.outputs, out);
    CHECK(call(out, parallel) == TQ_OK, "%s, %s", name.c_str(), what.c_str());
    check_image(out, want, name + ", " + what);
  });
}

// ---------------------------------------------------------------- the steps

inline void check_convert(Trial& trial) {
  Draw& draw = trial.draw;
  const Size s = draw_image_size(draw);
  const tq_qparams q = draw_qparams(draw);
  const tq_type type = trial.float_type();
  const int flavour = static_cast<int>(draw.below(7));
  Random random(draw.seed());
  // Floats in one of three orders, with a gap or without.
  const int64_t order = draw.below(3), gap = draw.pick<int64_t>({0, 0, 3});
  tq_image_float x{nullptr, type, s.n, s.h, s.w, s.c, 0, 0, 0, 0};
  int64_t step = 1;
  const auto next = [&](int64_t* stride, int64_t size) {
    *stride = step;
    step = step * size + gap;
  };
  if (order == 0) next(&x.channel_stride, s.c);  // channels_last
  if (order == 2) next(&x.row_stride, s.h);
  next(&x.pixel_stride, s.w);
  if (order != 2) next(&x.row_stride, s.h);
  if (order != 0) next(&x.channel_stride, s.c);
  next(&x.image_stride, s.n);
  const int64_t count = (s.n - 1) * x.image_stride + (s.h - 1) * x.row_stride + (s.w - 1) * x.pixel_stride +
                        (s.c - 1) * x.channel_stride + 1;
  const auto at = [&](int64_t n, int64_t y, int64_t w, int64_t c) {
    return n * x.image_stride + y * x.row_stride + w * x.pixel_stride + c * x.channel_stride;
  };
  x.data = random_elements(trial.inputs, random, count, type, flavour);
  const Picture values = picture(s.n, s.h, s.w, s.c, [&](int64_t n, int64_t y, int64_t w, int64_t c) {
    return load(x.data, type, at(n, y, w, c));
  });
  check_step(trial, lay_out(draw, TQ_I8, s.n, s.h, s.w, s.c), finished(values, TQ_I8, q), "quantize",
             [&](const tq_image& out, const tq_parallel* p) { return tq_image_quantize(&x, q, &out, p); });

  tq_image in;
  const Picture bytes = random_image(trial, random, s, &in), want = finished(real_values(bytes, q), type, q);
  on_every_path(trial, draw.seed(), [&](const tq_parallel* parallel, const std::string& name) {
    tq_image_float out = x;
    out.data = trial.outputs.take<uint8_t>(count * size_of(type));
    CHECK(tq_image_dequantize(&in, q, &out, parallel) == TQ_OK, "%s", name.c_str());
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t y = 0; y < s.h; ++y)
        for (int64_t w = 0; w < s.w; ++w)
          for (int64_t c = 0; c < s.c; ++c) {
            const float got = load(out.data, type, at(n, y, w, c)), expected = want.at(n, y, w, c);
            CHECK(same_float(got, expected), "%s: dequantize, order %ld: [%ld, %ld, %ld, %ld] is %a, not %a",
                  name.c_str(), long(order), long(n), long(y), long(w), long(c), static_cast<double>(got),
                  static_cast<double>(expected));
          }
  });
}

inline void check_combine(Trial& trial, bool multiply) {
  Draw& draw = trial.draw;
  const Size s = draw_image_size(draw);
  const tq_qparams aq = draw_qparams(draw), bq = draw_qparams(draw), outq = draw_qparams(draw);
  const tq_activation activation = draw_activation(draw);
  const tq_type type = draw.pick({TQ_I8, TQ_I8, TQ_F32, TQ_BF16, TQ_F16});
  const bool one_pixel = multiply && draw.one_in(2);
  Random random(draw.seed());
  tq_image a, b;
  const Picture left = random_image(trial, random, s, &a);
  const Picture right = random_image(trial, random, one_pixel ? Size{s.n, 1, 1, s.c} : s, &b);
  if (one_pixel) {
    b.h = s.h;
    b.w = s.w;
    b.row_stride = b.pixel_stride = 0;
  }
  Picture y = activated(combined(multiply, real_values(left, aq), real_values(right, bq)), activation);
  check_step(trial, lay_out(draw, type, s.n, s.h, s.w, s.c), finished(y, type, outq),
             (multiply ? "product, activation " : "sum, activation ") + std::to_string(int(activation)),
             [&](const tq_image& out, const tq_parallel* p) {
               return multiply ? tq_image_mul(&a, aq, &b, bq, activation, &out, outq, p)
                               : tq_image_add(&a, aq, &b, bq, activation, &out, outq, p);
             });
}
inline void check_add(Trial& trial) { check_combine(trial, false); }
inline void check_mul(Trial& trial) { check_combine(trial, true); }

inline void check_map(Trial& trial) {
  Draw& draw = trial.draw;
  const Size s = draw_image_size(draw);
  const int64_t kind = draw.below(3);  // a table of bytes, of floats, none
  const tq_type type = kind == 1 ? TQ_F32 : TQ_I8;
  Random random(draw.seed());
  tq_image in;
  const Picture x = random_image(trial, random, s, &in);
  auto* bytes = trial.inputs.take<int8_t>(256);
  auto* floats = trial.inputs.take<float>(256);
  for (int64_t i = 0; i < 256; ++i) {
    bytes[i] = static_cast<int8_t>(random.next());
    floats[i] = random.normal();
  }
  const void* const table = kind == 2 ? nullptr : (kind == 1 ? static_cast<const void*>(floats) : bytes);
  const Picture want = each(x, [&](float v) {
    const int64_t entry = static_cast<int64_t>(v) + 128;
    return kind == 2 ? v : (kind == 1 ? floats[entry] : static_cast<float>(bytes[entry]));
  });
  check_step(trial, lay_out(draw, type, s.n, s.h, s.w, s.c), want, "map " + std::to_string(kind),
             [&](const tq_image& out, const tq_parallel* p) { return tq_image_map(&in, table, &out, p); });
}

inline int64_t windows_of(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, bool up) {
  const int64_t room = size + 2 * pad - dilation * (kernel - 1) - 1;
  if (room < 0) return 0;
  const int64_t count = (room + (up ? stride - 1 : 0)) / stride + 1;
  return up && (count - 1) * stride >= size + pad ? count - 1 : count;
}
// A window that fits the image: as torch, the padding is at most half of the kernel.
inline tq_window draw_window(Draw& draw, const Size& s, bool dilated, int64_t* out_h, int64_t* out_w) {
  const bool up = draw.one_in(2);
  for (;;) {
    tq_window w{1 + draw.below(4), 1 + draw.below(4), 1 + draw.below(3), 1 + draw.below(3), 0, 0, 1, 1};
    w.pad_h = draw.below(w.kernel_h / 2 + 1);
    w.pad_w = draw.below(w.kernel_w / 2 + 1);
    if (dilated && draw.one_in(3)) w.dilation_h = w.dilation_w = 1 + draw.below(3);
    *out_h = windows_of(s.h, w.kernel_h, w.stride_h, w.pad_h, w.dilation_h, up);
    *out_w = windows_of(s.w, w.kernel_w, w.stride_w, w.pad_w, w.dilation_w, up);
    if (*out_h > 0 && *out_w > 0) return w;
  }
}

inline void check_pool(Trial& trial) {
  Draw& draw = trial.draw;
  const Size s = draw_image_size(draw);
  const int64_t kind = draw.below(3);  // max, average, adaptive
  const tq_qparams inq = draw_qparams(draw), outq = draw_qparams(draw);
  const tq_type type = kind == 0 ? TQ_I8 : draw.pick({TQ_I8, TQ_I8, TQ_F32, TQ_BF16, TQ_F16});
  int64_t out_h = 1 + draw.below(s.h + 2), out_w = 1 + draw.below(s.w + 2);
  tq_window w{};
  if (kind != 2) w = draw_window(draw, s, kind == 0, &out_h, &out_w);
  const bool count_include_pad = draw.one_in(2);
  const int64_t divisor = draw.pick<int64_t>({0, 0, 1, 7});
  Random random(draw.seed());
  tq_image in;
  const Picture x = random_image(trial, random, s, &in);
  Picture want;
  if (kind == 0) want = max_pooled(x, w, out_h, out_w);
  else if (kind == 1) want = average_pooled(x, inq, w, count_include_pad, divisor, out_h, out_w);
  else want = adaptive_pooled(x, inq, out_h, out_w);
  if (kind != 0) want = finished(want, type, outq);
  const std::string text = "pool " + std::to_string(kind) + " of " + std::to_string(s.h) + " x " + std::to_string(s.w) +
                           ", kernel " + std::to_string(w.kernel_h) + " x " + std::to_string(w.kernel_w);
  check_step(trial, lay_out(draw, type, s.n, out_h, out_w, s.c), want, text,
             [&](const tq_image& out, const tq_parallel* p) {
               if (kind == 0) return tq_image_max_pool(&in, &w, &out, p);
               if (kind == 2) return tq_image_adaptive_avg_pool(&in, inq, &out, outq, p);
               return tq_image_avg_pool(&in, inq, &w, count_include_pad, divisor, &out, outq, p);
             });
}

inline void check_move(Trial& trial) {  // upsampling and flattening
  Draw& draw = trial.draw;
  const Size s = draw_image_size(draw);
  const tq_type type = draw.pick({TQ_I8, TQ_F32, TQ_BF16});
  const int64_t out_h = 1 + draw.below(2 * s.h + 2), out_w = 1 + draw.below(2 * s.w + 2);
  const bool by_size = draw.one_in(2);
  const float scale_h = by_size ? static_cast<float>(s.h) / static_cast<float>(out_h) : 0.5f,
              scale_w = by_size ? static_cast<float>(s.w) / static_cast<float>(out_w) : 1.0f / 3.0f;
  Random random(draw.seed());
  const Picture x = random_bytes(random, s.n, s.h, s.w, s.c);
  tq_image in = lay_out(draw, type, s.n, s.h, s.w, s.c);
  place(trial.inputs, in);
  write(in, x);
  check_step(trial, lay_out(draw, type, s.n, out_h, out_w, s.c), upsampled(x, scale_h, scale_w, out_h, out_w),
             "upsampling", [&](const tq_image& out, const tq_parallel* p) {
               return tq_image_upsample_nearest(&in, scale_h, scale_w, &out, p);
             });
  if (type != TQ_I8) return;
  check_step(trial, lay_out(draw, TQ_I8, s.n, 1, 1, s.h * s.w * s.c), flattened(x), "flattening",
             [&](const tq_image& out, const tq_parallel* p) {
               return tq_image_flatten(&in, static_cast<int8_t*>(out.data), out.image_stride, p);
             });
}

inline void check_core_image(Trial& trial) {
  trial.begin();
  constexpr void (*kSteps[])(Trial&) = {check_convert, check_add, check_mul, check_map, check_pool, check_move};
  kSteps[trial.draw.below(6)](trial);
}

}  // namespace native
