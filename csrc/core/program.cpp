// Runs the steps of a program: one call of the C interface for each.
#include "core/program.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/threads.h"
#include "core/convert.h"
#include "formats/int8_tiles.h"

namespace torchquant::program {
namespace {

struct Run {  // one call
  const std::vector<Value>& values;
  const Plan& plan;
  const tq_image_float* arguments;
  const tq_image_float* results;
  uint8_t* arena;
  const tq_parallel* parallel;

  const Value& value(int32_t v) const { return values[static_cast<size_t>(v)]; }
  const tq_qparams& qparams(int32_t v) const { return value(v).qparams; }
  const Shape& shape(int32_t v) const { return plan.shapes[static_cast<size_t>(v)]; }
  const Place& place(int32_t v) const { return plan.places[static_cast<size_t>(v)]; }
  bool is_float(int32_t v) const { return value(v).type == TQ_F32; }

  tq_image image(int32_t v) const {
    const Shape& s = shape(v);
    const Place& p = place(v);
    uint8_t* const base = p.result < 0 ? arena : static_cast<uint8_t*>(results[p.result].data);
    tq_image out{};
    out.data = base + p.offset;
    out.type = value(v).type;
    out.n = s.n;
    out.h = s.h;
    out.w = s.w;
    out.c = s.c;
    out.pixel_stride = p.pixel_stride;
    out.row_stride = s.w * p.pixel_stride;
    out.image_stride = s.h * out.row_stride;
    return out;
  }

  tq_image_float float_image(int32_t v) const {
    const tq_image i = image(v);
    return {i.data, TQ_F32, i.n, i.h, i.w, i.c, i.image_stride, i.row_stride, i.pixel_stride, 1};
  }
};

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

tq_status run_input(const Run& run, const Step& s) {
  const tq_image_float& x = run.arguments[s.place];
  if (run.is_float(s.output)) {
    copy_floats(x, run.float_image(s.output), run.parallel);
    return TQ_OK;
  }
  const tq_image q = run.image(s.output);
  return tq_image_quantize(&x, run.qparams(s.output), &q, run.parallel);
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

tq_status run_linear(const Run& run, const Step& s) {
  const int32_t v = s.inputs[0];
  const tq_qparams &in = run.qparams(v), &out = run.qparams(s.output);
  const tq_image x = run.image(v), y = run.image(s.output);
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
  return tq_linear(&input, &part, 1, run.parallel);
}

tq_status run_two(const Run& run, const Step& s) {
  const tq_image a = run.image(s.inputs[0]), out = run.image(s.output);
  tq_image b = run.image(s.inputs[1]);
  const tq_qparams &aq = run.qparams(s.inputs[0]), &bq = run.qparams(s.inputs[1]), &outq = run.qparams(s.output);
  if (s.kind == Kind::kAdd) return tq_image_add(&a, aq, &b, bq, s.activation, &out, outq, run.parallel);
  if (b.h != a.h || b.w != a.w) {  // one pixel for each image
    b.h = a.h;
    b.w = a.w;
    b.row_stride = b.pixel_stride = 0;
  }
  return tq_image_mul(&a, aq, &b, bq, s.activation, &out, outq, run.parallel);
}

tq_status run_map(const Run& run, const Step& s) {
  const int32_t v = s.inputs[0];
  const tq_image in = run.image(v), out = run.image(s.output);
  if (!run.is_float(v)) {
    const void* const table = run.is_float(s.output) ? static_cast<const void*>(s.float_table.data())
                                                     : static_cast<const void*>(s.tables[0].data());
    return tq_image_map(&in, table, &out, run.parallel);
  }
  if (!run.is_float(s.output)) {
    const tq_image_float x = run.float_image(v);
    return tq_image_quantize(&x, run.qparams(s.output), &out, run.parallel);
  }
  tq_activation_call call{};
  call.x = in.data;
  call.out = out.data;
  call.x_type = call.out_type = TQ_F32;
  call.activation = s.activation;
  call.rows = 1;
  call.length = run.shape(v).elements();
  return tq_activate(&call, run.parallel);
}

tq_status run_pool(const Run& run, const Step& s) {
  const tq_image in = run.image(s.inputs[0]), out = run.image(s.output);
  const tq_qparams &inq = run.qparams(s.inputs[0]), &outq = run.qparams(s.output);
  const tq_window window = {s.kernel[0], s.kernel[1], s.stride[0],   s.stride[1],
                            s.before[0], s.before[1], s.dilation[0], s.dilation[1]};
  if (s.kind == Kind::kMaxPool) return tq_image_max_pool(&in, &window, &out, run.parallel);
  if (s.kind == Kind::kAdaptiveAvgPool) return tq_image_adaptive_avg_pool(&in, inq, &out, outq, run.parallel);
  return tq_image_avg_pool(&in, inq, &window, s.count_include_pad, s.divisor, &out, outq, run.parallel);
}

tq_status run_concat(const Run& run, const Step& s) {
  const tq_image whole = run.image(s.output);
  int64_t channel = 0;
  for (size_t i = 0; i < s.inputs.size(); ++i) {
    const int32_t v = s.inputs[i];
    const tq_image in = run.image(v);
    tq_image part = whole;
    part.data = static_cast<int8_t*>(whole.data) + channel;
    part.c = in.c;
    channel += in.c;
    if (in.data == part.data) continue;  // program_memory.cpp put it there
    tq_status status = TQ_OK;
    if (run.is_float(v)) {
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

tq_status run_step(const Run& run, const Step& s) {
  switch (s.kind) {
    case Kind::kInput: return run_input(run, s);
    case Kind::kConv: return run_conv(run, s);
    case Kind::kLinear: return run_linear(run, s);
    case Kind::kAdd:
    case Kind::kMul: return run_two(run, s);
    case Kind::kMap: return run_map(run, s);
    case Kind::kMaxPool:
    case Kind::kAvgPool:
    case Kind::kAdaptiveAvgPool: return run_pool(run, s);
    case Kind::kConcat: return run_concat(run, s);
    case Kind::kUpsample: return run_upsample(run, s);
    case Kind::kFlatten: return run_flatten(run, s);
    case Kind::kOutput: return run_output(run, s);
  }
  return TQ_OK;
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
    if (s.kind == Kind::kInput) arguments_ = std::max(arguments_, s.place + 1);
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
  for (const Step& s : steps_) {
    const Shape shape = output_shape(s, plan.shapes, request);
    if (s.kind == Kind::kOutput) plan.results[static_cast<size_t>(s.place)] = shape;
    else plan.shapes[static_cast<size_t>(s.output)] = shape;
  }
  place_values(values_, steps_, plan);
  return plan;
}

tq_status Program::run(const Plan& plan, const tq_image_float* arguments, const tq_image_float* results, uint8_t* arena,
                       const tq_parallel* parallel) const {
  const Run run{values_, plan, arguments, results, arena, parallel};
  for (size_t i = 0; i < steps_.size(); ++i) {
    if (!plan.runs[i]) continue;
    const tq_status status = run_step(run, steps_[i]);
    if (status != TQ_OK) return status;
  }
  return TQ_OK;
}

}  // namespace torchquant::program
