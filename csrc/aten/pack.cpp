// pack_weight, unpack_weight, quantize_pack: the canonical int8 [N, K] or a float weight <-> int8_rows.h.
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/device.h"
#include "aten/packed.h"
#include "aten/register.h"
#include "aten/rows.h"
#include "common/tensors.h"

namespace torchquant {
namespace {

at::Tensor empty_packed(const at::Tensor& like, int64_t n, int64_t k) {
  return at::empty({layout_rows(n, k), padded_k(k)}, like.options().dtype(at::kChar));
}
at::Tensor weights_of(const at::Tensor& packed, int64_t n, int64_t k) { return packed.narrow(0, 0, n).narrow(1, 0, k); }

// All of the layout but the weights themselves, which stand in their place already.
void complete(const at::Tensor& packed, int64_t n, int64_t k) {
  if (k < padded_k(k)) packed.narrow(0, 0, n).narrow(1, k, padded_k(k) - k).zero_();
  packed.narrow(0, n, packed.size(0) - n).zero_();
  packed_sums(packed, n).narrow(0, 0, n).unsqueeze(1).copy_(row_sums(packed.narrow(0, 0, n)));
}

at::Tensor pack_weight(const at::Tensor& weight) {
  check_weight("pack_weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  const at::Tensor packed = empty_packed(weight, n, k);
  weights_of(packed, n, k).copy_(weight);
  complete(packed, n, k);
  return packed;
}

at::Tensor unpack_weight(const at::Tensor& packed, int64_t out_features, int64_t in_features) {
  check_packed_rows("unpack_weight", packed, out_features, in_features);
  return weights_of(packed, out_features, in_features).clone(at::MemoryFormat::Contiguous);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_pack(const at::Tensor& weight, const OptTensor& scale,
                                                             const OptTensor& zero_point, int64_t qmin, int64_t qmax,
                                                             bool symmetric) {
  const char* op = "quantize_pack";
  check_device(op, "scale", scale, weight, "weight");
  check_float_weight(op, weight, scale, zero_point, qmin, qmax, symmetric);
  const int64_t n = weight.size(0), k = weight.size(1);
  RowParams p;
  if (scale && scale->defined()) {
    p = static_params(weight, scale->reshape({-1, 1}).clamp_min(kLeastScale), {});
    p.inverse = at::where(p.scale.isnan(), p.scale, p.inverse);  // such a row's integers are all 0
  } else {
    p = dynamic_params(weight, qmin, qmax, symmetric);
  }
  const at::Tensor packed = empty_packed(weight, n, k);
  quantize_into(weights_of(packed, n, k), weight, p, qmin, qmax);
  complete(packed, n, k);
  const at::Tensor zero = p.zero.defined() ? p.zero.reshape({n}) : at::zeros({n}, weight.options().dtype(at::kInt));
  return {packed, p.scale.reshape({n}), zero};
}

template <class Library>
void implement_pack(Library& m) {
  m.impl("pack_weight", &pack_weight);
  m.impl("unpack_weight", &unpack_weight);
  m.impl("quantize_pack", &quantize_pack);
}

TORCHQUANT_IMPLEMENT_ATEN(implement_pack)

}  // namespace
}  // namespace torchquant
