// Rows of packed weights of 2 to 8 bits, and sums of them: each thread makes some rows of the result.
#include <algorithm>

#include "core/convert.h"
#include "core/threads.h"
#include "core/torchquant_embedding.h"
#include "isa.h"

namespace torchquant::embedding {
namespace {

constexpr BagMode bag_mode(tq_bag_mode mode) { return static_cast<BagMode>(mode); }
static_assert(bag_mode(TQ_BAG_SUM) == BagMode::kSum && bag_mode(TQ_BAG_MEAN) == BagMode::kMean);
static_assert(bag_mode(TQ_BAG_MAX) == BagMode::kMax);

constexpr int64_t kThreadValues = 1 << 15;  // that a thread should read at least

EmbeddingArgs arguments_of(const uint8_t* packed, const tq_intx_shape& s, const int64_t* index, void* out,
                           tq_type type) {
  EmbeddingArgs g{};
  g.shape = intx_shape_of(s);
  g.packed = packed;
  g.index = index;
  g.out_type = float_type(type);
  g.out = out;
  g.padding = -1;
  return g;
}

// Rows of the result for one thread, each of which reads `rows` rows of the weight.
int64_t grain(int64_t rows, int64_t k) { return std::max<int64_t>(1, kThreadValues / std::max<int64_t>(1, rows * k)); }

}  // namespace
}  // namespace torchquant::embedding

using namespace torchquant;

tq_status tq_embedding_intx(const uint8_t* packed, const tq_intx_shape* shape, const int64_t* index, int64_t count,
                            void* out, tq_type out_type, const tq_parallel* parallel) {
  const EmbeddingArgs g = embedding::arguments_of(packed, *shape, index, out, out_type);
  const KernelTable& table = kernels();
  parallel_for(parallel, 0, count, embedding::grain(1, shape->k),
               [&](int64_t first, int64_t last) { table.embedding_rows(g, first, last); });
  return TQ_OK;
}

tq_status tq_embedding_bag_intx(const uint8_t* packed, const tq_intx_shape* shape, const tq_bags* bags, void* out,
                                tq_type out_type, const tq_parallel* parallel) {
  if (bags->bags == 0) return TQ_OK;
  EmbeddingArgs g = embedding::arguments_of(packed, *shape, bags->index, out, out_type);
  g.offset = bags->offset;
  g.weight = bags->weight;
  g.mode = embedding::bag_mode(bags->mode);
  g.padding = bags->padding;
  const int64_t rows = (bags->offset[bags->bags] - bags->offset[0]) / bags->bags;
  const KernelTable& table = kernels();
  parallel_for(parallel, 0, bags->bags, embedding::grain(rows, shape->k),
               [&](int64_t first, int64_t last) { table.embedding_bags(g, first, last); });
  return TQ_OK;
}
