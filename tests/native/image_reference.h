// Convolutions and the steps between them as naively as possible, on whole images of numbers: the specification
// (torchquant/functional: conv.py, images.py, pools.py) once more, which shares no code with the kernels.
#pragma once

#include <functional>
#include <vector>

#include "core_case.h"

namespace native {

struct Picture {  // [n, h, w, c]; of int8 images the integers themselves
  int64_t n = 0, h = 0, w = 0, c = 0;
  std::vector<float> v;

  Picture() = default;
  Picture(int64_t n_, int64_t h_, int64_t w_, int64_t c_)
      : n(n_), h(h_), w(w_), c(c_), v(static_cast<size_t>(n_ * h_ * w_ * c_)) {}
  float& at(int64_t i, int64_t y, int64_t x, int64_t o) {
    return v[static_cast<size_t>(((i * h + y) * w + x) * c + o)];
  }
  float at(int64_t i, int64_t y, int64_t x, int64_t o) const { return const_cast<Picture*>(this)->at(i, y, x, o); }
  bool same_size(const Picture& o) const { return n == o.n && h == o.h && w == o.w && c == o.c; }
};

// make(i, y, x, o) at every place.
template <class Make>
Picture picture(int64_t n, int64_t h, int64_t w, int64_t c, const Make& make) {
  Picture p(n, h, w, c);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y)
      for (int64_t x = 0; x < w; ++x)
        for (int64_t o = 0; o < c; ++o) p.at(i, y, x, o) = make(i, y, x, o);
  return p;
}
template <class Function>
Picture each(Picture p, const Function& function) {
  for (float& v : p.v) v = function(v);
  return p;
}

inline int32_t quantized(float y, const tq_qparams& q) {
  return quantize_value(y, 1.0f / q.scale, q.zero_point, q.qmin, q.qmax);
}
inline float real_value(float q, const tq_qparams& p) { return (q - static_cast<float>(p.zero_point)) * p.scale; }
inline Picture real_values(const Picture& p, const tq_qparams& q) {
  return each(p, [&](float v) { return real_value(v, q); });
}
// What is stored where y is the result.
inline Picture finished(const Picture& y, tq_type type, const tq_qparams& q) {
  return each(y, [&](float v) { return type == TQ_I8 ? static_cast<float>(quantized(v, q)) : rounded(type, v); });
}

// The activations that are a few exact operations by their definitions; of the others the scalar path's value in fp32,
// after a check of its distance from the true function.
inline void activate(std::vector<float>& y, tq_activation name) {
  const Activation a = static_cast<Activation>(name);
  if (a == Activation::kNone || y.empty()) return;
  if (is_hard(a)) {
    for (float& v : y) v = hard_activation(a, v);
    return;
  }
  const int32_t before = tq_active_isa();
  std::vector<float> out(y.size());
  tq_activation_call call{};
  call.x = y.data();
  call.out = out.data();
  call.x_type = call.out_type = TQ_F32;
  call.activation = name;
  call.rows = 1;
  call.length = call.x_stride = static_cast<int64_t>(y.size());
  CHECK(tq_set_active_isa(0) == TQ_OK && tq_activate(&call, nullptr) == TQ_OK, "the scalar path cannot run");
  CHECK(tq_set_active_isa(before) == TQ_OK, "the instruction set cannot be set back");
  for (size_t i = 0; i < y.size(); ++i)
    CHECK(close_to_activation(a, static_cast<double>(y[i]), out[i]), "activation %d of %a is %a", int(name),
          static_cast<double>(y[i]), static_cast<double>(out[i]));
  y = out;
}
inline Picture activated(Picture y, tq_activation name) {
  activate(y.v, name);
  return y;
}

// ---------------------------------------------------------------- convolutions

struct Layer {  // of a convolution; depthwise: one input channel in each of several groups
  int64_t inputs, outputs, groups, kernel_h, kernel_w;
  std::vector<int8_t> weight;  // [outputs, kernel_h, kernel_w, inputs / groups]
  const int8_t* packed;
  const float* scale;  // [outputs]
  const float* bias;   // [outputs] or null

  int64_t channels() const { return inputs / groups; }
  int64_t at(int64_t o, int64_t y, int64_t x, int64_t c) const {
    return weight[static_cast<size_t>(((o * kernel_h + y) * kernel_w + x) * channels() + c)];
  }
};

struct Geometry {
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

struct InputScale {  // of an image
  float scale;
  int32_t zero;
};

// Before the residual and the activation.
inline Picture convolved(const Picture& x, const Layer& l, const Geometry& g, int64_t out_h, int64_t out_w,
                         const std::function<InputScale(int64_t image)>& input) {
  const int64_t outputs_of_group = l.outputs / l.groups, channels = l.channels();
  return picture(x.n, out_h, out_w, l.outputs, [&](int64_t n, int64_t oy, int64_t ox, int64_t o) {
    const InputScale in = input(n);
    const int64_t first = o / outputs_of_group * channels;
    int64_t sum = 0;
    for (int64_t ky = 0; ky < l.kernel_h; ++ky) {
      const int64_t y = oy * g.stride_h - g.pad_top + ky * g.dilation_h;
      for (int64_t kx = 0; y >= 0 && y < x.h && kx < l.kernel_w; ++kx) {
        const int64_t column = ox * g.stride_w - g.pad_left + kx * g.dilation_w;
        if (column < 0 || column >= x.w) continue;
        for (int64_t c = 0; c < channels; ++c)
          sum += (static_cast<int64_t>(x.at(n, y, column, first + c)) - in.zero) * l.at(o, ky, kx, c);
      }
    }
    const float f = static_cast<float>(sum), scale = in.scale * l.scale[o];
    return l.bias ? std::fmaf(f, scale, l.bias[o]) : f * scale;
  });
}

// ---------------------------------------------------------------- steps between convolutions

// A sum or a product of real values; b may be one pixel for each image.
inline Picture combined(bool multiply, const Picture& a, const Picture& b) {
  return picture(a.n, a.h, a.w, a.c, [&](int64_t n, int64_t y, int64_t x, int64_t c) {
    const float other = b.h == a.h && b.w == a.w ? b.at(n, y, x, c) : b.at(n, 0, 0, c), one = a.at(n, y, x, c);
    return multiply ? one * other : one + other;
  });
}

// visit(y, x) for the places of the image in the window of the result's pixel (oy, ox).
template <class Visit>
void for_window(const Picture& in, const tq_window& w, int64_t oy, int64_t ox, const Visit& visit) {
  for (int64_t ky = 0; ky < w.kernel_h; ++ky)
    for (int64_t kx = 0; kx < w.kernel_w; ++kx) {
      const int64_t y = oy * w.stride_h - w.pad_h + ky * w.dilation_h;
      const int64_t x = ox * w.stride_w - w.pad_w + kx * w.dilation_w;
      if (y >= 0 && y < in.h && x >= 0 && x < in.w) visit(y, x);
    }
}

inline Picture max_pooled(const Picture& in, const tq_window& w, int64_t out_h, int64_t out_w) {
  return picture(in.n, out_h, out_w, in.c, [&](int64_t n, int64_t oy, int64_t ox, int64_t c) {
    float most = -128.0f;
    for_window(in, w, oy, ox, [&](int64_t y, int64_t x) { most = std::max(most, in.at(n, y, x, c)); });
    return most;
  });
}

inline float average_of(int64_t sum, int64_t count, float scale) {
  return static_cast<float>(sum) * (scale * (1.0f / static_cast<float>(count)));
}

inline Picture average_pooled(const Picture& in, const tq_qparams& q, const tq_window& w, bool count_include_pad,
                              int64_t divisor, int64_t out_h, int64_t out_w) {
  return picture(in.n, out_h, out_w, in.c, [&](int64_t n, int64_t oy, int64_t ox, int64_t c) {
    int64_t sum = 0, count = 0;
    for_window(in, w, oy, ox, [&](int64_t y, int64_t x) {
      sum += static_cast<int64_t>(in.at(n, y, x, c)) - q.zero_point;
      ++count;
    });
    if (count_include_pad) {  // also that behind the image, as far as it goes
      const int64_t y = oy * w.stride_h - w.pad_h, x = ox * w.stride_w - w.pad_w;
      count = (std::min(y + w.kernel_h, in.h + w.pad_h) - y) * (std::min(x + w.kernel_w, in.w + w.pad_w) - x);
    }
    return average_of(sum, divisor ? divisor : count, q.scale);
  });
}

inline Picture adaptive_pooled(const Picture& in, const tq_qparams& q, int64_t out_h, int64_t out_w) {
  return picture(in.n, out_h, out_w, in.c, [&](int64_t n, int64_t oy, int64_t ox, int64_t c) {
    const int64_t y0 = oy * in.h / out_h, y1 = ((oy + 1) * in.h + out_h - 1) / out_h;
    const int64_t x0 = ox * in.w / out_w, x1 = ((ox + 1) * in.w + out_w - 1) / out_w;
    int64_t sum = 0;
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = x0; x < x1; ++x) sum += static_cast<int64_t>(in.at(n, y, x, c)) - q.zero_point;
    return average_of(sum, (y1 - y0) * (x1 - x0), q.scale);
  });
}

inline Picture upsampled(const Picture& in, float scale_h, float scale_w, int64_t out_h, int64_t out_w) {
  const auto nearest = [](int64_t i, float scale, int64_t size) {
    return std::min(static_cast<int64_t>(std::floor(static_cast<float>(i) * scale)), size - 1);
  };
  return picture(in.n, out_h, out_w, in.c, [&](int64_t n, int64_t y, int64_t x, int64_t c) {
    return in.at(n, nearest(y, scale_h, in.h), nearest(x, scale_w, in.w), c);
  });
}

inline Picture flattened(const Picture& in) {
  return picture(in.n, 1, 1, in.h * in.w * in.c, [&](int64_t n, int64_t, int64_t, int64_t i) {
    return in.at(n, i % (in.h * in.w) / in.w, i % in.w, i / (in.h * in.w));
  });
}

}  // namespace native
