// quantize_pack_intx, and qat_linear_intx without gradients.
#include <ATen/ATen.h>

#include <limits>
#include <tuple>

#include "aten/register.h"
#include "aten/rows.h"
#include "common/arithmetic.h"
#include "common/qat_intx.h"

namespace torchquant::qat_intx {
namespace {

// The groups of a weight [N, K] as rows [N * groups, group]. A shorter last group is filled up with its own last weight,
// which changes neither its range nor whether it holds NaN.
at::Tensor group_rows(const at::Tensor& weight, const IntxShape& s) {
  const int64_t missing = s.groups() * s.group() - s.k;
  if (missing == 0) return weight.reshape({s.n * s.groups(), s.group()});
  const at::Tensor last = weight.narrow(1, s.k - 1, 1).expand({s.n, missing});
  return at::cat({weight, last}, 1).reshape({s.n * s.groups(), s.group()});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_pack_intx(const at::Tensor& weight, const OptTensor& scale,
                                                                  int64_t bits, OptInt group_size, int64_t qmin,
                                                                  int64_t qmax, bool symmetric) {
  const char* op = "quantize_pack_intx";
  check_device(op, "scale", scale, weight, "weight");
  const IntxShape s = check_float_weight(op, weight, "scale", scale, bits, group_size, qmin, qmax, symmetric);
  const at::Tensor rows = group_rows(weight, s), q = at::empty(rows.sizes(), rows.options().dtype(at::kChar));
  RowParams p;
  if (present(scale)) {
    p = static_params(rows, scale->reshape({-1, 1}).clamp_min(kLeastScale), {});
    p.inverse = at::where(p.scale.isnan(), p.scale, p.inverse);  // such a group's integers are all 0
  } else {
    p = dynamic_params(rows, qmin, qmax, symmetric);
  }
  quantize_into(q, rows, p, qmin, qmax);
  const std::vector<int64_t> sizes = scale_sizes(s);
  const at::Tensor scales = p.scale.reshape(sizes).contiguous();
  const at::Tensor zeros =
      p.zero.defined() ? p.zero.reshape(sizes).to(at::kChar) : at::zeros(sizes, weight.options().dtype(at::kChar));
  const at::Tensor integers = q.reshape({s.n, s.groups() * s.group()}).narrow(1, 0, s.k);
  const OptTensor own = s.has_zero ? OptTensor(zeros) : std::nullopt;
  return {ops::pack_intx_weight::call<Library::kTorchquantAten>(integers, scales, own, bits, group_size), scales,
          zeros};
}

TORCHQUANT_ATEN_KERNELS(m) { m.impl<ops::quantize_pack_intx>(&quantize_pack_intx); }

TORCHQUANT_ATEN_KERNEL_ON_CUDA(ops::qat_linear_intx, &qat_linear_intx_forward<Library::kTorchquant>)
TORCHQUANT_ATEN_KERNEL_AS_ATEN(ops::qat_linear_intx, &qat_linear_intx_forward<Library::kTorchquantAten>)

}  // namespace
}  // namespace torchquant::qat_intx
