// The packed weight of a depthwise convolution, version 1: every output channel reads one input channel only, so that
// channels fill the vectors and a lane multiplies four taps at once, those of four rows of one kernel column.
//
// A weight int8 [O, 1, kh, kw] becomes ceil(O / 64) blocks of 64 output channels, each a contiguous run of bytes. A
// column of the kernel is cut into quads of four rows (zeros below the last row):
//
//   block b:  quad 0, column 0   quad 0, column 1       quad 1, column 0
//            +------------------+------------------+-- +------------------+-- ... --+-----------+--------+
//            | w w w w  place 0 |                  |   |                  |         | 64 sums   | header |
//            | w w w w  place 1 |                  |   |                  |         | of all    | int32  |
//            |  ...             |                  |   |                  |         | taps      | x 16   |
//            | w w w w  place 63|                  |   |                  |         | int32     |        |
//            +------------------+------------------+-- +------------------+-- ... --+-----------+--------+
//              256 bytes          256 bytes              256 bytes                    256 bytes   64 bytes
//
// Places are not channels: pixels of four image rows are interleaved to quads by unpacking bytes and then words, which
// happens within 16 bytes at a time. It turns 16 channels into four groups of 4, and a vector holds the same group of
// each of its 16 channels: channel c of the block is at place 16 ((c / 4) % 4) + 4 (c / 16) + c % 4. Packing sums back
// to bytes undoes that without a further instruction. A vector of 32 bytes takes the half of each group that belongs to
// its 32 channels.
//
// The sums are in the order of places. The header holds the version, O, kh, kw, and zeros.
#pragma once

#include <cstdint>

#include "formats/int8_tiles.h"

namespace torchquant {

inline constexpr int kDepthwiseVersion = 1;
inline constexpr int64_t kDepthwiseChannels = 64;  // of a block
inline constexpr int64_t kQuadRows = 4;            // rows of a kernel column in one 32-bit lane

constexpr int64_t depthwise_place(int64_t channel) {  // within its block
  return 16 * (channel / 4 % 4) + 4 * (channel / 16) + channel % 4;
}
constexpr int64_t depthwise_blocks(int64_t outputs) { return ceil_div(outputs, kDepthwiseChannels); }
constexpr int64_t depthwise_quads(int64_t kernel_h) { return ceil_div(kernel_h, kQuadRows); }
constexpr int64_t depthwise_weight_bytes(int64_t kernel_h, int64_t kernel_w) {
  return depthwise_quads(kernel_h) * kernel_w * kDepthwiseChannels * kQuadRows;
}
constexpr int64_t depthwise_block_bytes(int64_t kernel_h, int64_t kernel_w) {
  return depthwise_weight_bytes(kernel_h, kernel_w) + 4 * kDepthwiseChannels + 64;
}
inline const int32_t* depthwise_sums(const int8_t* block, int64_t kernel_h, int64_t kernel_w) {
  return reinterpret_cast<const int32_t*>(block + depthwise_weight_bytes(kernel_h, kernel_w));
}
inline const int32_t* depthwise_header(const int8_t* block, int64_t kernel_h, int64_t kernel_w) {
  return depthwise_sums(block, kernel_h, kernel_w) + kDepthwiseChannels;
}

// Whether a block was made for a weight [outputs, 1, kernel_h, kernel_w] in this version of the format.
inline bool is_depthwise_block_of(const int8_t* block, int64_t outputs, int64_t kernel_h, int64_t kernel_w) {
  const int32_t* header = depthwise_header(block, kernel_h, kernel_w);
  return header[0] == kDepthwiseVersion && header[1] == outputs && header[2] == kernel_h && header[3] == kernel_w;
}

// The weight, contiguous int8 [outputs, kernel_h, kernel_w], <-> packed, aligned to 64: depthwise_blocks(outputs) runs
// of depthwise_block_bytes(kernel_h, kernel_w) bytes.
void pack_depthwise(const int8_t* weight, int64_t outputs, int64_t kernel_h, int64_t kernel_w, int64_t first_block,
                    int64_t last_block, int8_t* packed);
void unpack_depthwise(const int8_t* packed, int64_t outputs, int64_t kernel_h, int64_t kernel_w, int64_t first_block,
                      int64_t last_block, int8_t* weight);

}  // namespace torchquant
