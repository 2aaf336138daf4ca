// The rows of a key/value cache: the keys (or the values) of one head and one token, quantized on their own.
//
//   8 bits:  byte      0 ... d-1                 | scale zero | scale zero | ...
//            integer   0 ... d-1                 |  group 0   |  group 1   |
//   4 bits:  byte      0 ... d/2-1               | scale zero | scale zero | ...
//            low half  integers 0 ... d/2-1
//            high half integers d/2 ... d-1
//
// Integers are unsigned, from 0 to 2^bits - 1. A group is a run of `group` channels (the last one may be shorter); its
// scale and its zero point, the real value of integer 0, are bfloat16, in little-endian order. A row ends with its last
// group: rows are not aligned. A cache is uint8 [batch, heads, tokens, row_bytes()], so that beams, batches and tokens
// are selected as in any tensor.
//
// Rejected: float32 scales (a quarter of a 4-bit cache); tiles of 16 tokens, which save the sums across lanes of the
// keys' products (a fifth of the time of attention), but then a token cannot be cut off without unpacking.
#pragma once

#include <cstdint>

#include "formats/int8_tiles.h"

namespace torchquant {

inline constexpr int64_t kKvMostChannels = 256;  // of a group: 256 * 255 * 32767 < 2^31
inline constexpr int64_t kKvMostHeadDim = 1024;
inline constexpr int64_t kKvBlock = 256;  // keys whose weights share a step; as many as a group has channels, at most

struct KvShape {
  int64_t d, bits, group;

  int64_t groups() const { return ceil_div(d, group); }
  int64_t code_bytes() const { return d * bits / 8; }
  int64_t row_bytes() const { return code_bytes() + groups() * 4; }
  int64_t width(int64_t g) const { return g * group + group < d ? group : d - g * group; }
  int32_t most() const { return (1 << bits) - 1; }
};

}  // namespace torchquant
