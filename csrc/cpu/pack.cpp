// pack_weight, unpack_weight: the canonical int8 [N, K] <-> the layout the kernels read (csrc/formats/int8_tiles.h).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"

namespace torchquant {
namespace {

constexpr int64_t kGrainBytes = 1 << 18;

at::Tensor pack_weight_op(const at::Tensor& weight) {
  check_weight("pack_weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  at::Tensor packed = at::empty({num_tiles(n), tile_bytes(k)}, weight.options());
  const int8_t* w = weight.const_data_ptr<int8_t>();
  int8_t* out = packed.mutable_data_ptr<int8_t>();
  at::parallel_for(0, num_tiles(n), ceil_div(kGrainBytes, tile_bytes(k)), [&](int64_t first, int64_t last) {
    pack_weight(w, weight.stride(0), weight.stride(1), n, k, first, last, out);
  });
  return packed;
}

at::Tensor unpack_weight_op(const at::Tensor& packed, int64_t out_features, int64_t in_features) {
  check_packed("unpack_weight", packed, out_features, in_features);
  at::Tensor weight = at::empty({out_features, in_features}, packed.options());
  const int8_t* in = packed.const_data_ptr<int8_t>();
  int8_t* out = weight.mutable_data_ptr<int8_t>();
  at::parallel_for(
      0, num_tiles(out_features), ceil_div(kGrainBytes, tile_bytes(in_features)),
      [&](int64_t first, int64_t last) { unpack_weight(in, out_features, in_features, first, last, out); });
  return weight;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("pack_weight", &pack_weight_op);
  m.impl("unpack_weight", &unpack_weight_op);
}

}  // namespace
}  // namespace torchquant
