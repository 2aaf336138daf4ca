// quantize_pack and the fake-quantized rows of mm_fake_quantized: what a training step does to the weight of a linear
// layer.
#include "core/convert.h"
#include "core/spans.h"
#include "core/threads.h"
#include "formats/int8_tiles.h"
#include "isa.h"

using namespace torchquant;

tq_status tq_quantize_pack(const tq_rows* weight, tq_row_mode mode, int32_t qmin, int32_t qmax, int8_t* packed,
                           float* scale, int32_t* zero_point, const tq_parallel* parallel) {
  QuantizePackArgs g{};
  g.w = weight->x;
  g.w_type = float_type(weight->type);
  g.w_stride = weight->stride;
  g.n = weight->m;
  g.k = weight->k;
  g.mode = row_mode(mode);
  g.qmin = qmin;
  g.qmax = qmax;
  g.packed = packed;
  g.scale = scale;
  g.zero = zero_point;
  const KernelTable& table = kernels();
  parallel_for(parallel, 0, num_tiles(g.n), ceil_div(kThreadElements, kTileN * g.k),
               [&](int64_t first, int64_t last) { table.quantize_pack(g, first, last); });
  return TQ_OK;
}

tq_status tq_fake_quantize_rows(const tq_rows* rows, const tq_scales* scales, float* out, const tq_parallel* parallel) {
  const float* x = static_cast<const float*>(rows->x);
  const KernelTable& table = kernels();
  parallel_for(
      parallel, 0, rows->m, ceil_div(kThreadElements, std::max<int64_t>(1, rows->k)), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const int32_t zero = scales->zero_point ? scales->zero_point[r] : 0;
          const float inverse = 1.0f / scales->scale[r], real_zero = scales->real_zero ? scales->real_zero[r] : 0.0f,
                      lo = static_cast<float>(scales->qmin - zero), hi = static_cast<float>(scales->qmax - zero);
          FakeQuantizeArgs args{};
          args.x = x + r * rows->stride;
          args.out = out + r * rows->k;
          args.n = rows->k;
          args.type = FloatType::kF32;
          args.scale = scales->scale + r;
          args.inverse = &inverse;
          args.real_zero = &real_zero;
          args.lo = &lo;
          args.hi = &hi;
          table.fake_quantize_span(args);
        }
      });
  return TQ_OK;
}
