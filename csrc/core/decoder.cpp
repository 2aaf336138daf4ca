#include "core/decoder.h"

#include <algorithm>

#include "core/convert.h"
#include "core/decoder_work.h"

namespace torchquant::decoder {
namespace {

constexpr int64_t kLeastElements = 8192;  // that a thread should add and normalize

Work place(const std::vector<Block>& blocks, const Sizes& sizes, const Call& call, const KernelTable& table,
           int64_t threads, const tq_parallel* parallel, Pieces& pieces) {
  Work w{sizes, call, table, threads, parallel, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const int64_t m = call.tokens;
  w.normed = pieces.take<float>(m * sizes.hidden);
  w.query = pieces.take<float>(m * sizes.q_width());
  w.key = pieces.take<float>(m * sizes.kv_width());
  w.value = pieces.take<float>(m * sizes.kv_width());
  w.mixed = pieces.take<float>(m * sizes.q_width());
  w.projected = pieces.take<float>(m * sizes.hidden);
  w.gate = pieces.take<float>(m * sizes.intermediate);
  w.up = pieces.take<float>(m * sizes.intermediate);
  int64_t inputs = 0;
  for (const Block& b : blocks)
    for (const Group* group : {&b.qkv, &b.o, &b.gate_up, &b.down})
      inputs = std::max(inputs, m == 1 ? input_bytes(table, *group) : 0);
  w.inputs = pieces.take<uint8_t>(inputs);
  w.attention = pieces.take<uint8_t>(attention_bytes(sizes, call, threads));
  return w;
}

NormArgs norm_args(const Norm& norm, const float* x, int64_t k, float* out) {
  NormArgs n{};
  n.x = x;
  n.weight = norm.weight;
  n.out = out;
  n.x_stride = n.residual_stride = n.k = k;
  n.type = n.weight_type = n.bias_type = FloatType::kF32;
  n.eps = norm.eps;
  return n;
}

// hidden += projected (unless it is null), and normed = norm(hidden).
void add_and_normalize(const Work& work, const float* projected, const Norm* norm) {
  const int64_t k = work.sizes.hidden;
  float* const hidden = work.call.hidden;
  NormArgs args{};
  if (norm) args = norm_args(*norm, hidden, k, work.normed);
  parallel_for(work.parallel, 0, work.call.tokens, std::max<int64_t>(1, kLeastElements / k),
               [&](int64_t m0, int64_t m1) {
                 if (projected)
                   for (int64_t i = m0 * k; i < m1 * k; ++i) hidden[i] += projected[i];
                 if (norm) work.table.normalize_rows(args, m0, m1);
               });
}

void normalize_heads(const Work& work, const Norm& norm, float* x, int64_t heads) {
  if (!norm.present) return;
  const NormArgs args = norm_args(norm, x, work.sizes.head_dim, x);
  parallel_for(work.parallel, 0, work.call.tokens * heads, ceil_div(kLeastElements, work.sizes.head_dim),
               [&](int64_t m0, int64_t m1) { work.table.normalize_rows(args, m0, m1); });
}

// `next`: the block behind, or null.
tq_status run_block(const Work& work, const Block& b, const Cache& cache, const Block* next) {
  float* const qkv[] = {work.query, work.key, work.value};
  tq_status status = multiply(work, b.qkv, work.normed, qkv, &b.o);
  if (status != TQ_OK) return status;
  normalize_heads(work, b.q_norm, work.query, work.sizes.heads);
  normalize_heads(work, b.k_norm, work.key, work.sizes.kv_heads);
  status = attend(work, cache);
  if (status != TQ_OK) return status;
  status = multiply(work, b.o, work.mixed, &work.projected, &b.gate_up);
  if (status != TQ_OK) return status;
  add_and_normalize(work, work.projected, &b.post_norm);
  status = multiply_gated(work, b.gate_up, work.normed, work.gate, work.up, b.down);
  if (status != TQ_OK) return status;
  return multiply(work, b.down, work.gate, &work.projected, next ? &next->qkv : nullptr);
}

}  // namespace

int64_t arena_bytes(const std::vector<Block>& blocks, const Sizes& sizes, const Call& call, const KernelTable& table,
                    int64_t threads) {
  Pieces pieces(nullptr);
  place(blocks, sizes, call, table, threads, nullptr, pieces);
  return pieces.bytes();
}

tq_status run(const std::vector<Block>& blocks, const Sizes& sizes, const Call& call, const KernelTable& table,
              uint8_t* arena, int64_t threads, const tq_parallel* parallel) {
  if (call.tokens == 0) return TQ_OK;
  Pieces pieces(arena);
  const Work work = place(blocks, sizes, call, table, threads, parallel, pieces);
  for (size_t i = 0; i < blocks.size(); ++i) {
    add_and_normalize(work, i == 0 ? nullptr : work.projected, &blocks[i].input_norm);
    const tq_status status =
        run_block(work, blocks[i], call.caches[i], i + 1 < blocks.size() ? &blocks[i + 1] : nullptr);
    if (status != TQ_OK) return status;
  }
  if (!blocks.empty()) add_and_normalize(work, work.projected, nullptr);
  return TQ_OK;
}

}  // namespace torchquant::decoder
