// Attention of a decoder's new tokens to its cache.
//
// One token: the blocks of keys of all heads are shared among the threads, once for the scores and, when the greatest
// score is known, once for the sums (kernels/attention_float.h). Many tokens: a share is a run of heads and of blocks of
// tokens, and packs the keys of each head for itself.
#include <algorithm>
#include <cstring>

#include "core/convert.h"
#include "core/decoder_work.h"

namespace torchquant::decoder {
namespace {

constexpr int64_t kTokens = 32;               // that a thread computes together
constexpr int64_t kMaskedTokens = 64;         // that attend to a quantized cache together
constexpr int64_t kElementsOfAThread = 4096;  // that a thread should rotate or copy
constexpr int64_t kScoreGap = 16;             // floats more than a power of 2: rows on different cache sets

float* floats(uint8_t* p) { return reinterpret_cast<float*>(p); }

int64_t heads_per_key(const Sizes& sizes) { return sizes.heads / sizes.kv_heads; }

// ---------------------------------------------------------------- float cache

struct FloatMemory {  // of `rows` queries that attend to so many keys
  FloatMemory(int64_t rows, int64_t keys, int64_t d, uint8_t* base) {
    const int64_t blocks = ceil_div(keys, kFloatKeys), padded = blocks * kFloatKeys;
    Pieces pieces(base);
    packed = pieces.take<float>(padded * d);
    stride = padded + kScoreGap;
    scores = pieces.take<float>(rows * stride);
    tops = pieces.take<float>(rows * blocks);
    sums = pieces.take<float>(rows * blocks);
    y = pieces.take<float>(rows * blocks * ceil_div(d, kFloatTile) * kFloatTile);
    bytes = pieces.bytes();
  }
  void give(FloatAttentionArgs& g) const {
    g.packed = packed;
    g.scores = scores;
    g.score_stride = stride;
    g.tops = tops;
    g.sums = sums;
    g.y = y;
  }
  float *packed, *scores, *tops, *sums, *y;
  int64_t stride, bytes;
};

FloatAttentionArgs float_args(const Work& work, const Cache& cache, int64_t key_head) {
  FloatAttentionArgs g{};
  g.d = work.sizes.head_dim;
  g.k = floats(cache.key.data + key_head * cache.key.head_stride);
  g.v = floats(cache.value.data + key_head * cache.value.head_stride);
  g.k_stride = cache.key.token_stride / 4;
  g.v_stride = cache.value.token_stride / 4;
  g.scale = work.sizes.scale_in_powers_of_2;
  return g;
}

// The queries that share a head of keys are rows of one token.
FloatAttentionArgs args_of_key_head(const Work& work, const Cache& cache, int64_t key_head) {
  const int64_t rows = heads_per_key(work.sizes), d = work.sizes.head_dim, keys = work.call.keys();
  FloatAttentionArgs g = float_args(work, cache, key_head);
  g.q = work.query + key_head * rows * d;
  g.out = work.mixed + key_head * rows * d;
  g.q_stride = g.out_stride = d;
  g.rows = rows;
  g.first = keys;
  g.step = 0;
  const int64_t bytes = FloatMemory(rows, keys, d, nullptr).bytes;
  FloatMemory(rows, keys, d, work.attention + key_head * bytes).give(g);
  return g;
}

void attend_one(const Work& work, const Cache& cache) {
  const int64_t heads = work.sizes.kv_heads, blocks = ceil_div(work.call.keys(), kFloatKeys);
  // kernel(args of a key head, its first block, its last block) for the blocks of a share.
  const auto for_blocks = [&](const Share& share, const auto& kernel) {
    for (int64_t from = share.begin(heads * blocks), to = share.end(heads * blocks); from < to;) {
      const int64_t head = from / blocks, block = from % blocks, last = std::min(blocks, block + to - from);
      kernel(args_of_key_head(work, cache, head), block, last);
      from += last - block;
    }
  };
  for_shares(work.threads, work.parallel, [&](const Share& share) {
    for_blocks(share, [&](const FloatAttentionArgs& g, int64_t block0, int64_t block1) {
      constexpr int64_t kTiles = kFloatKeys / kFloatTile;
      work.table.pack_float_keys(g, block0 * kTiles, std::min(g.tiles(), block1 * kTiles));
      work.table.float_scores(g, block0, block1);
    });
  });
  for_shares(work.threads, work.parallel, [&](const Share& share) { for_blocks(share, work.table.float_sums); });
  for (int64_t head = 0; head < heads; ++head) work.table.float_output(args_of_key_head(work, cache, head));
}

void attend_many(const Work& work, const Cache& cache) {
  const Sizes& sizes = work.sizes;
  const int64_t tokens = work.call.tokens, d = sizes.head_dim, all = work.call.keys();
  const int64_t blocks = ceil_div(tokens, kTokens), bytes = FloatMemory(kTokens, all, d, nullptr).bytes;
  for_shares(work.threads, work.parallel, [&](const Share& share) {
    const FloatMemory memory(kTokens, all, d, work.attention + share.index * bytes);
    int64_t packed_head = -1;
    const int64_t last = share.end(sizes.heads * blocks);
    for (int64_t unit = share.begin(sizes.heads * blocks); unit < last; ++unit) {
      const int64_t head = unit / blocks, token = unit % blocks * kTokens, key_head = head / heads_per_key(sizes);
      FloatAttentionArgs g = float_args(work, cache, key_head);
      memory.give(g);
      g.q_stride = g.out_stride = sizes.q_width();
      g.rows = std::min(kTokens, tokens - token);
      g.first = work.call.position + token + 1;
      g.step = 1;
      g.q = work.query + token * g.q_stride + head * d;
      g.out = work.mixed + token * g.out_stride + head * d;
      if (packed_head != key_head) {  // all keys that a later unit of this share can read
        FloatAttentionArgs whole = g;
        whole.first = all;
        whole.step = 0;
        work.table.pack_float_keys(whole, 0, whole.tiles());
        packed_head = key_head;
      }
      work.table.float_scores(g, 0, g.blocks());
      work.table.float_sums(g, 0, g.blocks());
      work.table.float_output(g);
    }
  });
}

// ---------------------------------------------------------------- quantized cache

tq_heads heads_of(const Rows& rows) { return {rows.data, 0, rows.head_stride, rows.token_stride}; }

tq_status quantize_rows(const Work& work, float* x, const Rows& to, int64_t first, const tq_kv_shape& shape) {
  tq_kv_rows_call c{};
  c.x = x;
  c.type = TQ_F32;
  c.outer = work.call.tokens;
  c.inner = work.sizes.kv_heads;
  c.outer_stride = work.sizes.kv_width();
  c.inner_stride = work.sizes.head_dim;
  c.rows = to.data + first * to.token_stride;
  c.rows_outer_stride = to.token_stride;
  c.rows_inner_stride = to.head_stride;
  c.shape = shape;
  return tq_quantize_kv(&c, work.parallel);
}

tq_status attend_quantized(const Work& work, const Cache& cache) {
  const Sizes& sizes = work.sizes;
  const Call& call = work.call;
  tq_cached_attention_call c{};
  c.type = TQ_F32;
  c.batch = 1;
  c.heads = sizes.heads;
  c.key_heads = sizes.kv_heads;
  c.scale_in_powers_of_2 = sizes.scale_in_powers_of_2;
  c.parts[0] = {heads_of(cache.key), heads_of(cache.value), call.position, call.shape, call.shape};
  c.parts[1] = {heads_of(cache.recent_key), heads_of(cache.recent_value), call.recent, call.recent_shape,
                call.recent_shape};
  tq_kv_part& newest = c.parts[call.has_recent ? 1 : 0];
  const int64_t before = newest.keys, old = call.keys() - call.tokens;
  for (int64_t first = 0; first < call.tokens; first += kMaskedTokens) {
    c.queries = std::min(kMaskedTokens, call.tokens - first);
    newest.keys = before + first + c.queries;
    const int64_t keys = old + first + c.queries;
    c.query = {work.query + first * sizes.q_width(), 0, sizes.head_dim, sizes.q_width()};
    c.out = work.mixed + first * sizes.q_width();
    if (c.queries > 1) {
      for (int64_t i = 0; i < c.queries; ++i) {
        uint8_t* row = work.attention + i * keys;
        std::memset(row, 1, static_cast<size_t>(keys - c.queries + i + 1));
        std::memset(row + keys - c.queries + i + 1, 0, static_cast<size_t>(c.queries - i - 1));
      }
      c.mask = {work.attention, 0, 0, keys};
    }
    c.mask_type = c.queries > 1 ? TQ_BOOL_MASK : TQ_NO_MASK;
    const tq_status status = tq_cached_attention(&c, work.parallel);
    if (status != TQ_OK) return status;
  }
  return TQ_OK;
}

// ---------------------------------------------------------------- both

RotateArgs rotate_args(const Work& work, const float* x, int64_t heads) {
  RotateArgs r{};
  r.x = x;
  r.cos = work.call.cos;
  r.sin = work.call.sin;
  r.heads = heads;
  r.d = work.sizes.head_dim;
  r.x_head_stride = r.out_head_stride = r.d;
  r.x_stride = r.out_stride = heads * r.d;
  r.table_stride = r.width = work.call.turned;
  return r;
}

void copy_rows(const Work& work, const float* x, const Rows& to, int64_t m0, int64_t m1) {
  const int64_t d = work.sizes.head_dim;
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t head = 0; head < work.sizes.kv_heads; ++head)
      std::memcpy(to.data + head * to.head_stride + (work.call.position + m) * to.token_stride,
                  x + (m * work.sizes.kv_heads + head) * d, static_cast<size_t>(d) * 4);
}

}  // namespace

int64_t attention_bytes(const Sizes& sizes, const Call& call, int64_t threads) {
  const int64_t keys = call.keys();
  if (!call.is_float) return call.tokens > 1 ? std::min(kMaskedTokens, call.tokens) * keys : 0;
  if (call.tokens == 1) return sizes.kv_heads * FloatMemory(heads_per_key(sizes), keys, sizes.head_dim, nullptr).bytes;
  return threads * FloatMemory(kTokens, keys, sizes.head_dim, nullptr).bytes;
}

tq_status attend(const Work& work, const Cache& cache) {
  const Call& call = work.call;
  RotateArgs q = rotate_args(work, work.query, work.sizes.heads), k = rotate_args(work, work.key, work.sizes.kv_heads);
  q.out = work.query;
  k.out = work.key;
  if (call.is_float) {
    k.out = floats(cache.key.data + call.position * cache.key.token_stride);
    k.out_stride = cache.key.token_stride / 4;
    k.out_head_stride = cache.key.head_stride / 4;
  }
  const int64_t width = work.sizes.q_width() + 2 * work.sizes.kv_width();
  parallel_for(work.parallel, 0, call.tokens, std::max<int64_t>(1, kElementsOfAThread / width),
               [&](int64_t m0, int64_t m1) {
                 work.table.rotate_heads(q, m0, m1);
                 work.table.rotate_heads(k, m0, m1);
                 if (call.is_float) copy_rows(work, work.value, cache.value, m0, m1);
               });
  if (call.is_float) {
    if (call.tokens == 1) attend_one(work, cache);
    else attend_many(work, cache);
    return TQ_OK;
  }
  const int64_t first = call.has_recent ? call.recent : call.position;
  const tq_kv_shape& shape = call.has_recent ? call.recent_shape : call.shape;
  tq_status status = quantize_rows(work, work.key, call.has_recent ? cache.recent_key : cache.key, first, shape);
  if (status == TQ_OK)
    status = quantize_rows(work, work.value, call.has_recent ? cache.recent_value : cache.value, first, shape);
  return status == TQ_OK ? attend_quantized(work, cache) : status;
}

}  // namespace torchquant::decoder
