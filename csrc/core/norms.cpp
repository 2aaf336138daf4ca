// rms_norm, layer_norm: rows, one visit to each while it is in the nearest cache.
#include <algorithm>

#include "core/convert.h"
#include "core/threads.h"
#include "isa.h"

using namespace torchquant;

tq_status tq_normalize(const tq_norm_call* call, const tq_parallel* parallel) {
  constexpr int64_t kThreadedElements = 1 << 13;  // elements that a thread should have at least
  const tq_rows& rows = call->rows;
  if (rows.m == 0 || rows.k == 0) return TQ_OK;
  NormArgs args{};
  args.x = rows.x;
  args.residual = call->residual;
  args.weight = call->weight;
  args.bias = call->bias;
  args.out = call->out;
  args.x_stride = rows.stride;
  args.residual_stride = call->residual_stride;
  args.k = rows.k;
  args.type = float_type(rows.type);
  args.weight_type = float_type(call->weight_type);
  args.bias_type = float_type(call->bias_type);
  args.eps = call->eps;
  args.centered = call->centered;
  args.cast_before_weight = call->cast_before_weight;
  const KernelTable& table = kernels();
  parallel_for(parallel, 0, rows.m, std::max<int64_t>(1, kThreadedElements / rows.k),
               [&](int64_t m0, int64_t m1) { table.normalize_rows(args, m0, m1); });
  return TQ_OK;
}
