// AVX2 without saturation. vpmaddubsw(unsigned, signed) adds two products in 16 bits and saturates; with |a| as the
// unsigned side and sign(w, a) as the signed one, |a| <= 128 and |w| <= 127 give at most 2 * 128 * 127 = 32,512: exact.
// A weight of -128 breaks it (vpsignb(-128) stays -128): tiles that contain one (the flag in int8_tiles.h) take the
// widening path, vpmovsxbw and vpmaddwd, exact for all bytes.
#include "kernels/kernel_table.h"

#if defined(TQ_X86)
#include <immintrin.h>

#include <cmath>

TQ_TARGET_BEGIN("avx2,fma,f16c")
namespace torchquant {
namespace avx2 {
#include "vec_avx2.inc"
#include "linear_avx2.inc"
#define TQ_INTX_GEMM
constexpr int kIntxRows = 4, kIntxTiles = 1;
constexpr bool kIntxCut = false;
static void intx_gemm(const IntxArgs& g, int64_t m0, int64_t m1, int64_t tile0, int64_t tile1);

constexpr int kRows = 4, kTiles = 1, kFewTiles = 2, kFourRowTiles = 1;

template <int R, int T>
TQ_INLINE void micro_quads(const uint8_t* a, const int8_t* b, int64_t tile_stride, int64_t quads,
                           __m256i (&c)[R][2 * T]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t g = 0; g < quads; ++g, a += kQuadK, b += kTileN * kQuadK) {
    __m256i w[2 * T];
    TQ_UNROLL
    for (int t = 0; t < 2 * T; ++t)
      w[t] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + (t / 2) * tile_stride + (t % 2) * 32));
    TQ_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a + r * kAlignK, 4);
      const __m256i x = _mm256_set1_epi32(four), magnitude = _mm256_abs_epi8(x);
      TQ_UNROLL
      for (int t = 0; t < 2 * T; ++t) {
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(w[t], x));
        c[r][t] = _mm256_add_epi32(c[r][t], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
}

template <int R, int T>
TQ_INLINE void micro_sign(const uint8_t* a, int64_t step, const int8_t* b, int64_t tile_stride, int64_t quads,
                          int32_t* acc, bool resume) {
  __m256i c[R][2 * T];
  load_sums<R, T>(acc, resume, c);
  for (; quads >= 16; quads -= 16, a += step, b += kAlignK * kTileN) micro_quads<R, T>(a, b, tile_stride, 16, c);
  micro_quads<R, T>(a, b, tile_stride, quads, c);
  store_sums<R, T>(acc, c);
}

// One row, one tile: c[q] holds the sums of (k0, k1) and of (k2, k3) for 4 columns.
TQ_INLINE void micro_widen(const uint8_t* a, int64_t step, const int8_t* b, int64_t quads, int32_t* acc, bool resume) {
  __m256i c[4];
  TQ_UNROLL
  for (int q = 0; q < 4; ++q) c[q] = _mm256_setzero_si256();
  for (int64_t g = 0; g < quads; ++g) {
    int32_t four;
    __builtin_memcpy(&four, a + g / 16 * step + g % 16 * kQuadK, 4);
    const __m256i x = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
    TQ_UNROLL
    for (int q = 0; q < 4; ++q) {
      const __m256i w = _mm256_cvtepi8_epi16(load_128(b + g * 64 + q * 16));
      c[q] = _mm256_add_epi32(c[q], _mm256_madd_epi16(x, w));
    }
  }
  TQ_UNROLL
  for (int h = 0; h < 2; ++h) {  // hadd interleaves the 128-bit halves; the permutation restores column order
    __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(c[2 * h], c[2 * h + 1]), 0xd8);
    __m256i* out = reinterpret_cast<__m256i*>(acc + h * 8);
    if (resume) sums = _mm256_add_epi32(sums, _mm256_load_si256(out));
    _mm256_store_si256(out, sums);
  }
}

template <int R, int T>
static void micro(const uint8_t* a, int64_t step, const int8_t* b, int64_t tile_stride, int64_t quads, int32_t* acc,
                  bool resume, bool minus_128) {
  if (!minus_128) return micro_sign<R, T>(a, step, b, tile_stride, quads, acc, resume);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      micro_widen(a + r * kAlignK, step, b + t * tile_stride, quads, acc + (r * T + t) * kTileN, resume);
}

// A lane of the depthwise convolution: the four bytes of a quad as two pairs of 16-bit numbers, exact for all bytes.
constexpr int kFlip = 0, kParts = 2, kPixels = 4;
TQ_INLINE void split(I quads, I (&parts)[2]) {
  parts[0] = _mm256_srai_epi16(_mm256_slli_epi16(quads, 8), 8);
  parts[1] = _mm256_srai_epi16(quads, 8);
}
TQ_INLINE I dot(I sums, const I (&x)[2], const I (&w)[2]) {
  return _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(x[0], w[0]), _mm256_madd_epi16(x[1], w[1])));
}
#define TQ_DEPTHWISE "depthwise_256.inc"
#include "all.inc"
#include "intx_avx2.inc"

static constexpr KernelTable make_table() {
  KernelTable table = all_kernels();
  table.name = "avx2";
  table.panel_offset = 0;
  table.panel_rows = kRows;
  table.row_block = kRows;
  table.tile_block = kTiles;
  table.products_per_ns = 60.0f;
  return table;
}
}  // namespace avx2

const KernelTable& avx2_kernels() {
  static constexpr KernelTable table = avx2::make_table();
  static_assert(is_complete(table));
  return table;
}
}  // namespace torchquant
TQ_TARGET_END
#endif
