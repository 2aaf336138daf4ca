// Plain C++: the oracle of the tests and the path of every processor without its own.
#include <cmath>

#include "kernel_table.h"
#include "layout.h"

namespace torchquant {
namespace scalar {
#include "vec_scalar.inc"
#include "quantize.inc"
#include "activation.inc"
#include "norm.inc"
#include "epilogue.inc"

constexpr int kRows = 4, kTiles = 1, kFewTiles = 1, kFourRowTiles = 1;

// Signed panel. Four products a lane; the inner loops have fixed bounds so that any compiler makes something of them.
template <int R, int T>
static void micro(const uint8_t* a, int64_t step, const int8_t* b, int64_t tile_stride, int64_t groups, int32_t* acc,
                  bool resume, bool /*minus_128*/) {
  for (int t = 0; t < T; ++t) {
    int32_t c[R][kTileN] = {};
    const int8_t* w = b + t * tile_stride;
    for (int64_t g = 0; g < groups; ++g, w += kTileN * kGroupK) {
      for (int r = 0; r < R; ++r) {
        const int8_t* x = reinterpret_cast<const int8_t*>(a) + g / 16 * step + r * kAlignK + g % 16 * kGroupK;
        const int32_t x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
        for (int j = 0; j < kTileN; ++j)
          c[r][j] = add_i(c[r][j], x0 * w[4 * j] + x1 * w[4 * j + 1] + x2 * w[4 * j + 2] + x3 * w[4 * j + 3]);
      }
    }
    for (int r = 0; r < R; ++r) {
      int32_t* out = acc + (r * T + t) * kTileN;
      for (int j = 0; j < kTileN; ++j) out[j] = resume ? add_i(out[j], c[r][j]) : c[r][j];
    }
  }
}

#include "gemm.inc"
}  // namespace scalar

const KernelTable& scalar_kernels() {
  static constexpr KernelTable table = {"scalar",
                                        0,
                                        scalar::kRows,
                                        scalar::kRows,
                                        scalar::kTiles,
                                        5.0f,
                                        scalar::quantize_rows,
                                        scalar::copy_rows,
                                        scalar::gemm_vector,
                                        scalar::quantize_span,
                                        scalar::dequantize_span,
                                        scalar::activate_span,
                                        scalar::normalize_rows};
  return table;
}

}  // namespace torchquant
