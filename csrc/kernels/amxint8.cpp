// AMX: tdpbusd multiplies a tile of 16 rows x 64 bytes with one of 16 x 64 into 16 x 16 int32, exact. The packed layout
// *is* its B operand: 16 quads of 64 bytes are one tile. One or two rows take the AVX512-VNNI micro-kernel: there the
// weights' stream is the limit, and a tile product costs the same for 1 row as for 16.
#include "kernels/kernel_table.h"

#if defined(TQ_X86)
#include <cpuid.h>
#include <immintrin.h>

#include <cmath>

TQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")
namespace torchquant {
const KernelTable& avx512vnni_kernels();

namespace amxint8 {
#define TQ_FLOAT_AS avx512vnni_kernels
#include "vec_avx512.inc"
#include "linear_avx512.inc"
#include "amx_tiles.inc"
#include "intx_avx512.inc"
#include "attention_avx512.inc"
#define TQ_ATTENTION_PRODUCTS "attention_amx.inc"
#define TQ_DEPTHWISE "depthwise_avx512.inc"
#include "all.inc"
#include "linear_amx.inc"
#include "conv_gather_avx512.inc"
#include "intx_few_avx512.inc"

static bool use_bf16() {
  static const bool found = has_bf16();
  return found;
}
static void pack_attention_any(const AttentionArgs& g) {
  return use_bf16() ? pack_attention(g) : avx512vnni_kernels().pack_attention(g);
}
static void attend_any(const AttentionArgs& g, int64_t q0, int64_t q1) {
  return use_bf16() ? attend(g, q0, q1) : avx512vnni_kernels().attend(g, q0, q1);
}

static constexpr KernelTable make_table() {
  KernelTable table = all_kernels();
  table.name = "amx_int8";
  table.panel_offset = 128;
  table.panel_rows = kTileRows;
  table.row_block = 2 * kTileRows;
  table.tile_block = kPairTiles;
  table.products_per_ns = 1600.0f;
  table.gemm = gemm_tiles_or_vectors;
  table.gather_rows = gather_rows_512;
  table.intx_gemm = intx_gemm_512;
  table.pack_attention = pack_attention_any;
  table.attend = attend_any;
  return table;
}
}  // namespace amxint8

const KernelTable& amxint8_kernels() {
  static constexpr KernelTable table = amxint8::make_table();
  static_assert(is_complete(table));
  return table;
}
}  // namespace torchquant
TQ_TARGET_END
#endif
