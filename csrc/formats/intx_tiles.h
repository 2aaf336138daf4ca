// The packed weight of 2 to 8 bits with one scale for each output channel, or for each group of inputs, version 1. One
// layout that every instruction set reads.
//
// A weight [N, K] becomes ceil(N/16) tiles of 16 output channels, each a contiguous run of bytes that a product reads
// from its beginning to its end:
//
//   tile t:   group 0                      group 1                      last group
//            +-----------+--------------+ +-----------+--------------+ +-----------+---- ... --+ +--------+--------+
//            | 16 scales | blocks       | | 16 scales | blocks       | | 16 scales | blocks    | | zero   | header |
//            | float32   | of 32 inputs | | float32   | of 32 inputs | | float32   |           | | points | int32  |
//            +-----------+--------------+ +-----------+--------------+ +-----------+---- ... --+ +--------+--------+
//              64 bytes    64 * bits each   64 bytes                     64 bytes                  16 each  64 bytes
//
// A group has group_size inputs, the last one what remains; one scale per channel is one group of K inputs. A group ends
// with a whole block, so that group sizes that are no multiple of 32 take more memory.
//
// Integers are stored without sign: u = q + 2^(bits-1). A block holds u for 32 inputs and 16 channels: eight quads of
// four inputs. Eight bits are stored as they are: quad 0, quad 1, ..., 64 bytes each, and in a quad the four inputs of
// channel 0, those of channel 1, ... (as in int8_tiles.h: a quad is one 32-bit lane of the channel). Fewer bits are cut
// into planes of 4, 2 and 1 bits, whose sum is `bits`, the lowest bits of u in the widest plane. A plane of p bits is
// p * 64 bytes, p vectors. Vector v of it holds quads v, v + p, v + 2p, ..., each p bits higher than the one before:
//
//   5 bits:   plane of 4 bits, bits 0..3 of u                                  plane of 1 bit, bit 4 of u
//            +-----------------+-----------------+-- ... --+-----------------+-----------------------------------+
//            | quad 0 | quad 4 | quad 1 | quad 5 |         | quad 3 | quad 7 | quads 0 1 2 3 4 5 6 7             |
//            +-----------------+-----------------+-- ... --+-----------------+-----------------------------------+
//     byte b:  bits    bits                                                    bit 0 is of quad 0, bit 7 of quad 7
//              0..3    4..7
//
// so that a shift and a mask of a 64-byte vector are a quad. u is 0 behind K and N.
//
// Zero points follow the groups if the weight has some: zero + 2^(bits-1), uint8 [groups][16], up to a multiple of 64
// bytes. The header holds the version, N, K, bits, group_size (0: per channel), 1 for zero points, and zeros.
//
// Rejected: scales in a tensor of their own (one row of the product would read two streams, and the scales of 16
// channels would be 16 lines); planes of 3, 5, 6 bits (shifts across bytes); signed integers (vpdpbusd takes one
// unsigned operand, and the quantized activations are the signed one).
#pragma once

#include <cstdint>

#include "formats/int8_tiles.h"

namespace torchquant {

inline constexpr int kIntxVersion = 1;
inline constexpr int64_t kIntxBlock = 32;  // inputs of a block
inline constexpr int64_t kIntxQuads = kIntxBlock / kQuadK;
inline constexpr int64_t kIntxVector = kTileN * kQuadK;  // bytes of a quad of 16 channels
inline constexpr int64_t kIntxScaleBytes = 64;

struct IntxShape {
  int64_t n, k, bits;
  int64_t group_size;  // 0: one scale per channel
  bool has_zero;

  int64_t group() const { return group_size > 0 && group_size < k ? group_size : k; }
  int64_t groups() const { return ceil_div(k, group()); }
  int64_t inputs(int64_t g) const { return g + 1 < groups() ? group() : k - g * group(); }
  int64_t blocks(int64_t g) const { return ceil_div(inputs(g), kIntxBlock); }
  int64_t group_blocks() const { return ceil_div(group(), kIntxBlock); }  // of all groups but the last
  int64_t all_blocks() const { return (groups() - 1) * group_blocks() + blocks(groups() - 1); }
  int64_t block_bytes() const { return kIntxVector * bits; }
  int64_t group_bytes() const { return kIntxScaleBytes + group_blocks() * block_bytes(); }
  int64_t zeros_at() const { return groups() * kIntxScaleBytes + all_blocks() * block_bytes(); }
  int64_t header_at() const { return zeros_at() + (has_zero ? ceil_div(groups() * kTileN, 64) * 64 : 0); }
  int64_t tile_bytes() const { return header_at() + 64; }
  int32_t middle() const { return int32_t{1} << (bits - 1); }  // u of the integer 0
};

// Up to this many inputs, every sum over a group stays below 2^31: sum |q - z| |u - zero|, and sums of 240 |q| over half of
// the inputs, which kernels use that leave bits where they are in a byte.
constexpr int64_t intx_most_inputs(int64_t bits) { return bits == 8 ? 33025 : 65793; }

inline const int32_t* intx_header(const uint8_t* tile, const IntxShape& s) {
  return reinterpret_cast<const int32_t*>(tile + s.header_at());
}
// Whether a tile was made for such a weight in this version of the format.
inline bool is_intx_tile_of(const uint8_t* tile, const IntxShape& s) {
  const int32_t* h = intx_header(tile, s);
  return h[0] == kIntxVersion && h[1] == s.n && h[2] == s.k && h[3] == s.bits && h[4] == s.group_size &&
         h[5] == static_cast<int32_t>(s.has_zero);
}

// weight int8 [n, k], scale float32 [n, groups], zero int8 [n, groups] (null without zero points), contiguous <-> packed,
// 64-byte aligned.
void pack_intx(const int8_t* weight, const float* scale, const int8_t* zero, const IntxShape& shape, int64_t first_tile,
               int64_t last_tile, uint8_t* packed);
void unpack_intx(const uint8_t* packed, const IntxShape& shape, int64_t first_tile, int64_t last_tile, int8_t* weight,
                 float* scale, int8_t* zero);

}  // namespace torchquant
