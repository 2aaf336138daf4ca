#include "formats/int8_tiles.h"

#include <cstring>

namespace torchquant {

void pack_weight(const int8_t* weight, int64_t row_stride, int64_t col_stride, int64_t n, int64_t k, int64_t first_tile,
                 int64_t last_tile, int8_t* packed) {
  const int64_t k64 = padded_k(k), bytes = tile_bytes(k);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    int8_t* out = packed + tile * bytes;
    uint32_t sums[2 * kTileN] = {0};  // unsigned: wraps instead of overflowing; the last 16 are the flags
    for (int64_t j = 0; j < kTileN; ++j) {
      const int64_t row = tile * kTileN + j;
      const int64_t filled = row < n ? k : 0;
      const int8_t* w = weight + row * row_stride;
      int8_t* lane = out + j * kQuadK;
      uint32_t sum = 0, minus_128 = 0;
      for (int64_t i = 0; i < filled; ++i) {
        const int8_t value = w[i * col_stride];
        lane[(i / kQuadK) * kTileN * kQuadK + i % kQuadK] = value;
        sum += static_cast<uint32_t>(static_cast<int32_t>(value));
        minus_128 |= value == -128;
      }
      for (int64_t i = filled; i < k64; ++i) lane[(i / kQuadK) * kTileN * kQuadK + i % kQuadK] = 0;
      sums[j] = sum;
      sums[kTileN] |= minus_128;
    }
    sums[kTileN + 1] = static_cast<uint32_t>(k);
    sums[kTileN + 2] = static_cast<uint32_t>(n);
    sums[kTileN + 3] = kLayoutVersion;
    std::memcpy(out + k64 * kTileN, sums, sizeof(sums));
  }
}

void unpack_weight(const int8_t* packed, int64_t n, int64_t k, int64_t first_tile, int64_t last_tile, int8_t* weight) {
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int8_t* in = tile_at(packed, k, tile);
    for (int64_t j = 0; j < kTileN && tile * kTileN + j < n; ++j) {
      int8_t* w = weight + (tile * kTileN + j) * k;
      const int8_t* lane = in + j * kQuadK;
      for (int64_t i = 0; i < k; ++i) w[i] = lane[(i / kQuadK) * kTileN * kQuadK + i % kQuadK];
    }
  }
}

}  // namespace torchquant
