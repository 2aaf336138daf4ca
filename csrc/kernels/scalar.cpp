// The path of every processor that has no file of its own: plain C++, and on x86-64 the pair products of its SSE2
// baseline.
#include <cmath>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernels/kernel_table.h"

namespace torchquant {
namespace scalar {
#include "vec_scalar.inc"

#if defined(__SSE2__)
// x86-64 without AVX2. SSE2 belongs to the processor's baseline, and its pmaddwd multiplies eight 16-bit values and
// adds them in pairs; compilers do not use it for the loop below. Of four bytes in a 32-bit lane, shifts make the even
// ones (k0, k2) and the odd ones (k1, k3), sign-extended to 16 bits, for the weights once for all rows:
//   w: b3 b2 b1 b0   even: (b2, b0) = shift left by 8, then right by 8     odd: (b3, b1) = shift right by 8
// Every product and every sum of two fits 32 bits.
constexpr int kRows = 3, kTiles = 1, kFewTiles = 1, kFourRowTiles = 1;

TQ_INLINE __m128i even_bytes(__m128i v) { return _mm_srai_epi16(_mm_slli_epi16(v, 8), 8); }
TQ_INLINE __m128i odd_bytes(__m128i v) { return _mm_srai_epi16(v, 8); }

// Half a weight tile: 8 columns, two registers of sums for each row.
template <int R>
TQ_INLINE void micro_half(const uint8_t* a, int64_t step, const int8_t* b, int64_t quads, int32_t* acc, int64_t ld,
                          bool resume) {
  __m128i c[R][2];
  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    TQ_UNROLL
    for (int h = 0; h < 2; ++h)
      c[r][h] = resume ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(acc + r * ld + h * 4)) : _mm_setzero_si128();
  }
  for (int64_t g = 0; g < quads; ++g) {
    __m128i even[2], odd[2];
    TQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + g * kTileN * kQuadK + h * 16));
      even[h] = even_bytes(w);
      odd[h] = odd_bytes(w);
    }
    const uint8_t* x = a + g / 16 * step + g % 16 * kQuadK;
    TQ_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t four;
      __builtin_memcpy(&four, x + r * kAlignK, 4);
      const __m128i all = _mm_set1_epi32(four), x_even = even_bytes(all), x_odd = odd_bytes(all);
      TQ_UNROLL
      for (int h = 0; h < 2; ++h)
        c[r][h] = _mm_add_epi32(c[r][h], _mm_add_epi32(_mm_madd_epi16(x_even, even[h]), _mm_madd_epi16(x_odd, odd[h])));
    }
  }
  TQ_UNROLL
  for (int r = 0; r < R; ++r) {
    TQ_UNROLL
    for (int h = 0; h < 2; ++h) _mm_storeu_si128(reinterpret_cast<__m128i*>(acc + r * ld + h * 4), c[r][h]);
  }
}

template <int R, int T>
static void micro(const uint8_t* a, int64_t step, const int8_t* b, int64_t tile_stride, int64_t quads, int32_t* acc,
                  bool resume, bool /*minus_128*/) {
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < 2; ++h)
      micro_half<R>(a, step, b + t * tile_stride + h * 32, quads, acc + t * kTileN + h * 8, T * kTileN, resume);
}
#else
constexpr int kRows = 4, kTiles = 1, kFewTiles = 1, kFourRowTiles = 1;

// Signed panel. Four products a lane; the inner loops have fixed bounds, so that any compiler can vectorize them.
template <int R, int T>
static void micro(const uint8_t* a, int64_t step, const int8_t* b, int64_t tile_stride, int64_t quads, int32_t* acc,
                  bool resume, bool /*minus_128*/) {
  for (int t = 0; t < T; ++t) {
    int32_t c[R][kTileN] = {};
    const int8_t* w = b + t * tile_stride;
    for (int64_t g = 0; g < quads; ++g, w += kTileN * kQuadK) {
      for (int r = 0; r < R; ++r) {
        const int8_t* x = reinterpret_cast<const int8_t*>(a) + g / 16 * step + r * kAlignK + g % 16 * kQuadK;
        const int32_t x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
        for (int j = 0; j < kTileN; ++j)
          c[r][j] = add_i(c[r][j], x0 * w[4 * j] + x1 * w[4 * j + 1] + x2 * w[4 * j + 2] + x3 * w[4 * j + 3]);
      }
    }
    for (int r = 0; r < R; ++r) {
      int32_t* out = acc + (r * T + t) * kTileN;
      for (int j = 0; j < kTileN; ++j) out[j] = resume ? add_i(out[j], c[r][j]) : c[r][j];
    }
  }
}
#endif

#define TQ_DEPTHWISE "depthwise_scalar.inc"
#include "all.inc"

static constexpr KernelTable make_table() {
  KernelTable table = all_kernels();
  table.name = "scalar";
  table.panel_offset = 0;
  table.panel_rows = kRows;
  table.row_block = kRows;
  table.tile_block = kTiles;
  table.products_per_ns = 20.0f;
  return table;
}
}  // namespace scalar

const KernelTable& scalar_kernels() {
  static constexpr KernelTable table = scalar::make_table();
  static_assert(is_complete(table));
  return table;
}
}  // namespace torchquant
