// AMX: tdpbusd multiplies a tile of 16 rows x 64 bytes with one of 16 x 64 into 16 x 16 int32, exact. The packed layout
// *is* its B operand: 16 groups of 64 bytes are one tile. One or two rows take the AVX512-VNNI micro-kernel: there the
// weights' stream is the limit, and a tile product costs the same for 1 row as for 16.
#include "kernel_table.h"

#if defined(TQ_X86)
#include <cpuid.h>
#include <immintrin.h>

#include <cmath>

#include "attention.h"
#include "formats/int8_tiles.h"

TQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")
namespace torchquant {
namespace amxint8 {
#include "vec_avx512.inc"
#include "affine.inc"
#include "qat.inc"
#include "activations.inc"
#include "norms.inc"
#include "fake_quantize.inc"
#include "linear_epilogue.inc"
#include "linear_avx512.inc"
#include "linear_gemm.inc"

constexpr int64_t kVectorRows = 2;  // up to so many rows the vector micro-kernel is the faster one
// And up to so many products, of as many rows as it can take: the tile unit sleeps between calls, and waking it costs
// 0.3 us (seen after as little as 0.4 us without it).
constexpr int64_t kVectorProducts = 200 * 1000;
constexpr int64_t kTileRows = 16, kPairTiles = 3, kSingleTiles = 6;
constexpr int64_t kHalf = 2 * kTileRows * kPairTiles * kTileN;  // sums of a register tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-5 accumulate, 6 holds A, 7 holds B. The last block of a panel may hold fewer rows than the others: its tiles
// are multiplied whole, and what is in the missing rows is never looked at.
TQ_INLINE void configure(int64_t panel_rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(t < 7 ? panel_rows : 16);
    config.colsb[t] = 64;
  }
  // Not _tile_loadconfig: GCC's version declares a read of 8 bytes, and the optimiser then drops the other stores.
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

#include "attention_amx.inc"
#include "attention_avx512.inc"
#include "attention.inc"

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

// The next weight tiles, fetched into the second-level cache while the present ones are multiplied.
struct Ahead {
  const char* next;
  const char* end;
  int64_t lines;  // a step of K
};
TQ_INLINE void fetch(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.lines && ahead.next < ahead.end; ++i, ahead.next += 64)
    _mm_prefetch(ahead.next, _MM_HINT_T1);
}

// Sums of a register tile that wait for their epilogue. It is done in pieces between the products of the next tile:
// the tile unit and the vector units then work at the same time, and neither waits for the other's latency.
struct Pending {
  const GemmArgs* g;
  EpilogueFn store;
  const int32_t* acc;   // [2 * kTileRows, tiles * kTileN]; row kTileRows is the second block's first
  int64_t m, rows;      // rows of C from m on
  int64_t tile, tiles;  // weight tiles
  int64_t pieces, done;
};
constexpr int64_t kPieceRows = kTileRows, kBlockPieces = kTileRows / kPieceRows;

TQ_INLINE void finish_piece(Pending& p) {
  const int64_t part = p.done / p.tiles, t = p.done % p.tiles, block = part / kBlockPieces;
  ++p.done;
  const int64_t block_rows = p.g->panel_rows, first = part % kBlockPieces * kPieceRows;  // within the block
  const int64_t end = p.rows - block * block_rows < block_rows ? p.rows - block * block_rows : block_rows;
  if (first >= end) return;
  const int64_t ld = p.tiles * kTileN, rows = end - first < kPieceRows ? end - first : kPieceRows;
  epilogue(p.store, *p.g, p.acc + (block * kTileRows + first) * ld + t * kTileN, ld, p.m + block * block_rows + first,
           rows, p.tile + t, 1, sizeof(int32_t));
}
TQ_INLINE void finish_until(Pending& p, int64_t step, int64_t steps) {  // evenly over the steps
  while (p.done < p.pieces && p.done * steps <= step * p.pieces) finish_piece(p);
}
TQ_INLINE void finish(Pending& p) {
  while (p.done < p.pieces) finish_piece(p);
}

// Two blocks of rows (a and a + next_block) by T weight tiles. Back and forth, so that each product but the first
// finds one operand where the last one left it; with T = 3 that is 7 loads for 6 products, and 5 KB from the
// second-level cache, whose bandwidth is the limit here, where two by two would need 6 KB.
template <int T>
TQ_INLINE void two_blocks(const uint8_t* a, int64_t next_block, int64_t step, const int8_t* b, int64_t stride,
                          int64_t steps, Ahead& ahead, Pending& before, int32_t* acc) {
  _tile_zero(0);
  _tile_zero(3);
  if constexpr (T > 1) {
    _tile_zero(1);
    _tile_zero(4);
  }
  if constexpr (T > 2) {
    _tile_zero(2);
    _tile_zero(5);
  }
  for (int64_t s = 0; s < steps; ++s, a += step, b += kAlignK * kTileN) {
    fetch(ahead);
    _tile_loadd(6, a, 64);
    _tile_loadd(7, b, 64);
    _tile_dpbusd(0, 6, 7);
    finish_until(before, s, steps);
    if constexpr (T > 1) {
      _tile_loadd(7, b + stride, 64);
      _tile_dpbusd(1, 6, 7);
    }
    if constexpr (T > 2) {
      _tile_loadd(7, b + 2 * stride, 64);
      _tile_dpbusd(2, 6, 7);
    }
    _tile_loadd(6, a + next_block, 64);
    if constexpr (T > 2) {
      _tile_dpbusd(5, 6, 7);
      _tile_loadd(7, b + stride, 64);
    }
    if constexpr (T > 1) {
      _tile_dpbusd(4, 6, 7);
      _tile_loadd(7, b, 64);
    }
    _tile_dpbusd(3, 6, 7);
  }
  constexpr int64_t ld = T * kTileN;
  int32_t* second = acc + kTileRows * ld;
  _tile_stored(0, acc, ld * 4);
  _tile_stored(3, second, ld * 4);
  if constexpr (T > 1) {
    _tile_stored(1, acc + kTileN, ld * 4);
    _tile_stored(4, second + kTileN, ld * 4);
  }
  if constexpr (T > 2) {
    _tile_stored(2, acc + 2 * kTileN, ld * 4);
    _tile_stored(5, second + 2 * kTileN, ld * 4);
  }
}

template <int T>  // one block of rows by T = 1 to 6 weight tiles
TQ_INLINE void one_block(const uint8_t* a, int64_t step, const int8_t* b, int64_t stride, int64_t steps, int32_t* acc) {
#define TQ_EACH(what)           \
  what(0);                      \
  if constexpr (T > 1) what(1); \
  if constexpr (T > 2) what(2); \
  if constexpr (T > 3) what(3); \
  if constexpr (T > 4) what(4); \
  if constexpr (T > 5) what(5);
#define TQ_ZERO(t) _tile_zero(t)
#define TQ_MULTIPLY(t)                  \
  {                                     \
    _tile_loadd(7, b + t * stride, 64); \
    _tile_dpbusd(t, 6, 7);              \
  }
#define TQ_STORE(t) _tile_stored(t, acc + t * kTileN, T * kTileN * 4)
  TQ_EACH(TQ_ZERO)
  for (int64_t s = 0; s < steps; ++s, a += step, b += kAlignK * kTileN) {
    _tile_loadd(6, a, 64);
    TQ_EACH(TQ_MULTIPLY)
  }
  TQ_EACH(TQ_STORE)
#undef TQ_EACH
#undef TQ_ZERO
#undef TQ_MULTIPLY
#undef TQ_STORE
}

// Rows [m0, m1), an even number of blocks (the last may be short), by T weight tiles. `before` is left pending on one
// half of acc, whose other half is free.
template <int T>
static void pairs_of_blocks(const GemmArgs& g, int64_t m0, int64_t m1, int64_t tile, int64_t tile1, Pending& before,
                            int32_t* acc) {
  const int64_t stride = tile_bytes(g.k), k64 = padded_k(g.k), step = g.panel_rows * kAlignK;
  const int8_t* b = tile_at(g.packed, g.k, tile);
  const int64_t pair = 2 * g.panel_rows, pairs = ceil_div(m1 - m0, pair);
  const int64_t after = tile1 - tile - T < T ? tile1 - tile - T : T;  // weight tiles that follow
  const char* next = reinterpret_cast<const char*>(b + T * stride);
  // The first pair of rows would have to wait for all lines of new tiles, so they are fetched during the others.
  Ahead ahead{next, next + (after > 0 && pairs > 1 ? after * stride : 0), ceil_div(T * 16, pairs)};
  for (int64_t m = m0; m < m1; m += pair) {
    int32_t* sums = before.acc == acc ? acc + kHalf : acc;
    const uint8_t* a = g.a + panel_at(m, g.k, g.panel_rows);
    two_blocks<T>(a, g.panel_rows * k64, step, b, stride, k64 / kAlignK, ahead, before, sums);
    finish(before);
    before.acc = sums;
    before.m = m;
    before.rows = m1 - m < pair ? m1 - m : pair;
    before.tile = tile;
    before.tiles = T;
    before.pieces = 2 * kBlockPieces * T;
    before.done = 0;
  }
}

template <int T>
static void single_block(const GemmArgs& g, EpilogueFn store, int64_t m0, int64_t m1, int64_t tile) {
  alignas(64) int32_t acc[kTileRows * T * kTileN];
  const int64_t k64 = padded_k(g.k);
  one_block<T>(g.a + panel_at(m0, g.k, g.panel_rows), g.panel_rows * kAlignK, tile_at(g.packed, g.k, tile),
               tile_bytes(g.k), k64 / kAlignK, acc);
  epilogue(store, g, acc, T * kTileN, m0, m1 - m0, tile, T, sizeof(int32_t));
}

using PairsFn = void (*)(const GemmArgs&, int64_t, int64_t, int64_t, int64_t, Pending&, int32_t*);
using SingleFn = void (*)(const GemmArgs&, EpilogueFn, int64_t, int64_t, int64_t);

TQ_INLINE bool is_for_vectors(const GemmArgs& g, int64_t rows, int64_t tiles) {
  return g.panel_rows <= kVectorRows ||
         (g.panel_rows <= kRows && rows * tiles * kTileN * padded_k(g.k) <= kVectorProducts);
}

static void gemm(const GemmArgs& g, int64_t m0, int64_t m1, int64_t tile0, int64_t tile1) {
  if (m0 >= m1 || tile0 >= tile1) return;
  if (is_wide(g) || is_for_vectors(g, m1 - m0, tile1 - tile0)) return gemm_vector(g, m0, m1, tile0, tile1);
  static constexpr PairsFn kPairs[] = {nullptr, pairs_of_blocks<1>, pairs_of_blocks<2>, pairs_of_blocks<3>};
  static constexpr SingleFn kSingles[] = {nullptr,         single_block<1>, single_block<2>, single_block<3>,
                                          single_block<4>, single_block<5>, single_block<6>};
  const EpilogueFn store = epilogue_for<false>(g);
  configure(g.panel_rows);
  const int64_t blocks = ceil_div(m1 - m0, g.panel_rows);
  const int64_t paired = m0 + blocks / 2 * 2 * g.panel_rows, split = paired < m1 ? paired : m1;
  if (split > m0) {
    alignas(64) int32_t acc[2 * kHalf];
    Pending before{&g, store, nullptr, 0, 0, 0, 1, 0, 0};
    const int64_t pair = 2 * g.panel_rows;
    const int64_t height = (tile1 - tile0) * tile_bytes(g.k) <= kResidentBytes ? pair : split - m0;
    for (int64_t m = m0; m < split; m += height)
      for (int64_t tile = tile0; tile < tile1; tile += kPairTiles)
        kPairs[tile1 - tile < kPairTiles ? tile1 - tile : kPairTiles](g, m, m + height < split ? m + height : split,
                                                                      tile, tile1, before, acc);
    finish(before);
  }
  if (split < m1)
    for (int64_t tile = tile0; tile < tile1; tile += kSingleTiles)
      kSingles[tile1 - tile < kSingleTiles ? tile1 - tile : kSingleTiles](g, store, split, m1, tile);
  _tile_release();
}
}  // namespace amxint8

const KernelTable& amxint8_kernels() {
  using namespace amxint8;
  static constexpr KernelTable table = {"amx_int8",         128,
                                        kTileRows,          2 * kTileRows,
                                        kPairTiles,         1600.0f,
                                        quantize_rows,      copy_rows,
                                        quantize_pack,      gemm,
                                        quantize_span,      dequantize_span,
                                        activate_span,      normalize_rows,
                                        pack_attention_any, attend_any,
                                        fake_quantize_span, learned_backward_span,
                                        mask_span,          positive_span,
                                        minmax_span};
  return table;
}
}  // namespace torchquant
TQ_TARGET_END
#endif
