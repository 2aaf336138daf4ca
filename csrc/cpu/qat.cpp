// quantize_rows, quantize_pack, and qat_linear where no gradient is asked for.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/qat_linear.h"
#include "cpu/core_call.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant {
namespace {

constexpr int64_t kBlockBytes = 4 << 20;  // of a weight's rows in scratch memory

// Every row its own copy of the zero point, checked against the range.
int32_t one_zero_point(const char* op, const std::optional<at::Tensor>& zero_point, int64_t qmin, int64_t qmax) {
  if (!zero_point || !zero_point->defined()) return 0;
  check_dtype(op, "zero_point", *zero_point, at::kInt);
  TORCH_CHECK_VALUE(zero_point->numel() == 1, op, ": zero_point must hold one value, got ", describe(*zero_point));
  const int32_t zero = *zero_point->const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(qmin <= zero && zero <= qmax, op, ": zero_point must be from ", qmin, " to ", qmax, ", got ", zero);
  return zero;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_rows(const at::Tensor& input,
                                                             const std::optional<at::Tensor>& scale,
                                                             const std::optional<at::Tensor>& zero_point, int64_t qmin,
                                                             int64_t qmax, bool symmetric) {
  const char* op = "quantize_rows";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  const bool fixed = scale && scale->defined();
  check_signed_range(op, qmin, qmax, symmetric && !fixed);
  tq_row_quantization how{};
  how.mode = fixed ? TQ_STATIC : (symmetric ? TQ_SYMMETRIC : TQ_ASYMMETRIC);
  how.qmin = static_cast<int32_t>(qmin);
  how.qmax = static_cast<int32_t>(qmax);
  if (fixed) {
    check_dtype(op, "scale", *scale, at::kFloat);
    TORCH_CHECK_VALUE(scale->numel() == 1, op, ": scale must hold one value, got ", describe(*scale));
    how.scale = *scale->const_data_ptr<float>();
    if (how.scale < kLeastScale) how.scale = kLeastScale;  // a learned scale may be less between two steps
    how.zero_point = one_zero_point(op, zero_point, qmin, qmax);
  } else {
    TORCH_CHECK_VALUE(!zero_point || !zero_point->defined(), op,
                      ": zero_point must be None without scale (each row finds its own), got one");
  }
  const at::Tensor x = as_rows(input);
  std::vector<int64_t> token_sizes(x.sizes().begin(), x.sizes().end());
  token_sizes.back() = 1;
  at::Tensor q = empty_output(x.sizes(), x.options().dtype(at::kChar));
  at::Tensor row_scale = at::empty(token_sizes, x.options().dtype(at::kFloat));
  at::Tensor row_zero = at::empty(token_sizes, x.options().dtype(at::kInt));
  tq_rows rows = rows_of(x, x.size(-1));
  rows.m = row_scale.numel();  // also where the rows have no elements
  check_status(tq_quantize_rows(&rows, &how, q.mutable_data_ptr<int8_t>(), row_scale.mutable_data_ptr<float>(),
                                row_zero.mutable_data_ptr<int32_t>(), &kTorchThreads));
  return {q, row_scale, row_zero};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_pack(const at::Tensor& weight,
                                                             const std::optional<at::Tensor>& scale, int64_t qmin,
                                                             int64_t qmax, bool symmetric) {
  const char* op = "quantize_pack";
  check_float_weight(op, weight, scale, qmin, qmax, symmetric);
  const int64_t n = weight.size(0), k = weight.size(1);
  at::Tensor row_scale, row_zero = at::empty({n}, weight.options().dtype(at::kInt));
  const bool fixed = scale && scale->defined();
  if (fixed) {
    row_scale = at::empty({n}, weight.options().dtype(at::kFloat));
    row_scale.copy_(scale->detach().expand({n}));
  } else {
    row_scale = at::empty({n}, weight.options().dtype(at::kFloat));
  }
  const at::Tensor w = as_rows(weight);
  const PackedShape shape = packed_shape(PackedFormat::kInt8Tiles, n, k);
  at::Tensor packed = empty_output({shape.rows, shape.columns}, weight.options().dtype(at::kChar));
  const tq_rows rows = rows_of(w, k);
  const tq_row_mode mode = fixed ? TQ_STATIC : (symmetric ? TQ_SYMMETRIC : TQ_ASYMMETRIC);
  check_status(tq_quantize_pack(&rows, mode, static_cast<int32_t>(qmin), static_cast<int32_t>(qmax),
                                packed.mutable_data_ptr<int8_t>(), row_scale.mutable_data_ptr<float>(),
                                row_zero.mutable_data_ptr<int32_t>(), &kTorchThreads));
  return {packed, row_scale, row_zero};
}

// grad [m, n] times the fake-quantized weight [n, k], which never exists as a whole: blocks of its rows go through
// scratch memory that is kept. A fresh tensor of the weight's size costs more in page faults than the quantization.
at::Tensor mm_fake_quantized(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& scale,
                             const std::optional<at::Tensor>& zero_point, int64_t qmin, int64_t qmax) {
  const char* op = "mm_fake_quantized";
  check_mm_fake_quantized(op, grad, weight, scale, zero_point, qmin, qmax);
  const int64_t n = weight.size(0), k = weight.size(1), m = grad.size(0);
  const bool has_zero = zero_point && zero_point->defined();
  at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor out = empty_output({m, k}, grad.options());
  if (m == 0 || n == 0 || k == 0) return out.zero_();
  const at::Tensor w = as_rows(weight);
  const tq_rows all = rows_of(w, k);
  const at::Tensor scales = scale.expand({n}).contiguous();
  const at::Tensor zeros = has_zero ? zero_point->expand({n}).contiguous() : at::Tensor();
  const float* s = scales.const_data_ptr<float>();
  const int32_t* z = has_zero ? zeros.const_data_ptr<int32_t>() : nullptr;
  for (int64_t i = 0; i < n; ++i) check_scale(op, "scale", s[i]);
  if (z) check_zero_points(op, "zero_point", z, n, qmin, qmax);
  const int64_t height = std::min(n, std::max<int64_t>(64, kBlockBytes / (4 * k)));
  float* scratch = static_cast<float*>(tq_scratch(height * k * 4));
  if (!scratch) throw std::bad_alloc();
  for (int64_t first = 0; first < n; first += height) {
    tq_rows part_rows = all;
    part_rows.x = static_cast<const float*>(all.x) + first * all.stride;
    const int64_t rows = part_rows.m = std::min(height, n - first);
    const tq_scales part_scales = {
        rows, s + first, z ? z + first : nullptr, nullptr, static_cast<int32_t>(qmin), static_cast<int32_t>(qmax)};
    check_status(tq_fake_quantize_rows(&part_rows, &part_scales, scratch, &kTorchThreads));
    const at::Tensor block = at::from_blob(scratch, {rows, k}, grad.options()), part = grad.narrow(1, first, rows);
    if (first == 0) at::mm_out(out, part, block);
    else at::addmm_out(out, out, part, block);
  }
  return out;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::mm_fake_quantized::implement(m, &mm_fake_quantized);
  ops::quantize_rows::implement(m, &quantize_rows);
  ops::quantize_pack::implement(m, &quantize_pack);
  ops::qat_linear::implement(m, &qat::qat_linear_forward<Library::kTorchquant>);
}

}  // namespace
}  // namespace torchquant
