// Attention of one head: the arguments of its kernels, and the layout of their scratch memory.
//
// Products are bfloat16 x bfloat16 with sums in fp32, in the order in which AMX's tdpbf16ps adds (attention.inc), so
// that every instruction set gives the same bits. The right operands, keys and values, are packed once per head into
// tiles that are AMX's B operand and also serve vectors: 16 columns by 32 of the dimension that is summed over, pairs
// of which share a 32-bit lane:
//
//   keys:   tile (16 keys, 32 of d):      lane [d / 2][key]  = (k[key][d], k[key][d + 1])
//   values: tile (16 of dv, 32 keys):     lane [key / 2][dv] = (v[key][dv], v[key + 1][dv])
//
// with zeros beyond the end of a dimension. The tiles of 16 columns follow each other along the summed dimension.
#pragma once

#include <cstdint>

#include "formats/int8_tiles.h"
#include "kernels/types.h"

namespace torchquant {

// One head of attention: queries and the keys and values that they attend to.
enum class MaskType : int { kNone, kBool, kFloat };
struct AttentionArgs {
  const void* q;  // [queries, d], [keys, d], [keys, dv]; rows a stride apart, contiguous within a row
  const void* k;
  const void* v;
  const void* mask;  // [queries, keys]: bool (false: not attended to), or fp32 that is added to the scaled scores
  void* out;         // [queries, dv], of q's type
  int64_t q_stride, k_stride, v_stride, mask_stride, out_stride;
  int64_t queries, keys, d, dv;
  FloatType type;
  MaskType mask_type;
  float scale;      // of the scores, times log2(e)
  bool causal;      // query i attends to keys 0 .. i
  uint8_t* memory;  // attention.h
};

inline constexpr int64_t kQueryBlock = 32;  // queries that are computed together: two AMX tiles
inline constexpr int64_t kSumStep = 32;     // products of one tile instruction
inline constexpr int64_t kPackedTile = kTileN * kSumStep;

struct AttentionMemory {  // 64-byte aligned pieces; strides in elements
  uint16_t* keys;
  uint16_t* values;
  float* scores;  // [kQueryBlock, score_stride]
  uint16_t* weights;
  float* sums;     // [kQueryBlock, sum_stride]
  float* queries;  // [kQueryBlock, query_stride], fp32 or (AMX) bfloat16
  int64_t key_steps, value_steps, score_stride, weight_stride, query_stride, sum_stride, bytes;

  AttentionMemory(uint8_t* base, int64_t num_keys, int64_t d, int64_t dv) {
    const int64_t padded = ceil_div(num_keys, kSumStep) * kSumStep;
    key_steps = ceil_div(d, kSumStep);
    value_steps = padded / kSumStep;
    score_stride = padded + 16;  // one cache line more: rows of 4 KB would share their lines' places
    weight_stride = padded + 32;
    query_stride = key_steps * kSumStep + 16;
    sum_stride = ceil_div(dv, kTileN) * kTileN + 16;
    int64_t at = 0;
    const auto take = [&](int64_t count, int64_t size) {
      uint8_t* piece = base ? base + at : nullptr;
      at += ceil_div(count * size, 64) * 64;
      return piece;
    };
    keys = reinterpret_cast<uint16_t*>(take(padded * key_steps * kSumStep, 2));
    values = reinterpret_cast<uint16_t*>(take(padded * ceil_div(dv, kTileN) * kTileN, 2));
    scores = reinterpret_cast<float*>(take(kQueryBlock * score_stride, 4));
    weights = reinterpret_cast<uint16_t*>(take(kQueryBlock * weight_stride, 2));
    sums = reinterpret_cast<float*>(take(kQueryBlock * sum_stride, 4));
    queries = reinterpret_cast<float*>(take(kQueryBlock * query_stride, 4));
    bytes = at;
  }
};

}  // namespace torchquant
