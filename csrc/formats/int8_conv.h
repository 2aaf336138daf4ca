// The packed weight of a convolution. A depthwise one has a format of its own (int8_depthwise.h). That of a dense or
// grouped one has for each group the tiles of int8_tiles.h, one group below the other, so that a convolution is the same
// product of a panel and tiles as a linear layer.
//
// A weight int8 [O, C / groups, kh, kw] is, for a group, a matrix [N, K] with N = O / groups rows and K = kh * kw *
// (C / groups) columns in the order in which an image [n, h, w, c] holds them:
//
//             kernel row 0                                  kernel row 1
//            +--------------+--------------+-- ... --+-----+--------------+-- ...
//   row o    | c = 0 .. C-1 | c = 0 .. C-1 |         |     | c = 0 .. C-1 |
//            +--------------+--------------+-- ... --+-----+--------------+-- ...
//              column 0       column 1                       column 0
//
//   group 0        ceil(N / 16) tiles
//   group 1        ceil(N / 16) tiles
//   ...
//
// One kernel row of an output pixel is then one run of bytes of the image (without dilation). The shape of the weight
// and the number of groups determine the layout; a tile records N and K (int8_tiles.h).
#pragma once

#include "formats/int8_depthwise.h"
#include "formats/packed_weight.h"

namespace torchquant {

struct ConvShape {                                        // of a weight; one dimension: kernel_h = 1
  int64_t outputs, channels, kernel_h, kernel_w, groups;  // channels: of a group

  int64_t n() const { return outputs / groups; }
  int64_t k() const { return channels * kernel_h * kernel_w; }
  bool is_depthwise() const { return channels == 1 && groups > 1; }
};

inline PackedShape packed_shape(const ConvShape& shape) {
  if (shape.is_depthwise())
    return {depthwise_blocks(shape.outputs), depthwise_block_bytes(shape.kernel_h, shape.kernel_w)};
  return {shape.groups * num_tiles(shape.n()), tile_bytes(shape.k())};
}
// Whether memory of that shape was packed from such a weight, in this version of its format.
inline bool is_packed_conv(const int8_t* packed, const ConvShape& shape) {
  if (shape.is_depthwise()) return is_depthwise_block_of(packed, shape.outputs, shape.kernel_h, shape.kernel_w);
  return is_tile_of(packed, shape.n(), shape.k());
}

// Of one group; not of a depthwise convolution.
inline int64_t packed_group_bytes(const ConvShape& shape) { return packed_bytes(shape.n(), shape.k()); }

}  // namespace torchquant
