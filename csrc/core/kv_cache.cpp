// Key/value caches: how a call is cut into work.
//
// Attention goes over blocks of keys twice, for the scores and, once the greatest score is known, for the sums. The
// blocks of all heads are shared among the threads each time. No result depends on the division: a block's sums are
// integers, and one thread adds the blocks of a query in ascending order. Heads are taken in waves, so that the scores
// of a wave stay in the cache.
#include <algorithm>

#include "core/convert.h"
#include "core/threads.h"
#include "core/torchquant_kv.h"
#include "core/workspace.h"
#include "isa.h"

namespace torchquant::kv_cache {
namespace {

constexpr int64_t kRowElements = 1 << 14;       // that a thread should quantize at least
constexpr int64_t kThreadedProducts = 1 << 18;  // products that a thread should have at least
constexpr int64_t kWaveBytes = 1 << 19;

KvShape shape_of(const tq_kv_shape& s) { return {s.d, s.bits, s.group}; }

KvRowsArgs rows_of(const tq_kv_rows_call& c) {
  KvRowsArgs args{};
  args.x = c.x;
  args.type = float_type(c.type);
  args.inner = c.inner;
  args.outer_stride = c.outer_stride;
  args.inner_stride = c.inner_stride;
  args.rows = c.rows;
  args.rows_outer_stride = c.rows_outer_stride;
  args.rows_inner_stride = c.rows_inner_stride;
  args.shape = shape_of(c.shape);
  return args;
}

// The scratch memory of one head of keys; returns its bytes.
int64_t place(CachedArgs& g, uint8_t* base) {
  const int64_t rows = g.rows(), blocks = g.blocks();
  int64_t at = 0;
  const auto take = [&](int64_t count) {
    uint8_t* piece = base ? base + at : nullptr;
    at += ceil_div(count * 4, 64) * 64;
    return piece;
  };
  g.groups = std::max(g.parts[0].value.shape.groups(), g.parts[1].value.shape.groups());
  g.score_stride = blocks * kKvBlock + 16;  // one cache line more: rows of 4 KB would share their lines' places
  g.scores = reinterpret_cast<float*>(take(rows * g.score_stride));
  g.tops = reinterpret_cast<float*>(take(blocks * rows));
  g.sums = reinterpret_cast<float*>(take(blocks * rows));
  g.steps = reinterpret_cast<float*>(take(blocks * rows * g.groups));
  g.zeros = reinterpret_cast<float*>(take(blocks * rows * g.groups));
  g.acc = reinterpret_cast<int32_t*>(take(blocks * rows * g.dv()));
  return at;
}

CachedArgs args_of(const tq_cached_attention_call& c) {
  CachedArgs g{};
  g.q_head_stride = c.query.head_stride;
  g.q_stride = c.query.row_stride;
  g.mask_head_stride = c.mask.head_stride;
  g.mask_stride = c.mask.row_stride;
  g.out_head_stride = c.parts[0].value_shape.d;
  g.out_stride = c.heads * c.parts[0].value_shape.d;
  g.heads = c.heads / c.key_heads;
  g.queries = c.queries;
  for (int i = 0; i < 2; ++i) {
    const tq_kv_part& part = c.parts[i];
    g.parts[i] = {{nullptr, part.key.row_stride, shape_of(part.key_shape)},
                  {nullptr, part.value.row_stride, shape_of(part.value_shape)},
                  part.keys};
  }
  g.type = float_type(c.type);
  g.mask_type = mask_type(c.mask_type);
  g.scale = c.scale_in_powers_of_2;
  return g;
}

// The part of a head of keys: unit = entry of the batch * key heads + head.
CachedArgs args_of_unit(const tq_cached_attention_call& c, const CachedArgs& all, int64_t unit, uint8_t* memory) {
  CachedArgs g = all;
  const int64_t b = unit / c.key_heads, head = unit % c.key_heads, first = head * g.heads;
  const auto bytes = [&](const tq_heads& h) {
    return static_cast<const uint8_t*>(h.data) + b * h.batch_stride + head * h.head_stride;
  };
  g.q = element_at(c.query.data, c.type, b * c.query.batch_stride + first * c.query.head_stride);
  for (int i = 0; i < 2; ++i) {
    if (c.parts[i].keys == 0) continue;
    g.parts[i].key.rows = bytes(c.parts[i].key);
    g.parts[i].value.rows = bytes(c.parts[i].value);
  }
  if (c.mask_type != TQ_NO_MASK)
    g.mask = element_at(c.mask.data, c.mask_type == TQ_BOOL_MASK ? TQ_U8 : TQ_F32,
                        b * c.mask.batch_stride + first * c.mask.head_stride);
  g.out = element_at(c.out, c.type, (b * c.queries * c.heads + first) * g.dv());
  place(g, memory);
  return g;
}

tq_status attend(const tq_cached_attention_call& c, const tq_parallel* parallel) {
  CachedArgs all = args_of(c);
  const KernelTable& table = kernels();
  const int64_t units = c.batch * c.key_heads, blocks = all.blocks(), bytes = place(all, nullptr);
  const int64_t work =
      all.rows() * std::min(kKvBlock, c.parts[0].keys + c.parts[1].keys) * (all.d() + all.dv());  // of a block
  const int64_t grain = std::max<int64_t>(1, kThreadedProducts / std::max<int64_t>(1, work));
  const bool serial = !parallel || units * blocks <= grain || threads_of(parallel) == 1;
  const int64_t wave = serial ? 1 : std::clamp<int64_t>(kWaveBytes / bytes, threads_of(parallel), units);
  uint8_t* memory = Workspace::of_this_thread().get(std::min(units, wave) * bytes);
  if (!memory) return TQ_OUT_OF_MEMORY;
  const tq_parallel* threads = serial ? nullptr : parallel;
  for (int64_t first = 0; first < units; first += wave) {
    const int64_t count = std::min(wave, units - first);
    const auto unit_of = [&](int64_t i) { return args_of_unit(c, all, first + i, memory + i * bytes); };
    const auto for_blocks = [&](const auto& kernel) {  // of all units of the wave
      parallel_for(threads, 0, count * blocks, grain, [&](int64_t from, int64_t to) {
        while (from < to) {
          const int64_t unit = from / blocks, block = from % blocks, last = std::min(blocks, block + to - from);
          kernel(unit_of(unit), block, last);
          from += last - block;
        }
      });
    };
    for_blocks(table.kv_scores);
    for_blocks(table.kv_sums);
    for (int64_t i = 0; i < count; ++i) table.kv_output(unit_of(i));
  }
  return TQ_OK;
}

}  // namespace
}  // namespace torchquant::kv_cache

using namespace torchquant;

int64_t tq_kv_row_bytes(const tq_kv_shape* shape) { return kv_cache::shape_of(*shape).row_bytes(); }

tq_status tq_quantize_kv(const tq_kv_rows_call* call, const tq_parallel* parallel) {
  const KvRowsArgs args = kv_cache::rows_of(*call);
  const KernelTable& table = kernels();
  parallel_for(parallel, 0, call->outer * call->inner, ceil_div(kv_cache::kRowElements, call->shape.d),
               [&](int64_t first, int64_t last) { table.quantize_kv(args, first, last); });
  return TQ_OK;
}

tq_status tq_dequantize_kv(const tq_kv_rows_call* call, const tq_parallel* parallel) {
  const KvRowsArgs args = kv_cache::rows_of(*call);
  const KernelTable& table = kernels();
  parallel_for(parallel, 0, call->outer * call->inner, ceil_div(kv_cache::kRowElements, call->shape.d),
               [&](int64_t first, int64_t last) { table.dequantize_kv(args, first, last); });
  return TQ_OK;
}

tq_status tq_cached_attention(const tq_cached_attention_call* call, const tq_parallel* parallel) {
  return kv_cache::attend(*call, parallel);
}
