/* Linear layers with weights of 2 to 8 bits: the part of the C interface (torchquant_core.h) about them. */
#ifndef TORCHQUANT_INTX_H
#define TORCHQUANT_INTX_H

#include "torchquant_core.h"

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* [n, k] with one scale for each output, or for each group of `group_size` inputs (the last group may be shorter).
 * 1 <= n < 2^31, 1 <= k <= 2^23; a scale has at most 65,793 inputs, or 33,025 at 8 bits. */
typedef struct tq_intx_shape {
  int64_t n, k, bits;
  int64_t group_size; /* 0: per output */
  bool has_zero_point;
} tq_intx_shape;

/* The packed form (formats/intx_tiles.h): tq_tiles(n) runs of tq_intx_tile_bytes bytes, aligned to 64. The canonical
 * tensors are contiguous: weight [n, k], scale and zero_point (null unless has_zero_point) [n, groups]. */
int64_t tq_intx_tile_bytes(const tq_intx_shape* shape);
tq_status tq_pack_intx(const int8_t* weight, const float* scale, const int8_t* zero_point, const tq_intx_shape* shape,
                       uint8_t* packed, const tq_parallel* parallel);
tq_status tq_unpack_intx(const uint8_t* packed, const tq_intx_shape* shape, int8_t* weight, float* scale,
                         int8_t* zero_point, const tq_parallel* parallel);

/* A float weight [n, k] to the packed form. TQ_STATIC: `scale` holds the scales, zero points are 0. `scale` and
 * `zero_point` [n, groups] are written: a group with NaN gets scale NaN and integers of 0. qmin and qmax are integers of
 * shape.bits bits. */
tq_status tq_quantize_pack_intx(const tq_rows* weight, tq_row_mode mode, int32_t qmin, int32_t qmax,
                                const tq_intx_shape* shape, uint8_t* packed, float* scale, int8_t* zero_point,
                                const tq_parallel* parallel);

/* A weight and what follows the product, rounded to out_type, a float type:
 * out[m, n] = activation((sum over groups of weight_scale[n, g] * sum over k of g of (q[m, k] - zero_point[m])
 *                        (W[n, k] - weight_zero_point[n, g])) * scale[m] + bias[n]) */
typedef struct tq_intx_part {
  tq_intx_shape shape;
  const uint8_t* packed;
  const float* bias; /* [n] or null */
  tq_activation activation;
  tq_type out_type;
  void* out; /* [m, n], out_stride elements from row to row */
  int64_t out_stride;
} tq_intx_part;

/* Float rows are quantized, as in tq_linear. */
tq_status tq_linear_intx(const tq_rows* rows, const tq_row_quantization* how, const tq_intx_part* part,
                         const tq_parallel* parallel);

/* Several layers on the same input, which is then quantized once: k and group_size of their shapes are the same. */
tq_status tq_linear_intx_parts(const tq_rows* rows, const tq_row_quantization* how, const tq_intx_part* parts,
                               int64_t count, const tq_parallel* parallel);

/* Float rows stay floats: out[m, n] = activation(sum over groups of weight_scale[n, g] * sum over k of g of x[m, k]
 * (W[n, k] - weight_zero_point[n, g]) + bias[n]) */
tq_status tq_linear_intx_float(const tq_rows* rows, const tq_intx_part* part, const tq_parallel* parallel);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif
