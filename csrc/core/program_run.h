// One call of a program, as its steps see it, and the steps that are in files of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/program.h"

namespace torchquant::program {

struct Run {  // one call
  const std::vector<Value>& values;
  const Plan& plan;
  const tq_image_float* arguments;
  const tq_image_float* results;
  uint8_t* arena;
  std::atomic<bool>& has_nonfinite;
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
    out.row_stride = p.row_stride;
    out.image_stride = p.image_stride;
    return out;
  }

  tq_image_float float_image(int32_t v) const {
    const tq_image i = image(v);
    return {i.data, TQ_F32, i.n, i.h, i.w, i.c, i.image_stride, i.row_stride, i.pixel_stride, 1};
  }
};

// program_blend.cpp: sums, products, functions, norms.
tq_status run_two(const Run& run, const Step& s);
tq_status run_affine(const Run& run, const Step& s);
tq_status run_map(const Run& run, const Step& s);
tq_status run_norm(const Run& run, const Step& s);

// program_moves.cpp: concatenations, and elements that move.
void copy_floats(const tq_image_float& from, const tq_image_float& to, const tq_parallel* parallel);
tq_status run_concat(const Run& run, const Step& s);
tq_status run_channels(const Run& run, const Step& s);
tq_status run_pad(const Run& run, const Step& s);
tq_status run_pixel_shuffle(const Run& run, const Step& s);
tq_status run_upsample(const Run& run, const Step& s);
tq_status run_flatten(const Run& run, const Step& s);

}  // namespace torchquant::program
