// quantize_pack_intx, and qat_linear_intx where no gradient is asked for.
#include "common/qat_intx.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/core_call.h"
#include "cpu/intx.h"
#include "cpu/output.h"

namespace torchquant::qat_intx {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_pack_intx(const at::Tensor& weight, const OptTensor& scale,
                                                                  int64_t bits, OptInt group_size, int64_t qmin,
                                                                  int64_t qmax, bool symmetric) {
  const IntxShape shape =
      check_float_weight("quantize_pack_intx", weight, "scale", scale, bits, group_size, qmin, qmax, symmetric);
  const std::vector<int64_t> sizes = scale_sizes(shape);
  at::Tensor scales = at::empty(sizes, weight.options().dtype(at::kFloat));
  at::Tensor zeros = at::empty(sizes, weight.options().dtype(at::kChar));
  const bool fixed = present(scale);
  if (fixed) scales.copy_(scale->detach());
  const at::Tensor w = as_rows(weight);
  at::Tensor packed = empty_output({num_tiles(shape.n), shape.tile_bytes()}, weight.options().dtype(at::kByte));
  const tq_rows rows = rows_of(w, shape.k);
  const tq_row_mode mode = fixed ? TQ_STATIC : (symmetric ? TQ_SYMMETRIC : TQ_ASYMMETRIC);
  const tq_intx_shape core = intx::core_shape(shape);
  check_status(tq_quantize_pack_intx(&rows, mode, static_cast<int32_t>(qmin), static_cast<int32_t>(qmax), &core,
                                     packed.mutable_data_ptr<uint8_t>(), scales.mutable_data_ptr<float>(),
                                     zeros.mutable_data_ptr<int8_t>(), &kTorchThreads));
  return {packed, scales, zeros};
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::quantize_pack_intx::implement(m, &quantize_pack_intx);
  ops::qat_linear_intx::implement(m, &qat_linear_intx_forward<Library::kTorchquant>);
}

}  // namespace
}  // namespace torchquant::qat_intx
