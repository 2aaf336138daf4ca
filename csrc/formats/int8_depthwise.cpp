#include "formats/int8_depthwise.h"

#include <algorithm>
#include <cstring>

namespace torchquant {
namespace {

int64_t depthwise_byte(int64_t channel, int64_t y, int64_t x, int64_t kernel_w) {  // within a block
  const int64_t quad = y / kQuadRows * kernel_w + x;
  return (quad * kDepthwiseChannels + depthwise_place(channel)) * kQuadRows + y % kQuadRows;
}

}  // namespace

void pack_depthwise(const int8_t* weight, int64_t outputs, int64_t kernel_h, int64_t kernel_w, int64_t first_block,
                    int64_t last_block, int8_t* packed) {
  const int64_t bytes = depthwise_block_bytes(kernel_h, kernel_w);
  for (int64_t block = first_block; block < last_block; ++block) {
    int8_t* const out = packed + block * bytes;
    std::memset(out, 0, static_cast<size_t>(bytes));
    int32_t tail[kDepthwiseChannels + 16] = {};
    const int64_t first = block * kDepthwiseChannels, count = std::min(kDepthwiseChannels, outputs - first);
    for (int64_t c = 0; c < count; ++c) {
      const int8_t* w = weight + (first + c) * kernel_h * kernel_w;
      for (int64_t y = 0; y < kernel_h; ++y)
        for (int64_t x = 0; x < kernel_w; ++x, ++w) {
          out[depthwise_byte(c, y, x, kernel_w)] = *w;
          tail[depthwise_place(c)] += *w;
        }
    }
    int32_t* const header = tail + kDepthwiseChannels;
    header[0] = kDepthwiseVersion;
    header[1] = static_cast<int32_t>(outputs);
    header[2] = static_cast<int32_t>(kernel_h);
    header[3] = static_cast<int32_t>(kernel_w);
    std::memcpy(out + depthwise_weight_bytes(kernel_h, kernel_w), tail, sizeof(tail));
  }
}

void unpack_depthwise(const int8_t* packed, int64_t outputs, int64_t kernel_h, int64_t kernel_w, int64_t first_block,
                      int64_t last_block, int8_t* weight) {
  const int64_t bytes = depthwise_block_bytes(kernel_h, kernel_w);
  for (int64_t block = first_block; block < last_block; ++block) {
    const int8_t* const in = packed + block * bytes;
    const int64_t first = block * kDepthwiseChannels, count = std::min(kDepthwiseChannels, outputs - first);
    for (int64_t c = 0; c < count; ++c) {
      int8_t* w = weight + (first + c) * kernel_h * kernel_w;
      for (int64_t y = 0; y < kernel_h; ++y)
        for (int64_t x = 0; x < kernel_w; ++x) *w++ = in[depthwise_byte(c, y, x, kernel_w)];
    }
  }
}

}  // namespace torchquant
