// pack_weight, unpack_weight: the canonical int8 [N, K] <-> the layout that the kernels read (csrc/formats/int8_tiles.h).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/core_call.h"

namespace torchquant {
namespace {

at::Tensor pack_weight_op(const at::Tensor& weight) {
  check_weight("pack_weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  at::Tensor packed = at::empty({tq_tiles(n), tq_tile_bytes(k)}, weight.options());
  check_status(tq_pack_weight(weight.const_data_ptr<int8_t>(), weight.stride(0), weight.stride(1), n, k,
                              packed.mutable_data_ptr<int8_t>(), &kTorchThreads));
  return packed;
}

at::Tensor unpack_weight_op(const at::Tensor& packed, int64_t out_features, int64_t in_features) {
  check_packed("unpack_weight", packed, out_features, in_features);
  at::Tensor weight = at::empty({out_features, in_features}, packed.options());
  check_status(tq_unpack_weight(packed.const_data_ptr<int8_t>(), out_features, in_features,
                                weight.mutable_data_ptr<int8_t>(), &kTorchThreads));
  return weight;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("pack_weight", &pack_weight_op);
  m.impl("unpack_weight", &unpack_weight_op);
}

}  // namespace
}  // namespace torchquant
