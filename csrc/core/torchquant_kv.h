/* Key/value caches of 8 and 4 bits, in the core's interface (torchquant_core.h): rows, and attention to them. */
#ifndef TORCHQUANT_KV_H
#define TORCHQUANT_KV_H

#include "torchquant_core.h"

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* Rows of d channels in `bits` (4 or 8), one scale for each group of `group` channels: a multiple of 16, or d; at most
 * 256. d <= 1024, even for 4 bits. A row has tq_kv_row_bytes bytes (formats/kv_rows.h). */
typedef struct tq_kv_shape {
  int64_t d, bits, group;
} tq_kv_shape;

int64_t tq_kv_row_bytes(const tq_kv_shape* shape);

/* Float rows [outer, inner, d], of which a row is contiguous, and rows of a cache; strides in elements and in bytes. */
typedef struct tq_kv_rows_call {
  void* x; /* only read by tq_quantize_kv */
  tq_type type;
  int64_t outer, inner, outer_stride, inner_stride;
  uint8_t* rows; /* only read by tq_dequantize_kv */
  int64_t rows_outer_stride, rows_inner_stride;
  tq_kv_shape shape;
} tq_kv_rows_call;

tq_status tq_quantize_kv(const tq_kv_rows_call* call, const tq_parallel* parallel);
tq_status tq_dequantize_kv(const tq_kv_rows_call* call, const tq_parallel* parallel);

/* Some tokens of a cache: uint8 [batch, key_heads, keys, row bytes], strides in bytes. */
typedef struct tq_kv_part {
  tq_heads key, value;
  int64_t keys;
  tq_kv_shape key_shape, value_shape;
} tq_kv_part;

/* As tq_attention, on the rows of a cache in two parts, of which one may be empty. */
typedef struct tq_cached_attention_call {
  tq_type type; /* of query and out; a float type */
  tq_heads query;
  tq_heads mask; /* [batch, heads, queries, keys of both parts] */
  tq_mask_type mask_type;
  int64_t batch, heads, key_heads, queries;
  tq_kv_part parts[2];
  float scale_in_powers_of_2; /* scale * log2(e) */
  void* out;                  /* [batch, queries, heads, channels of a value], contiguous */
} tq_cached_attention_call;

tq_status tq_cached_attention(const tq_cached_attention_call* call, const tq_parallel* parallel);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif
