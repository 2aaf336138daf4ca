// What the file of an instruction set exports: one constant table of function pointers. No torch header.
//
// The list of kernels is written once, as the macro below. The fields of the table, the assignment of each kernel to
// the field of its own name (all.inc) and the tests that look for an empty field are all made from it: two kernels of
// one signature cannot change places, and a kernel that an instruction set lacks does not compile.
#pragma once

#include <cstdint>

#include "kernels/activations.h"
#include "kernels/affine.h"
#include "kernels/attention.h"
#include "kernels/attention_float.h"
#include "kernels/conv.h"
#include "kernels/depthwise.h"
#include "kernels/embedding.h"
#include "kernels/fake_quantize.h"
#include "kernels/image.h"
#include "kernels/intx.h"
#include "kernels/intx_float.h"
#include "kernels/kv_cache.h"
#include "kernels/linear.h"
#include "kernels/norms.h"
#include "kernels/qat.h"
#include "kernels/qat_intx.h"
#include "kernels/target.h"

namespace torchquant {

// KERNEL(name, parameters ...). Rows [m0, m1), weight tiles [tile0, tile1), queries [q0, q1) of at most kQueryBlock.
// pack_attention writes keys and values into the scratch memory that attend reads.
#define TQ_KERNELS(KERNEL)                                                                       \
  KERNEL(quantize_rows, const QuantizeRowsArgs&, int64_t m0, int64_t m1)                         \
  KERNEL(copy_rows, const CopyRowsArgs&, int64_t m0, int64_t m1)                                 \
  KERNEL(quantize_pack, const QuantizePackArgs&, int64_t tile0, int64_t tile1)                   \
  KERNEL(gemm, const GemmArgs&, int64_t m0, int64_t m1, int64_t tile0, int64_t tile1)            \
  KERNEL(gather_rows, const GatherArgs&, int64_t m0, int64_t m1)                                 \
  KERNEL(quantize_pack_intx, const QuantizePackIntxArgs&, int64_t tile0, int64_t tile1)          \
  KERNEL(intx_rows, const IntxRowsArgs&, int64_t m0, int64_t m1)                                 \
  KERNEL(intx_gemm, const IntxArgs&, int64_t m0, int64_t m1, int64_t tile0, int64_t tile1)       \
  KERNEL(float_rows, const FloatRowsArgs&, int64_t block0, int64_t block1)                       \
  KERNEL(intx_float, const IntxFloatArgs&, int64_t m0, int64_t m1, int64_t tile0, int64_t tile1) \
  KERNEL(embedding_rows, const EmbeddingArgs&, int64_t first, int64_t last)                      \
  KERNEL(embedding_bags, const EmbeddingArgs&, int64_t first, int64_t last)                      \
  KERNEL(quantize_span, const SpanArgs&)                                                         \
  KERNEL(dequantize_span, const SpanArgs&)                                                       \
  KERNEL(activate_span, const ActivationArgs&)                                                   \
  KERNEL(quantize_pixels, const ImageConvertArgs&)                                               \
  KERNEL(dequantize_pixels, const ImageConvertArgs&)                                             \
  KERNEL(combine_pixels, const ImageCombineArgs&)                                                \
  KERNEL(map_pixels, const ImageMapArgs&)                                                        \
  KERNEL(blend_pixels, const ImageBlendArgs&)                                                    \
  KERNEL(pick_channels, const ImageChannelsArgs&)                                                \
  KERNEL(max_pool_row, const ImagePoolArgs&)                                                     \
  KERNEL(average_pool_row, const ImagePoolArgs&)                                                 \
  KERNEL(average_floats_row, const ImagePoolArgs&)                                               \
  KERNEL(depthwise, const DepthwiseArgs&, int64_t block, int64_t row0, int64_t row1)             \
  KERNEL(normalize_rows, const NormArgs&, int64_t m0, int64_t m1)                                \
  KERNEL(pack_attention, const AttentionArgs&)                                                   \
  KERNEL(attend, const AttentionArgs&, int64_t q0, int64_t q1)                                   \
  KERNEL(fake_quantize_span, const FakeQuantizeArgs&)                                            \
  KERNEL(learned_backward_span, const LearnedBackwardArgs&)                                      \
  KERNEL(mask_span, const MaskArgs&)                                                             \
  KERNEL(positive_span, const MaskArgs&)                                                         \
  KERNEL(minmax_span, const MinMaxArgs&)                                                         \
  KERNEL(quantize_kv, const KvRowsArgs&, int64_t r0, int64_t r1)                                 \
  KERNEL(dequantize_kv, const KvRowsArgs&, int64_t r0, int64_t r1)                               \
  KERNEL(kv_scores, const CachedArgs&, int64_t block0, int64_t block1)                           \
  KERNEL(kv_sums, const CachedArgs&, int64_t block0, int64_t block1)                             \
  KERNEL(kv_output, const CachedArgs&)                                                           \
  KERNEL(pack_float_keys, const FloatAttentionArgs&, int64_t tile0, int64_t tile1)               \
  KERNEL(float_scores, const FloatAttentionArgs&, int64_t block0, int64_t block1)                \
  KERNEL(float_sums, const FloatAttentionArgs&, int64_t block0, int64_t block1)                  \
  KERNEL(float_output, const FloatAttentionArgs&)                                                \
  KERNEL(rotate_heads, const RotateArgs&, int64_t m0, int64_t m1)

struct KernelTable {
  const char* name;
  int32_t panel_offset;  // 128: the panel is read unsigned; 0: signed
  int64_t panel_rows;    // rows of a panel's block, at most
  int64_t row_block;     // rows of a register tile (the unit in which threads share rows)
  int64_t tile_block;    // weight tiles of a register tile (the unit in which threads share columns)
  int64_t intx_panel_rows, intx_tile_block;    // the same of the product with weights of 2 to 8 bits
  int64_t float_panel_rows, float_tile_block;  // the same of float rows and such weights
  bool intx_cut;          // whether its panel is to be cut, or to have ones, where rows have zero points (IntxPanel)
  float products_per_ns;  // of one core in the middle of its range: decides when a second thread pays
  // The product with an int8 output, and the rows of its blocks by the number of weight tiles side by side, as they are
  // usually and at most; or null. fill_int8 writes its channels, and returns the greatest magnitude that a value can
  // have before it is divided by the output's scale, as the bits of a float: NaN is above all numbers.
  void (*gemm_int8)(const GemmArgs&, const Int8Channels&, int64_t m0, int64_t m1, int64_t tile0, int64_t tile1);
  int32_t (*fill_int8)(const Int8ChannelsArgs&);
  int64_t int8_rows[5], int8_most_rows[5];
#define TQ_FIELD(name, ...) void (*name)(__VA_ARGS__);
  TQ_KERNELS(TQ_FIELD)
#undef TQ_FIELD
};

// Whether every instruction set's own facts and every kernel are there.
constexpr bool is_complete(const KernelTable& t) {
  bool complete = t.name && t.panel_rows > 0 && t.row_block > 0 && t.tile_block > 0 && t.products_per_ns > 0 &&
                  t.intx_panel_rows > 0 && t.intx_tile_block > 0 && t.float_panel_rows > 0 && t.float_tile_block > 0;
#define TQ_PRESENT(name, ...) complete = complete && t.name;
  TQ_KERNELS(TQ_PRESENT)
#undef TQ_PRESENT
  return complete;
}

}  // namespace torchquant
