// The packed weight, version 1: one layout that every instruction set reads, so that a model that was converted under
// one runs under all, and the result of the pack operator does not depend on the CPU.
//
// A weight W, int8 [N, K], becomes ceil(N/16) tiles, each a contiguous run of bytes:
//
//   tile t:  k = 0..3            k = 4..7                     k = K64-4..K64-1
//           +------------------+------------------+-- ... --+------------------+-----------+-----------+
//           | n0: w w w w      | n0: w w w w      |         | n0: w w w w      | 16 column | flags     |
//           | n1: w w w w      | n1: w w w w      |         |                  | sums      | (int32 x  |
//           |  ...             |  ...             |         |  ...             | int32     |  16)      |
//           | n15: w w w w     | n15: w w w w     |         | n15: w w w w     |           |           |
//           +------------------+------------------+-- ... --+------------------+-----------+-----------+
//             64 bytes           64 bytes                     64 bytes           64 bytes    64 bytes
//
// with n0 = 16 t, K64 = K rounded up to a multiple of 64, and zeros wherever n >= N or k >= K.
//
// - Four consecutive k of one n (a quad) are in one 32-bit lane, which vpdpbusd, vpmaddubsw and tdpbssd multiply at
//   once. The quads of 16 n are 64 bytes: one AVX-512 register, two AVX registers, or one row of an AMX tile. Sixteen
//   such rows are one whole AMX tile, hence K64 and not a multiple of 4.
// - Column sums sum_k W[n, k] follow the weights of their tile: the epilogue needs them for the activations' zero
//   point, and they are in the same stream. The 128 extra bytes also keep tiles of K = 2^i off the same cache set.
// - flags[0] is 1 where the tile contains a weight of -128: the AVX2 path (vpsignb, vpmaddubsw) is exact only without
//   one and takes the widening path for that tile. flags[1..3] are K, N and the layout's version, so that a wrong
//   in_features is detected although K is padded. The others are zero.
//
// Rejected: 32-wide tiles (half-empty for N = 16, and two neighbouring 16-wide tiles serve the 32-wide kernels just
// as well); column sums in a tensor of their own (one more argument for every call, and two tensors that must match).
#pragma once

#include <cstdint>

namespace torchquant {

inline constexpr int kLayoutVersion = 1;
inline constexpr int64_t kTileN = 16;               // output channels of a tile
inline constexpr int64_t kQuadK = 4;                // consecutive k in one 32-bit lane
inline constexpr int64_t kAlignK = 64;              // K is padded to this
inline constexpr int64_t kMaxK = int64_t{1} << 23;  // row and column sums stay below 2^31
inline constexpr int64_t kTileTail = 128;           // column sums and flags

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t padded_k(int64_t k) { return ceil_div(k, kAlignK) * kAlignK; }
constexpr int64_t num_tiles(int64_t n) { return ceil_div(n, kTileN); }
constexpr int64_t tile_bytes(int64_t k) { return padded_k(k) * kTileN + kTileTail; }
constexpr int64_t packed_bytes(int64_t n, int64_t k) { return num_tiles(n) * tile_bytes(k); }

inline const int8_t* tile_at(const int8_t* packed, int64_t k, int64_t tile) { return packed + tile * tile_bytes(k); }
inline const int32_t* tile_sums(const int8_t* tile, int64_t k) {
  return reinterpret_cast<const int32_t*>(tile + padded_k(k) * kTileN);
}
inline bool tile_holds_minus_128(const int8_t* tile, int64_t k) { return tile_sums(tile, k)[16] != 0; }
inline int64_t tile_in_features(const int8_t* tile, int64_t k) { return tile_sums(tile, k)[17]; }
inline int64_t tile_out_features(const int8_t* tile, int64_t k) { return tile_sums(tile, k)[18]; }
inline int64_t tile_version(const int8_t* tile, int64_t k) { return tile_sums(tile, k)[19]; }

// W int8 [n, k] with the given strides (in elements) <-> packed (packed_bytes(n, k) bytes, 64-byte aligned).
void pack_weight(const int8_t* weight, int64_t row_stride, int64_t col_stride, int64_t n, int64_t k, int64_t first_tile,
                 int64_t last_tile, int8_t* packed);
void unpack_weight(const int8_t* packed, int64_t n, int64_t k, int64_t first_tile, int64_t last_tile, int8_t* weight);

}  // namespace torchquant
