// Steps that move elements, and concatenations.
#include <algorithm>

#include "core/convert.h"
#include "core/program_run.h"
#include "core/threads.h"

namespace torchquant::program {
namespace {

tq_image_float as_floats(const tq_image& i) {
  return {i.data, TQ_F32, i.n, i.h, i.w, i.c, i.image_stride, i.row_stride, i.pixel_stride, 1};
}

}  // namespace

// Float images of the same size, any strides.
void copy_floats(const tq_image_float& from, const tq_image_float& to, const tq_parallel* parallel) {
  constexpr int64_t kGrain = 1 << 14;  // elements
  const int64_t row = std::max<int64_t>(1, from.w * from.c);
  parallel_for(parallel, 0, from.n * from.h, std::max<int64_t>(1, kGrain / row), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t n = i / from.h, y = i % from.h;
      const float* const source = static_cast<const float*>(from.data) + n * from.image_stride + y * from.row_stride;
      float* const target = static_cast<float*>(to.data) + n * to.image_stride + y * to.row_stride;
      if (to.channel_stride == 1) {
        for (int64_t x = 0; x < from.w; ++x)
          for (int64_t c = 0; c < from.c; ++c)
            target[x * to.pixel_stride + c] = source[x * from.pixel_stride + c * from.channel_stride];
      } else {
        for (int64_t c = 0; c < from.c; ++c)
          for (int64_t x = 0; x < from.w; ++x)
            target[x * to.pixel_stride + c * to.channel_stride] =
                source[x * from.pixel_stride + c * from.channel_stride];
      }
    }
  });
}

tq_status run_concat(const Run& run, const Step& s) {
  const tq_image whole = run.image(s.output);
  int64_t channel = 0;
  for (size_t i = 0; i < s.inputs.size(); ++i) {
    const int32_t v = s.inputs[i];
    const tq_image in = run.image(v);
    tq_image part = whole;
    part.data = element_at(whole.data, whole.type, channel);
    part.c = in.c;
    channel += in.c;
    if (in.data == part.data) continue;  // program_memory.cpp put it there
    tq_status status = TQ_OK;
    if (run.is_float(s.output)) {
      const tq_image_float y = as_floats(part);
      if (run.is_float(v)) copy_floats(run.float_image(v), y, run.parallel);
      else status = tq_image_dequantize(&in, run.qparams(v), &y, run.parallel);
    } else if (run.is_float(v)) {
      const tq_image_float x = run.float_image(v);
      status = tq_image_quantize(&x, run.qparams(s.output), &part, run.parallel);
    } else {
      status = tq_image_map(&in, s.tables[i].empty() ? nullptr : s.tables[i].data(), &part, run.parallel);
    }
    if (status != TQ_OK) return status;
  }
  return TQ_OK;
}

tq_status run_upsample(const Run& run, const Step& s) {
  const tq_image in = run.image(s.inputs[0]), out = run.image(s.output);
  const auto scale = [&](int i, int64_t from,
                         int64_t to) {  // as torch: in float32 from the sizes, or the factor's inverse
    return s.size[static_cast<size_t>(i)]
               ? static_cast<float>(from) / static_cast<float>(to)
               : static_cast<float>(1.0 / static_cast<double>(s.factor[static_cast<size_t>(i)]));
  };
  return tq_image_upsample_nearest(&in, scale(0, in.h, out.h), scale(1, in.w, out.w), &out, run.parallel);
}

tq_status run_flatten(const Run& run, const Step& s) {
  const int32_t v = s.inputs[0];
  if (!run.is_float(v)) {
    const tq_image in = run.image(v), out = run.image(s.output);
    return tq_image_flatten(&in, static_cast<int8_t*>(out.data), out.image_stride, run.parallel);
  }
  const Shape& shape = run.shape(v);
  tq_image_float out = run.float_image(s.output);  // its row is [c, h, w]
  out.h = shape.h;
  out.w = shape.w;
  out.c = shape.c;
  out.channel_stride = shape.h * shape.w;
  out.row_stride = shape.w;
  out.pixel_stride = 1;
  copy_floats(run.float_image(v), out, run.parallel);
  return TQ_OK;
}

tq_status run_channels(const Run& run, const Step& s) {
  const tq_image in = run.image(s.inputs[0]), out = run.image(s.output);
  return tq_image_channels(&in, s.index.data(), &out, run.parallel);
}

tq_status run_pad(const Run& run, const Step& s) {
  const tq_image in = run.image(s.inputs[0]), out = run.image(s.output);
  return tq_image_pad(&in, s.before[0], s.before[1], run.qparams(s.output).zero_point, &out, run.parallel);
}

tq_status run_pixel_shuffle(const Run& run, const Step& s) {
  const tq_image in = run.image(s.inputs[0]), out = run.image(s.output);
  return tq_image_pixel_shuffle(&in, s.factor[0], s.inverse, &out, run.parallel);
}

}  // namespace torchquant::program
