// quantize_pack_intx: what a training step does to the weight of a linear layer of 2 to 8 bits.
#include "core/convert.h"
#include "core/spans.h"
#include "core/threads.h"
#include "core/torchquant_intx.h"
#include "isa.h"

using namespace torchquant;

tq_status tq_quantize_pack_intx(const tq_rows* weight, tq_row_mode mode, int32_t qmin, int32_t qmax,
                                const tq_intx_shape* shape, uint8_t* packed, float* scale, int8_t* zero_point,
                                const tq_parallel* parallel) {
  QuantizePackIntxArgs g{};
  g.w = weight->x;
  g.w_type = float_type(weight->type);
  g.w_stride = weight->stride;
  g.shape = intx_shape_of(*shape);
  g.mode = row_mode(mode);
  g.qmin = qmin;
  g.qmax = qmax;
  g.packed = packed;
  g.scale = scale;
  g.zero = zero_point;
  const KernelTable& table = kernels();
  parallel_for(parallel, 0, num_tiles(shape->n), ceil_div(kThreadElements, kTileN * shape->k),
               [&](int64_t first, int64_t last) { table.quantize_pack_intx(g, first, last); });
  return TQ_OK;
}
