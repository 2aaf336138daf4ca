// AVX-VNNI (VEX encoding, 256 bit): vpdpbusd on processors without AVX-512.
#include "kernels/kernel_table.h"

#if defined(TQ_X86)
#include <immintrin.h>

#include <cmath>

TQ_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
namespace torchquant {
const KernelTable& avx2_kernels();

namespace avxvnni {
#define TQ_FLOAT_AS avx2_kernels
#include "vec_avx2.inc"
#include "linear_avx2.inc"
#define TQ_INTX_GEMM
constexpr int kIntxRows = 6, kIntxTiles = 1;
constexpr bool kIntxCut = false;
static void intx_gemm(const IntxArgs& g, int64_t m0, int64_t m1, int64_t tile0, int64_t tile1);

constexpr int kRows = 6, kTiles = 1, kFewTiles = 2, kFourRowTiles = 1;

// A weight tile is two registers wide; 6 rows x 2 = 12 of the 16 registers accumulate.
template <int R, int T>
TQ_INLINE void micro_quads(const uint8_t* a, const int8_t* b, int64_t tile_stride, int64_t quads,
                           __m256i (&c)[R][2 * T]) {
  for (int64_t g = 0; g < quads; ++g, a += kQuadK, b += kTileN * kQuadK) {
    __m256i w[2 * T];
    TQ_UNROLL
    for (int t = 0; t < 2 * T; ++t)
      w[t] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + (t / 2) * tile_stride + (t % 2) * 32));
    TQ_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a + r * kAlignK, 4);
      const __m256i x = _mm256_set1_epi32(four);
      TQ_UNROLL
      for (int t = 0; t < 2 * T; ++t) c[r][t] = _mm256_dpbusd_avx_epi32(c[r][t], x, w[t]);
    }
  }
}

template <int R, int T>
static void micro(const uint8_t* a, int64_t step, const int8_t* b, int64_t tile_stride, int64_t quads, int32_t* acc,
                  bool resume, bool /*minus_128*/) {
  __m256i c[R][2 * T];
  load_sums<R, T>(acc, resume, c);
  for (; quads >= 16; quads -= 16, a += step, b += kAlignK * kTileN) micro_quads<R, T>(a, b, tile_stride, 16, c);
  micro_quads<R, T>(a, b, tile_stride, quads, c);
  store_sums<R, T>(acc, c);
}

// A lane of the depthwise convolution: four unsigned bytes times four signed ones.
constexpr int kFlip = 128, kParts = 1, kPixels = 4;
TQ_INLINE void split(I quads, I (&parts)[1]) { parts[0] = quads; }
TQ_INLINE I dot(I sums, const I (&x)[1], const I (&w)[1]) { return _mm256_dpbusd_avx_epi32(sums, x[0], w[0]); }
#define TQ_DEPTHWISE "depthwise_256.inc"
#include "all.inc"
#include "intx_avxvnni.inc"

static constexpr KernelTable make_table() {
  KernelTable table = all_kernels();
  table.name = "avx_vnni";
  table.panel_offset = 128;
  table.panel_rows = kRows;
  table.row_block = kRows;
  table.tile_block = kTiles;
  table.products_per_ns = 180.0f;
  return table;
}
}  // namespace avxvnni

const KernelTable& avxvnni_kernels() {
  static constexpr KernelTable table = avxvnni::make_table();
  static_assert(is_complete(table));
  return table;
}
}  // namespace torchquant
TQ_TARGET_END
#endif
