// pack_weight, unpack_weight: the canonical int8 [N, K] <-> the layout that the kernels read (formats/int8_tiles.h).
#include "core/threads.h"
#include "core/torchquant_core.h"
#include "formats/int8_tiles.h"

namespace torchquant {
namespace {

int64_t tiles_of_a_thread(int64_t k) {
  constexpr int64_t kBytes = 1 << 18;  // that a thread should pack at least
  return ceil_div(kBytes, tile_bytes(k));
}

}  // namespace
}  // namespace torchquant

using namespace torchquant;

int64_t tq_tiles(int64_t n) { return num_tiles(n); }
int64_t tq_tile_bytes(int64_t k) { return tile_bytes(k); }

tq_status tq_pack_weight(const int8_t* weight, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k,
                         int8_t* packed, const tq_parallel* parallel) {
  parallel_for(parallel, 0, num_tiles(n), tiles_of_a_thread(k), [&](int64_t first, int64_t last) {
    pack_weight(weight, row_stride, column_stride, n, k, first, last, packed);
  });
  return TQ_OK;
}

tq_status tq_unpack_weight(const int8_t* packed, int64_t n, int64_t k, int8_t* weight, const tq_parallel* parallel) {
  parallel_for(parallel, 0, num_tiles(n), tiles_of_a_thread(k),
               [&](int64_t first, int64_t last) { unpack_weight(packed, n, k, first, last, weight); });
  return TQ_OK;
}
