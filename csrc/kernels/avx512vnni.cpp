// AVX512-VNNI: vpdpbusd, 64 products an instruction, exact.
#include "kernels/kernel_table.h"

#if defined(TQ_X86)
#include <immintrin.h>

#include <cmath>

TQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace torchquant {
namespace avx512vnni {
#include "vec_avx512.inc"
#include "linear_avx512.inc"
#include "intx_avx512.inc"
#include "attention_avx512.inc"
#include "kv_cache_avx512.inc"
#define TQ_DEPTHWISE "depthwise_avx512.inc"
#include "all.inc"
#include "conv_gather_avx512.inc"
#include "conv_avx512.inc"
#include "intx_rests_avx512.inc"
#include "intx_row_avx512.inc"
#include "intx_tile_avx512.inc"

static constexpr KernelTable make_table() {
  KernelTable table = all_kernels();
  table.name = "avx512_vnni";
  table.panel_offset = 128;
  table.panel_rows = kRows;
  table.row_block = kRows;
  table.tile_block = kTiles;
  table.products_per_ns = 300.0f;
  table.gather_rows = gather_rows_512;
  table.gemm_int8 = gemm_int8;
  table.fill_int8 = fill_int8;
  for (int t = 0; t < 5; ++t) {
    table.int8_rows[t] = kInt8Rows[t];
    table.int8_most_rows[t] = kInt8MostRows[t];
  }
  return table;
}
}  // namespace avx512vnni

const KernelTable& avx512vnni_kernels() {
  static constexpr KernelTable table = avx512vnni::make_table();
  static_assert(is_complete(table));
  return table;
}
}  // namespace torchquant
TQ_TARGET_END
#endif
