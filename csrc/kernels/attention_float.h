// Attention of one head in fp32, and the rotation of queries and keys.
//
// Rows are queries, of one head or of heads that share their keys. The sums over keys are taken in blocks of kFloatKeys
// keys, counted from key 0, and the blocks are added in ascending order: no result depends on the number of keys that
// other rows attend to, or on who computes which block.
//
//   score[j]  = fmaf over the channels ascending, from 0
//   weight[j] = 2^(fl(score[j] * scale) - the greatest fl(score * scale) of the row)     (exp2_weight of attention.inc)
//   sum[b]    = weights of block b in 16 lanes: key j in lane j mod 16, each lane ascending; then 8, 4, 2, 1 apart
//   y[b][c]   = fmaf over the keys of block b ascending, from 0
//   out[c]    = (y[0][c] + y[1][c] + ...) * (1 / (sum[0] + sum[1] + ...)), each from 0, ascending
#pragma once

#include <cstdint>

#include "formats/int8_tiles.h"
#include "kernels/types.h"

namespace torchquant {

inline constexpr int64_t kFloatKeys = 64;  // keys of a block
inline constexpr int64_t kFloatTile = 16;  // keys of a tile, side by side in `packed`

struct FloatAttentionArgs {
  const float* q;  // [rows, d], [keys, d], [keys, d]; rows a stride apart, contiguous within a row
  const float* k;
  const float* v;
  float* out;  // [rows, d]
  int64_t q_stride, k_stride, v_stride, out_stride;
  int64_t rows, d;
  int64_t first, step;  // row r attends to the keys 0 .. first + r * step - 1; step is 0 or 1
  float scale;          // of the scores, times log2(e)
  float* packed;        // [tiles, d, 16]
  float* scores;        // [rows, score_stride], later the weights
  float* tops;          // [blocks, rows]
  float* sums;          // [blocks, rows]
  float* y;             // [blocks, rows, padded_d()]
  int64_t score_stride;

  int64_t keys_of(int64_t r) const { return first + r * step; }
  int64_t keys() const { return keys_of(rows - 1); }
  int64_t tiles() const { return ceil_div(keys(), kFloatTile); }
  int64_t blocks() const { return ceil_div(keys(), kFloatKeys); }
  int64_t padded_d() const { return ceil_div(d, kFloatTile) * kFloatTile; }
};

// Rows of [heads, d], a stride apart: out = fl(fl(x * cos) + fl(turned(x) * sin)) where `turned` exchanges the halves of
// the first `width` channels and negates the first half. Channels behind are copied. x may be out.
struct RotateArgs {
  const float* x;
  const float* cos;  // [rows, width]
  const float* sin;
  float* out;
  int64_t x_stride, x_head_stride, out_stride, out_head_stride, table_stride;
  int64_t heads, d, width;
};

}  // namespace torchquant
