// Steps that compute with each element by itself: sums, products, functions; and norms of the channels of a pixel.
#include "core/program_run.h"

namespace torchquant::program {
namespace {

bool is_dense(const tq_image& i) {
  return (i.h * i.w == 1 || (i.pixel_stride == i.c && i.row_stride == i.w * i.c)) &&
         (i.n == 1 || i.image_stride == i.h * i.w * i.c);
}

}  // namespace

tq_status run_two(const Run& run, const Step& s) {
  const tq_image a = run.image(s.inputs[0]), out = run.image(s.output);
  tq_image b = run.image(s.inputs[1]);
  const tq_qparams &aq = run.qparams(s.inputs[0]), &bq = run.qparams(s.inputs[1]), &outq = run.qparams(s.output);
  if (b.h != a.h || b.w != a.w) {  // one pixel for each image
    b.h = a.h;
    b.w = a.w;
    b.row_stride = b.pixel_stride = 0;
  }
  if (a.type == TQ_F32 || b.type == TQ_F32) {
    const tq_image_blend_call call = {a, aq, nullptr, nullptr, &b, bq, s.kind == Kind::kMul, s.activation, out, outq};
    return tq_image_blend(&call, run.parallel);
  }
  if (s.kind == Kind::kAdd) return tq_image_add(&a, aq, &b, bq, s.activation, &out, outq, run.parallel);
  return tq_image_mul(&a, aq, &b, bq, s.activation, &out, outq, run.parallel);
}

tq_status run_affine(const Run& run, const Step& s) {
  const int32_t v = s.inputs[0];
  tq_image_blend_call call{};
  call.a = run.image(v);
  call.a_qparams = run.qparams(v);
  call.gain = s.channel.gain;
  call.shift = s.channel.shift;
  tq_image residual;
  if (s.residual >= 0) {
    residual = run.image(s.residual);
    call.b = &residual;
    call.b_qparams = run.qparams(s.residual);
  }
  call.activation = s.activation;
  call.out = run.image(s.output);
  call.out_qparams = run.qparams(s.output);
  return tq_image_blend(&call, run.parallel);
}

tq_status run_map(const Run& run, const Step& s) {
  const int32_t v = s.inputs[0];
  const tq_image in = run.image(v), out = run.image(s.output);
  if (!run.is_float(v)) {
    const void* const table = run.is_float(s.output) ? static_cast<const void*>(s.float_table.data())
                                                     : static_cast<const void*>(s.tables[0].data());
    return tq_image_map(&in, table, &out, run.parallel);
  }
  if (!run.is_float(s.output) && s.activation == TQ_NONE) {
    const tq_image_float x = run.float_image(v);
    return tq_image_quantize(&x, run.qparams(s.output), &out, run.parallel);
  }
  if (!run.is_float(s.output) || !is_dense(in) || !is_dense(out)) {
    tq_image_blend_call call{};
    call.a = in;
    call.activation = s.activation;
    call.out = out;
    call.out_qparams = run.qparams(s.output);
    return tq_image_blend(&call, run.parallel);
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

tq_status run_norm(const Run& run, const Step& s) {  // of floats to floats without gaps between pixels
  const tq_image in = run.image(s.inputs[0]), out = run.image(s.output);
  tq_norm_call call{};
  call.weight = s.channel.gain;
  call.bias = s.channel.shift;
  call.weight_type = call.bias_type = TQ_F32;
  call.eps = s.eps;
  call.centered = true;
  const auto normalize = [&](int64_t from, int64_t to, int64_t pixels, int64_t stride) {
    call.rows = {static_cast<const float*>(in.data) + from, TQ_F32, pixels, in.c, stride};
    call.out = static_cast<float*>(out.data) + to;
    return tq_normalize(&call, run.parallel);
  };
  if (in.h * in.w == 1) return normalize(0, 0, in.n, in.image_stride);
  if (in.row_stride == in.w * in.pixel_stride && in.image_stride == in.h * in.row_stride)
    return normalize(0, 0, in.n * in.h * in.w, in.pixel_stride);
  for (int64_t i = 0; i < in.n * in.h; ++i) {
    const int64_t from = i / in.h * in.image_stride + i % in.h * in.row_stride;
    const tq_status status = normalize(from, i * in.w * in.c, in.w, in.pixel_stride);
    if (status != TQ_OK) return status;
  }
  return TQ_OK;
}

}  // namespace torchquant::program
