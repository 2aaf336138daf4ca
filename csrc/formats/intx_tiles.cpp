#include "formats/intx_tiles.h"

#include <cstring>

namespace torchquant {
namespace {

// The planes of `bits` bits, from the lowest bits of u up: their widths, and 0s.
struct Planes {
  int64_t width[3];
};
constexpr Planes planes_of(int64_t bits) {
  if (bits == 8) return {{8, 0, 0}};
  Planes planes{{0, 0, 0}};
  int64_t count = 0;
  for (int64_t width = 4; width > 0; width /= 2)
    if (bits & width) planes.width[count++] = width;
  return planes;
}

// The byte of a plane that holds a quad's bits, and how far they are shifted in it.
struct Place {
  int64_t vector, shift;
};
constexpr Place place_of(int64_t width, int64_t quad) {
  return width == 8 ? Place{quad, 0} : Place{quad % width, quad / width * width};
}

void write(uint8_t* block, int64_t bits, int64_t quad, int64_t at, uint32_t u) {
  for (const int64_t width : planes_of(bits).width) {
    if (width == 0) return;
    const Place place = place_of(width, quad);
    uint8_t& byte = block[place.vector * kIntxVector + at];
    byte = static_cast<uint8_t>(byte | (u & ((1u << width) - 1)) << place.shift);
    u >>= width;
    block += width * kIntxVector;
  }
}

uint32_t read(const uint8_t* block, int64_t bits, int64_t quad, int64_t at) {
  uint32_t u = 0;
  int64_t below = 0;
  for (const int64_t width : planes_of(bits).width) {
    if (width == 0) break;
    const Place place = place_of(width, quad);
    u |= (block[place.vector * kIntxVector + at] >> place.shift & ((1u << width) - 1)) << below;
    below += width;
    block += width * kIntxVector;
  }
  return u;
}

}  // namespace

void pack_intx(const int8_t* weight, const float* scale, const int8_t* zero, const IntxShape& shape, int64_t first_tile,
               int64_t last_tile, uint8_t* packed) {
  const int64_t groups = shape.groups(), size = shape.group(), bits = shape.bits;
  for (int64_t t = first_tile; t < last_tile; ++t) {
    uint8_t* tile = packed + t * shape.tile_bytes();
    std::memset(tile, 0, static_cast<size_t>(shape.tile_bytes()));
    for (int64_t j = 0; j < kTileN && t * kTileN + j < shape.n; ++j) {
      const int64_t row = t * kTileN + j;
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* group = tile + g * shape.group_bytes();
        std::memcpy(group + 4 * j, scale + row * groups + g, 4);
        if (zero)
          tile[shape.zeros_at() + g * kTileN + j] = static_cast<uint8_t>(zero[row * groups + g] + shape.middle());
        const int8_t* w = weight + row * shape.k + g * size;
        for (int64_t i = 0; i < shape.inputs(g); ++i) {
          uint8_t* block = group + kIntxScaleBytes + i / kIntxBlock * shape.block_bytes();
          write(block, bits, i % kIntxBlock / kQuadK, j * kQuadK + i % kQuadK,
                static_cast<uint32_t>(w[i] + shape.middle()));
        }
      }
    }
    const int32_t header[] = {kIntxVersion,
                              static_cast<int32_t>(shape.n),
                              static_cast<int32_t>(shape.k),
                              static_cast<int32_t>(bits),
                              static_cast<int32_t>(shape.group_size),
                              static_cast<int32_t>(shape.has_zero)};
    std::memcpy(tile + shape.header_at(), header, sizeof(header));
  }
}

void unpack_intx(const uint8_t* packed, const IntxShape& shape, int64_t first_tile, int64_t last_tile, int8_t* weight,
                 float* scale, int8_t* zero) {
  const int64_t groups = shape.groups(), size = shape.group();
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const uint8_t* tile = packed + t * shape.tile_bytes();
    for (int64_t j = 0; j < kTileN && t * kTileN + j < shape.n; ++j) {
      const int64_t row = t * kTileN + j;
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* group = tile + g * shape.group_bytes();
        std::memcpy(scale + row * groups + g, group + 4 * j, 4);
        if (zero)
          zero[row * groups + g] = static_cast<int8_t>(tile[shape.zeros_at() + g * kTileN + j] - shape.middle());
        int8_t* w = weight + row * shape.k + g * size;
        for (int64_t i = 0; i < shape.inputs(g); ++i) {
          const uint8_t* block = group + kIntxScaleBytes + i / kIntxBlock * shape.block_bytes();
          w[i] = static_cast<int8_t>(
              static_cast<int32_t>(read(block, shape.bits, i % kIntxBlock / kQuadK, j * kQuadK + i % kQuadK)) -
              shape.middle());
        }
      }
    }
  }
}

}  // namespace torchquant
