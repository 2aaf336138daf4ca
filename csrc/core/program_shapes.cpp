// The shape of each value of a program, from the shapes of the arguments. Pools count their windows as torch does.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/program.h"

namespace torchquant::program {
namespace {

std::string text(const Shape& s) {
  std::string out = "[" + std::to_string(s.n) + ", " + std::to_string(s.c);
  if (s.rank == 4) out += ", " + std::to_string(s.h);
  if (s.rank >= 3) out += ", " + std::to_string(s.w);
  return out + "]";
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("Program: " + what); }

// Positions of a kernel along one dimension.
int64_t positions(int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after, int64_t dilation,
                  bool ceil_mode) {
  const int64_t room = size + before + after - dilation * (kernel - 1) - 1;
  if (room < 0) return 0;
  int64_t count = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (count - 1) * stride >= size + before) --count;  // the last window must begin inside the image
  return count;
}

Shape windows(const Step& s, const Shape& in, const char* what) {
  Shape out = in;
  out.h = positions(in.h, s.kernel[0], s.stride[0], s.before[0], s.after[0], s.dilation[0], s.ceil_mode);
  out.w = positions(in.w, s.kernel[1], s.stride[1], s.before[1], s.after[1], s.dilation[1], s.ceil_mode);
  if (out.h < 1 || out.w < 1) {
    refuse(std::string(what) + ": input must be at least as large as the kernel, got " + text(in) +
           " for a kernel of " + std::to_string(s.kernel[0]) + " x " + std::to_string(s.kernel[1]));
  }
  return out;
}

void require_channels(const Step& s, const Shape& in, const char* what) {
  if (in.c != s.weight.inputs)
    refuse(std::string(what) + ": input must have " + std::to_string(s.weight.inputs) + " channels, got " + text(in));
}

Shape conv_shape(const Step& s, const Shape& in) {
  if (in.rank < 3) refuse("convolution: input must be [n, c, h, w] or [n, c, l], got " + text(in));
  require_channels(s, in, "convolution");
  Shape out = windows(s, in, "convolution");
  out.c = s.weight.outputs;
  return out;
}

Shape linear_shape(const Step& s, const Shape& in) {  // of an image: on the channels of each pixel
  if (in.rank == 3) refuse("linear layer: input must be [n, c] or [n, c, h, w], got " + text(in));
  require_channels(s, in, "linear layer");
  Shape out = in;
  out.c = s.weight.outputs;
  return out;
}

Shape pointwise_shape(const Step& s, const Shape& left, const Shape& right) {
  const bool one_pixel = s.kind == Kind::kMul && right.h == 1 && right.w == 1 && right.n == left.n &&
                         right.c == left.c && right.rank == left.rank;
  if (!(left == right) && !one_pixel)
    refuse("sum or product: both inputs must have one shape, got " + text(left) + " and " + text(right));
  return left;
}

Shape per_channel_shape(const Step& s, const Shape& in) {
  if (in.c != s.channel.count)
    refuse("numbers for each channel: input must have " + std::to_string(s.channel.count) + " channels, got " +
           text(in));
  return in;
}

Shape channels_shape(const Step& s, const Shape& in) {
  Shape out = in;
  out.c = static_cast<int64_t>(s.index.size());
  for (const int32_t c : s.index)
    if (c < 0 || c >= in.c) refuse("channels: channel " + std::to_string(c) + " must be in the input, got " + text(in));
  return out;
}

Shape cropped_shape(const Step& s, const Shape& in) {
  if (in.rank < 3) refuse("crop: input must be [n, c, h, w] or [n, c, l], got " + text(in));
  Shape out = in;
  out.h = cropped(s.begin[0], s.end[0], in.h).count;
  out.w = cropped(s.begin[1], s.end[1], in.w).count;
  if (out.h < 1 || out.w < 1) refuse("crop: a pixel must remain, got " + text(in));
  return out;
}

Shape padded_shape(const Step& s, const Shape& in) {
  if (in.rank < 3) refuse("padding: input must be [n, c, h, w] or [n, c, l], got " + text(in));
  Shape out = in;
  out.h += s.before[0] + s.after[0];
  out.w += s.before[1] + s.after[1];
  return out;
}

Shape pixel_shuffled_shape(const Step& s, const Shape& in) {
  const int64_t f = s.factor[0];
  Shape out = in;
  if (in.rank != 4 || (s.inverse ? in.h % f || in.w % f : in.c % (f * f)))
    refuse("pixel shuffle: input must be [n, c, h, w] with " +
           std::string(s.inverse ? "sizes" : "channels, divided by the factor,") + " that the factor " +
           std::to_string(f) + " divides, got " + text(in));
  out.c = s.inverse ? in.c * f * f : in.c / (f * f);
  out.h = s.inverse ? in.h / f : in.h * f;
  out.w = s.inverse ? in.w / f : in.w * f;
  return out;
}

Shape concat_shape(const Step& s, const std::vector<Shape>& shapes) {
  Shape out = shapes[static_cast<size_t>(s.inputs[0])];
  out.c = 0;
  for (const int32_t value : s.inputs) {
    Shape part = shapes[static_cast<size_t>(value)];
    const Shape whole = part;
    out.c += part.c;
    part.c = out.c;
    if (!(part == out))
      refuse("concatenation: all inputs must have the shape of the first except for the channels, got " + text(whole) +
             " after " + text(shapes[static_cast<size_t>(s.inputs[0])]));
  }
  return out;
}

constexpr int64_t kMostSummed = ((int64_t{1} << 31) - 1) / 255;  // a sum of differences of bytes fits 32 bits

bool is_adaptive(const Step& s) { return s.kind == Kind::kAdaptiveAvgPool || s.kind == Kind::kAdaptiveMaxPool; }

int64_t largest_window(const Step& s, const Shape& in) {
  if (!is_adaptive(s)) return std::min(s.kernel[0], in.h) * std::min(s.kernel[1], in.w);
  const auto side = [](int64_t from, int64_t to) { return to ? std::min(from, from / to + 2) : int64_t{1}; };
  return side(in.h, s.size[0]) * side(in.w, s.size[1]);
}

Shape pool_shape(const Step& s, const Shape& in) {
  if (in.rank < 3) refuse("pooling: input must be [n, c, h, w] or [n, c, l], got " + text(in));
  if (s.kind != Kind::kMaxPool && s.kind != Kind::kAdaptiveMaxPool && largest_window(s, in) > kMostSummed)
    refuse("pooling: a window must have at most " + std::to_string(kMostSummed) + " elements, got " + text(in));
  if (!is_adaptive(s)) return windows(s, in, "pooling");
  Shape out = in;
  if (s.size[0]) out.h = s.size[0];
  if (s.size[1]) out.w = s.size[1];
  return out;
}

Shape upsampled_shape(const Step& s, const Shape& in) {
  if (in.rank < 3) refuse("upsampling: input must be [n, c, h, w] or [n, c, l], got " + text(in));
  Shape out = in;
  out.h = s.size[0] ? s.size[0] : in.h * s.factor[0];
  out.w = s.size[1] ? s.size[1] : in.w * s.factor[1];
  return out;
}

}  // namespace

Span cropped(int64_t begin, int64_t end, int64_t size) {
  const auto place = [&](int64_t at) { return std::clamp(at < 0 ? at + size : at, int64_t{0}, size); };
  const int64_t first = place(begin);
  return {first, std::max<int64_t>(0, place(end) - first)};
}

Shape output_shape(const Step& step, const std::vector<Shape>& shapes, const Request& request) {
  if (step.kind == Kind::kInput) return request.arguments[static_cast<size_t>(step.place)];
  const Shape in = shapes[static_cast<size_t>(step.inputs[0])];
  Shape out = in;
  switch (step.kind) {
    case Kind::kConv: out = conv_shape(step, in); break;
    case Kind::kLinear: out = linear_shape(step, in); break;
    case Kind::kAdd:
    case Kind::kMul: out = pointwise_shape(step, in, shapes[static_cast<size_t>(step.inputs[1])]); break;
    case Kind::kMaxPool:
    case Kind::kAvgPool:
    case Kind::kAdaptiveMaxPool:
    case Kind::kAdaptiveAvgPool: out = pool_shape(step, in); break;
    case Kind::kAffine:
    case Kind::kNorm: out = per_channel_shape(step, in); break;
    case Kind::kChannels: out = channels_shape(step, in); break;
    case Kind::kCrop: out = cropped_shape(step, in); break;
    case Kind::kPad: out = padded_shape(step, in); break;
    case Kind::kPixelShuffle: out = pixel_shuffled_shape(step, in); break;
    case Kind::kConcat: out = concat_shape(step, shapes); break;
    case Kind::kUpsample: out = upsampled_shape(step, in); break;
    case Kind::kFlatten: out = {in.n, 1, 1, in.h * in.w * in.c, 2}; break;
    case Kind::kInput:
    case Kind::kMap:
    case Kind::kOutput: break;
  }
  if (step.residual >= 0 && !(shapes[static_cast<size_t>(step.residual)] == out)) {
    refuse("addition: the residual must have the result's shape " + text(out) + ", got " +
           text(shapes[static_cast<size_t>(step.residual)]));
  }
  return out;
}

}  // namespace torchquant::program
