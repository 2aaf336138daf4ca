// Runs the steps of a program: one call of the C interface for each.
#include "core/program_run.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/convert.h"
#include "core/image.h"
#include "core/threads.h"
#include "formats/int8_tiles.h"

namespace torchquant::program {
namespace {

tq_status run_input(const Run& run, const Step& s) {
  const tq_image_float& x = run.arguments[s.place];
  if (run.is_float(s.output)) {
    copy_floats(x, run.float_image(s.output), run.parallel);
    return TQ_OK;
  }
  quantize_image(x, run.qparams(s.output), run.image(s.output), run.has_nonfinite, run.parallel);
  return TQ_OK;
}

tq_status run_output(const Run& run, const Step& s) {
  const tq_image_float& result = run.results[s.place];
  const int32_t v = s.inputs[0];
  if (run.is_float(v)) {
    copy_floats(run.float_image(v), result, run.parallel);
    return TQ_OK;
  }
  const tq_image q = run.image(v);
  return tq_image_dequantize(&q, run.qparams(v), &result, run.parallel);
}

tq_status run_conv(const Run& run, const Step& s) {
  const int32_t v = s.inputs[0];
  const tq_qparams& in = run.qparams(v);
  tq_conv_call call{};
  call.input = run.image(v);
  call.input_scale = &in.scale;
  call.input_zero_point = &in.zero_point;
  call.kernel_h = s.kernel[0];
  call.kernel_w = s.kernel[1];
  call.stride_h = s.stride[0];
  call.stride_w = s.stride[1];
  call.pad_top = s.before[0];
  call.pad_left = s.before[1];
  call.dilation_h = s.dilation[0];
  call.dilation_w = s.dilation[1];
  call.groups = s.weight.groups;
  call.packed = s.weight.packed;
  call.weight_scale = s.weight.scale;
  call.bias = s.weight.bias;
  call.activation = s.activation;
  tq_image residual;
  if (s.residual >= 0) {
    residual = run.image(s.residual);
    call.residual = &residual;
    call.residual_qparams = run.qparams(s.residual);
  }
  call.out = run.image(s.output);
  call.out_qparams = run.qparams(s.output);
  return tq_conv(&call, run.parallel);
}

char* pixel_at(const tq_image& image, int64_t n, int64_t y) {
  return element_at(image.data, image.type, n * image.image_stride + y * image.row_stride);
}

tq_status run_linear(const Run& run, const Step& s) {
  const int32_t v = s.inputs[0];
  const tq_image x = run.image(v), y = run.image(s.output);
  // On an image it is a convolution of one pixel, whose packed weight is the same.
  if (!s.weight.zero_point && (run.shape(v).rank == 4 || s.residual >= 0)) return run_conv(run, s);
  const tq_qparams &in = run.qparams(v), &out = run.qparams(s.output);
  tq_linear_input input{};
  input.rows = {x.data, TQ_I8, x.n, x.c, x.image_stride};
  input.scale = &in.scale;
  input.zero_point = &in.zero_point;
  tq_linear_part part{};
  part.n = s.weight.outputs;
  part.packed = s.weight.packed;
  part.weight_scale = s.weight.scale;
  part.weight_zero_point = s.weight.zero_point;
  part.bias = s.weight.bias;
  part.activation = s.activation;
  part.out_type = y.type;
  part.out_scale = out.scale;
  part.out_zero_point = out.zero_point;
  part.out_qmin = out.qmin;
  part.out_qmax = out.qmax;
  part.out = y.data;
  part.out_stride = y.image_stride;
  tq_image residual{};
  if (s.residual >= 0) {
    residual = run.image(s.residual);
    part.residual = residual.data;
    part.residual_type = residual.type;
    part.residual_stride = residual.image_stride;
    part.residual_scale = run.qparams(s.residual).scale;
    part.residual_zero_point = run.qparams(s.residual).zero_point;
  }
  if (x.h == 1 && x.w == 1) return tq_linear(&input, &part, 1, run.parallel);
  for (int64_t n = 0; n < x.n; ++n)
    for (int64_t row = 0; row < x.h; ++row) {  // pixels of a row are at one distance
      input.rows = {pixel_at(x, n, row), TQ_I8, x.w, x.c, x.pixel_stride};
      part.out = pixel_at(y, n, row);
      part.out_stride = y.pixel_stride;
      if (s.residual >= 0) {
        part.residual = pixel_at(residual, n, row);
        part.residual_stride = residual.pixel_stride;
      }
      const tq_status status = tq_linear(&input, &part, 1, run.parallel);
      if (status != TQ_OK) return status;
    }
  return TQ_OK;
}

tq_status run_pool(const Run& run, const Step& s) {
  const tq_image in = run.image(s.inputs[0]), out = run.image(s.output);
  const tq_qparams &inq = run.qparams(s.inputs[0]), &outq = run.qparams(s.output);
  const tq_window window = {s.kernel[0], s.kernel[1], s.stride[0],   s.stride[1],
                            s.before[0], s.before[1], s.dilation[0], s.dilation[1]};
  if (s.kind == Kind::kMaxPool) return tq_image_max_pool(&in, &window, &out, run.parallel);
  if (s.kind == Kind::kAdaptiveMaxPool) return tq_image_adaptive_max_pool(&in, &out, run.parallel);
  if (s.kind == Kind::kAdaptiveAvgPool) return tq_image_adaptive_avg_pool(&in, inq, &out, outq, run.parallel);
  return tq_image_avg_pool(&in, inq, &window, s.count_include_pad, s.divisor, &out, outq, run.parallel);
}

tq_status run_step(const Run& run, const Step& s) {
  switch (s.kind) {
    case Kind::kInput: return run_input(run, s);
    case Kind::kConv: return run_conv(run, s);
    case Kind::kLinear: return run_linear(run, s);
    case Kind::kAdd:
    case Kind::kMul: return run_two(run, s);
    case Kind::kMap: return run_map(run, s);
    case Kind::kAffine: return run_affine(run, s);
    case Kind::kNorm: return run_norm(run, s);
    case Kind::kChannels: return run_channels(run, s);
    case Kind::kCrop: return TQ_OK;  // always a part of its input's memory
    case Kind::kPad: return run_pad(run, s);
    case Kind::kPixelShuffle: return run_pixel_shuffle(run, s);
    case Kind::kMaxPool:
    case Kind::kAvgPool:
    case Kind::kAdaptiveMaxPool:
    case Kind::kAdaptiveAvgPool: return run_pool(run, s);
    case Kind::kConcat: return run_concat(run, s);
    case Kind::kUpsample: return run_upsample(run, s);
    case Kind::kFlatten: return run_flatten(run, s);
    case Kind::kOutput: return run_output(run, s);
  }
  return TQ_OK;
}

tq_status look_for_nonfinite(const Run& run, const tq_image_float& x) {  // whose images have no gaps
  const int64_t elements = x.n * x.h * x.w * x.c;
  if (elements == 0) return TQ_OK;
  const tq_spans spans = tq_spans_per_tensor(elements);
  float least = 0.0f, greatest = 0.0f;
  int64_t nonfinite = 0;
  const tq_status status = tq_minmax(x.data, TQ_F32, &spans, 1, &least, &greatest, &nonfinite, run.parallel);
  if (nonfinite) run.has_nonfinite = true;
  return status;
}

// What was used in the last call is no longer near: the lines of a step ...
void fetch(const Step& s) {
  const char* const first = reinterpret_cast<const char*>(&s);
  for (size_t at = 0; at < sizeof(Step); at += 64) __builtin_prefetch(first + at);
}

// ... and those of its layer that have to be read before the step can begin, for the second-level cache. Every thread
// waits for them.
void fetch_channels(const Step& s) {
  if (s.kind != Kind::kConv) return;
  const Weight& w = s.weight;
  const char *const scale = reinterpret_cast<const char*>(w.scale), *const bias = reinterpret_cast<const char*>(w.bias);
  for (int64_t at = 0; at < w.outputs * 4; at += 64) {
    __builtin_prefetch(scale + at, 0, 2);
    if (bias) __builtin_prefetch(bias + at, 0, 2);
  }
  if (w.groups > 1) return;
  const int64_t k = w.inputs * s.kernel[0] * s.kernel[1];
  for (int64_t tile = 0; tile < num_tiles(w.outputs); ++tile)
    __builtin_prefetch(tile_sums(tile_at(w.packed, k, tile), k), 0, 2);
}

[[noreturn]] void refuse(size_t step, const std::string& what) {
  throw std::invalid_argument("Program: step " + std::to_string(step) + " " + what);
}

}  // namespace

Program::Program(std::vector<Value> values, std::vector<Step> steps)
    : values_(std::move(values)), steps_(std::move(steps)) {
  std::vector<bool> written(values_.size(), false), given;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& s = steps_[i];
    const auto require_written = [&](int32_t v) {
      if (v < 0 || static_cast<size_t>(v) >= values_.size() || !written[static_cast<size_t>(v)])
        refuse(i, "must read values that an earlier step wrote, got value " + std::to_string(v));
    };
    for (const int32_t v : s.inputs) require_written(v);
    if (s.residual >= 0) require_written(s.residual);
    if (s.kind == Kind::kOutput) {
      if (static_cast<size_t>(s.place) >= given.size()) given.resize(static_cast<size_t>(s.place) + 1, false);
      if (given[static_cast<size_t>(s.place)]) refuse(i, "writes result " + std::to_string(s.place) + " once more");
      given[static_cast<size_t>(s.place)] = true;
    } else {
      const auto out = static_cast<size_t>(s.output);
      if (s.output < 0 || out >= values_.size() || written[out])
        refuse(i, "must write a value of its own, got value " + std::to_string(s.output));
      written[out] = true;
    }
    if (s.kind == Kind::kInput) {
      arguments_ = std::max(arguments_, s.place + 1);
      quantized_.resize(static_cast<size_t>(arguments_), false);
      if (values_[static_cast<size_t>(s.output)].type == TQ_I8) quantized_[static_cast<size_t>(s.place)] = true;
    }
    if (s.kind == Kind::kConv || s.kind == Kind::kLinear)
      weight_bytes_ += s.weight.outputs * (s.weight.inputs / s.weight.groups) * s.kernel[0] * s.kernel[1];
  }
  if (arguments_ == 0 || given.empty()) throw std::invalid_argument("Program: steps must hold an Input and an Output");
  for (size_t r = 0; r < given.size(); ++r)
    if (!given[r]) throw std::invalid_argument("Program: no step writes result " + std::to_string(r));
  results_ = static_cast<int32_t>(given.size());
}

Plan Program::plan(const Request& request) const {
  Plan plan;
  plan.request = request;
  plan.shapes.resize(values_.size());
  plan.results.resize(static_cast<size_t>(results_));
  plan.results_last.resize(static_cast<size_t>(results_));
  for (const Step& s : steps_) {
    const Shape shape = output_shape(s, plan.shapes, request);
    if (s.kind == Kind::kOutput) {
      plan.results[static_cast<size_t>(s.place)] = shape;
      plan.results_last[static_cast<size_t>(s.place)] = s.last;
    } else {
      plan.shapes[static_cast<size_t>(s.output)] = shape;
    }
  }
  place_values(values_, steps_, plan);
  return plan;
}

tq_status Program::run(const Plan& plan, const tq_image_float* arguments, const tq_image_float* results, uint8_t* arena,
                       std::atomic<bool>& has_nonfinite, const tq_parallel* parallel) const {
  const Run run{values_, plan, arguments, results, arena, has_nonfinite, parallel};
  for (size_t i = 0; i < quantized_.size(); ++i) {
    const tq_status status = quantized_[i] ? TQ_OK : look_for_nonfinite(run, arguments[i]);
    if (status != TQ_OK) return status;
  }
  for (size_t i = 0; i < steps_.size() && !has_nonfinite; ++i) {
    if (i + 1 < steps_.size()) fetch_channels(steps_[i + 1]);
    if (i + 2 < steps_.size()) fetch(steps_[i + 2]);
    if (!plan.runs[i]) continue;
    const tq_status status = run_step(run, steps_[i]);
    if (status != TQ_OK) return status;
  }
  return TQ_OK;
}

}  // namespace torchquant::program
