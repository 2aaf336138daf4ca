// AMX: tdpbusd multiplies a tile of 16 rows x 64 bytes with one of 16 x 64 into 16 x 16 int32, exact. The packed layout
// *is* its B operand: 16 groups of 64 bytes are one tile. One or two rows take the AVX512-VNNI micro-kernel: there the
// weights' stream is the limit, and a tile product costs the same for 1 row as for 16.
#include "kernel_table.h"

#if defined(TQ_X86)
#include <immintrin.h>

#include <cmath>

#include "layout.h"

TQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
namespace torchquant {
namespace amxint8 {
#include "vec_avx512.inc"
#include "quantize.inc"
#include "activation.inc"
#include "epilogue.inc"
#include "avx512_micro.inc"
#include "gemm.inc"

constexpr int64_t kVectorRows = 2;  // up to so many rows the vector micro-kernel is the faster one
constexpr int64_t kTileRows = 16, kBlockRows = 2 * kTileRows;

// Tiles 0-3 accumulate, 4 and 5 hold A (row tiles 0 and 1), 6 and 7 hold B.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};

// Not _tile_loadconfig: GCC's version declares a read of 8 bytes, and the optimiser then drops the other stores.
TQ_INLINE void load_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

TQ_INLINE void set_tile(TileConfig& config, int tile, int64_t rows) {
  config.rows[tile] = static_cast<uint8_t>(rows);
  config.colsb[tile] = 64;
}

// Two row tiles (rows0, rows1) by two weight tiles.
TQ_INLINE void configure_two(int64_t rows0, int64_t rows1) {
  TileConfig config;
  set_tile(config, 0, rows0);
  set_tile(config, 1, rows0);
  set_tile(config, 2, rows1);
  set_tile(config, 3, rows1);
  set_tile(config, 4, rows0);
  set_tile(config, 5, rows1);
  set_tile(config, 6, 16);
  set_tile(config, 7, 16);
  load_config(config);
}

// One row tile by up to four weight tiles.
TQ_INLINE void configure_one(int64_t rows) {
  TileConfig config;
  for (int t = 0; t < 5; ++t) set_tile(config, t, rows);
  for (int t = 5; t < 8; ++t) set_tile(config, t, 16);
  load_config(config);
}

template <int T>  // weight tiles side by side, 1 or 2
TQ_INLINE void two_row_tiles(const uint8_t* a, int64_t lda, const int8_t* b, int64_t stride, int64_t k64,
                             int32_t* acc) {
  const uint8_t* a1 = a + kTileRows * lda;
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (T == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < k64; k += 64) {
    _tile_loadd(6, b + k * 16, 64);
    _tile_loadd(4, a + k, lda);
    _tile_dpbusd(0, 4, 6);
    if constexpr (T == 2) {
      _tile_loadd(7, b + stride + k * 16, 64);
      _tile_dpbusd(1, 4, 7);
    }
    _tile_loadd(5, a1 + k, lda);
    _tile_dpbusd(2, 5, 6);
    if constexpr (T == 2) _tile_dpbusd(3, 5, 7);
  }
  constexpr int64_t ld = 2 * kTileN, row1 = kTileRows * ld;
  _tile_stored(0, acc, ld * 4);
  _tile_stored(2, acc + row1, ld * 4);
  if constexpr (T == 2) {
    _tile_stored(1, acc + kTileN, ld * 4);
    _tile_stored(3, acc + row1 + kTileN, ld * 4);
  }
}

template <int T>  // 1 to 4
TQ_INLINE void one_row_tile(const uint8_t* a, int64_t lda, const int8_t* b, int64_t stride, int64_t k64, int32_t* acc) {
  _tile_zero(0);
  if constexpr (T > 1) _tile_zero(1);
  if constexpr (T > 2) _tile_zero(2);
  if constexpr (T > 3) _tile_zero(3);
  for (int64_t k = 0; k < k64; k += 64) {
    _tile_loadd(4, a + k, lda);
    _tile_loadd(5, b + k * 16, 64);
    _tile_dpbusd(0, 4, 5);
    if constexpr (T > 1) {
      _tile_loadd(6, b + stride + k * 16, 64);
      _tile_dpbusd(1, 4, 6);
    }
    if constexpr (T > 2) {
      _tile_loadd(7, b + 2 * stride + k * 16, 64);
      _tile_dpbusd(2, 4, 7);
    }
    if constexpr (T > 3) {
      _tile_loadd(5, b + 3 * stride + k * 16, 64);
      _tile_dpbusd(3, 4, 5);
    }
  }
  constexpr int64_t ld = 4 * kTileN;
  _tile_stored(0, acc, ld * 4);
  if constexpr (T > 1) _tile_stored(1, acc + kTileN, ld * 4);
  if constexpr (T > 2) _tile_stored(2, acc + 2 * kTileN, ld * 4);
  if constexpr (T > 3) _tile_stored(3, acc + 3 * kTileN, ld * 4);
}

static void gemm_one_row_tile(const GemmArgs& g, EpilogueFn store, int64_t m, int64_t rows, int64_t tile0,
                              int64_t tile1) {
  alignas(64) int32_t acc[kTileRows * 4 * kTileN];
  const int64_t stride = tile_bytes(g.k), k64 = padded_k(g.k);
  const uint8_t* a = g.a + m * g.lda;
  configure_one(rows);
  for (int64_t tile = tile0; tile < tile1;) {
    const int8_t* b = tile_at(g.packed, g.k, tile);
    const int64_t left = tile1 - tile, count = left >= 4 ? 4 : left;
    if (count == 4) one_row_tile<4>(a, g.lda, b, stride, k64, acc);
    else if (count == 3) one_row_tile<3>(a, g.lda, b, stride, k64, acc);
    else if (count == 2) one_row_tile<2>(a, g.lda, b, stride, k64, acc);
    else one_row_tile<1>(a, g.lda, b, stride, k64, acc);
    epilogue(store, g, acc, 4 * kTileN, m, rows, tile, count, sizeof(int32_t));
    tile += count;
  }
}

static void gemm_blocks(const GemmArgs& g, EpilogueFn store, int64_t m0, int64_t m1, int64_t rows, int64_t tile0,
                        int64_t tile1) {  // [m0, m1) in blocks of `rows` (17 .. 32) rows
  alignas(64) int32_t acc[kBlockRows * 2 * kTileN];
  const int64_t stride = tile_bytes(g.k), k64 = padded_k(g.k);
  configure_two(kTileRows, rows - kTileRows);
  for (int64_t tile = tile0; tile < tile1; tile += 2) {
    const int8_t* b = tile_at(g.packed, g.k, tile);
    const int64_t count = tile1 - tile >= 2 ? 2 : 1;
    for (int64_t m = m0; m < m1; m += rows) {
      const uint8_t* a = g.a + m * g.lda;
      if (count == 2) two_row_tiles<2>(a, g.lda, b, stride, k64, acc);
      else two_row_tiles<1>(a, g.lda, b, stride, k64, acc);
      epilogue(store, g, acc, 2 * kTileN, m, rows, tile, count, sizeof(int32_t));
    }
  }
}

static void gemm(const GemmArgs& g, int64_t m0, int64_t m1, int64_t tile0, int64_t tile1) {
  if (m0 >= m1 || tile0 >= tile1) return;
  if (is_wide(g) || m1 - m0 <= kVectorRows) return gemm_vector(g, m0, m1, tile0, tile1);
  const EpilogueFn store = epilogue_for<false>(g);
  const int64_t whole = (m1 - m0) / kBlockRows * kBlockRows, rest = m1 - m0 - whole;
  if (whole) gemm_blocks(g, store, m0, m0 + whole, kBlockRows, tile0, tile1);
  if (rest > kTileRows) gemm_blocks(g, store, m0 + whole, m1, rest, tile0, tile1);
  else if (rest) gemm_one_row_tile(g, store, m0 + whole, rest, tile0, tile1);
  _tile_release();
}
}  // namespace amxint8

const KernelTable& amxint8_kernels() {
  using namespace amxint8;
  static constexpr KernelTable table = {"amx_int8", 128,  kBlockRows,    1600.0f,        quantize_rows,
                                        copy_rows,  gemm, quantize_span, dequantize_span};
  return table;
}
}  // namespace torchquant
TQ_TARGET_END
#endif
