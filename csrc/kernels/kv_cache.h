// Arguments of the kernels of key/value caches (formats/kv_rows.h, functional/kv_cache.py).
#pragma once

#include <cstdint>

#include "formats/kv_rows.h"
#include "kernels/attention.h"
#include "kernels/types.h"

namespace torchquant {

// Rows of a tensor [outer, inner, d], a stride apart, to contiguous rows of a cache, or the reverse.
struct KvRowsArgs {
  void* x;  // only read when quantized
  FloatType type;
  int64_t inner, outer_stride, inner_stride;     // in elements: row i is (i / inner, i % inner)
  uint8_t* rows;                                 // only read when dequantized
  int64_t rows_outer_stride, rows_inner_stride;  // in bytes
  KvShape shape;
};

struct KvSide {  // keys or values of one head
  const uint8_t* rows;
  int64_t stride;  // bytes
  KvShape shape;
};

// A cache has two parts: the tokens before the recent ones, and the recent ones.
struct KvPart {
  KvSide key, value;
  int64_t keys;

  int64_t blocks() const { return ceil_div(keys, kKvBlock); }
};

struct KvPlace {  // of a block of keys
  const KvPart& part;
  int64_t first, n;  // keys of the part
  int64_t key;       // of both parts together
};

inline constexpr int64_t kKvRows = 8;  // queries that share the integers of keys and values, at most

// The queries that attend to one head of keys and values: rows (h, i) for the heads that share it. A block of keys is
// scored by kv_scores, then weighed by kv_sums; kv_output adds the blocks. A block belongs to one part.
struct CachedArgs {
  const void* q;
  const void* mask;  // [heads, queries, keys]: bool or fp32
  void* out;
  int64_t q_head_stride, q_stride, mask_head_stride, mask_stride, out_head_stride, out_stride;  // in elements
  int64_t heads, queries;
  KvPart parts[2];
  FloatType type;
  MaskType mask_type;
  float scale;  // of the scores, times log2(e)

  // Scratch. rows = heads * queries; groups: of values, the most of both parts.
  float* scores;  // [rows, score_stride], kKvBlock for each block; later the weights
  int64_t score_stride, groups;
  float* tops;   // [blocks, rows]
  float* sums;   // [blocks, rows]
  float* steps;  // [blocks, rows, groups]
  float* zeros;  // [blocks, rows, groups]
  int32_t* acc;  // [blocks, rows, dv]

  int64_t rows() const { return heads * queries; }
  int64_t blocks() const { return parts[0].blocks() + parts[1].blocks(); }
  int64_t d() const { return parts[0].key.shape.d; }
  int64_t dv() const { return parts[0].value.shape.d; }

  KvPlace place(int64_t block) const {
    const int64_t old = parts[0].blocks(), first = (block < old ? block : block - old) * kKvBlock;
    const KvPart& part = parts[block < old ? 0 : 1];
    const int64_t n = part.keys - first < kKvBlock ? part.keys - first : kKvBlock;
    return {part, first, n, first + (block < old ? 0 : parts[0].keys)};
  }
};

}  // namespace torchquant
