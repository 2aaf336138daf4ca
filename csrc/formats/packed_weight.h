// The formats of a packed weight: the shape of its int8 tensor in each of them, and which of them a tensor has.
//
// A format is one file of this folder: its picture, its sizes, its version, the values that follow the weights. Code
// outside of this folder asks for a shape and never computes with the sizes of a layout. (In Python only
// torchquant/nn/weight.py distinguishes formats.)
#pragma once

#include "formats/int8_rows.h"
#include "formats/int8_tiles.h"

namespace torchquant {

enum class PackedFormat { kInt8Tiles, kInt8Rows };  // on CPUs, on accelerators

struct PackedShape {  // of an int8 tensor; the weights of several layers are concatenated along its rows
  int64_t rows, columns;
};

constexpr PackedShape packed_shape(PackedFormat format, int64_t n, int64_t k) {
  return format == PackedFormat::kInt8Tiles ? PackedShape{num_tiles(n), tile_bytes(k)}
                                            : PackedShape{layout_rows(n, k), padded_k(k)};
}

// The format of a packed weight for in_features k that has so many columns; no number of columns has two formats.
constexpr PackedFormat packed_format(int64_t columns, int64_t k) {
  return columns == padded_k(k) ? PackedFormat::kInt8Rows : PackedFormat::kInt8Tiles;
}

// Whether a tile was made for a weight [n, k] in this version of the format.
inline bool is_tile_of(const int8_t* tile, int64_t n, int64_t k) {
  return tile_version(tile, k) == kLayoutVersion && tile_in_features(tile, k) == k && tile_out_features(tile, k) == n;
}

}  // namespace torchquant
