/* Embeddings with weights of 2 to 8 bits: the part of the C interface (torchquant_core.h) about them. */
#ifndef TORCHQUANT_EMBEDDING_H
#define TORCHQUANT_EMBEDDING_H

#include "torchquant_intx.h"

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* out[i, k] = (W[index[i], k] - zero_point) * scale of a packed weight, rounded to out_type, a float type; [count, k].
 * 0 <= index < n. */
tq_status tq_embedding_intx(const uint8_t* packed, const tq_intx_shape* shape, const int64_t* index, int64_t count,
                            void* out, tq_type out_type, const tq_parallel* parallel);

typedef enum tq_bag_mode { TQ_BAG_SUM, TQ_BAG_MEAN, TQ_BAG_MAX } tq_bag_mode;

/* Bag b holds index[offset[b]] to index[offset[b + 1] - 1]. Its rows are added in this order, from 0, in float32. */
typedef struct tq_bags {
  const int64_t* index;
  const int64_t* offset; /* [bags + 1], ascending */
  int64_t bags;
  const float* weight; /* of each index, multiplied with its row; or null */
  tq_bag_mode mode;    /* a bag without rows is 0 */
  int64_t padding;     /* the index that counts as no row, or -1 */
} tq_bags;

/* out [bags, k] */
tq_status tq_embedding_bag_intx(const uint8_t* packed, const tq_intx_shape* shape, const tq_bags* bags, void* out,
                                tq_type out_type, const tq_parallel* parallel);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif
