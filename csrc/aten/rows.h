// Float rows -> int8. The parameters are dynamic, from each row's range, or given, with a flag for rows that hold NaN.
// A row that must give NaN has scale NaN (numerics, sections 2 and 6).
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <tuple>
#include <vector>

#include "common/arithmetic.h"
#include "common/checks.h"
#include "aten/blocks.h"

namespace torchquant {

struct RowParams {
  at::Tensor scale;     // float32 [M, 1]; NaN: the row must give NaN
  at::Tensor inverse;   // float32 [M, 1] or [1, 1]; NaN: all q of the row are its zero point
  at::Tensor zero;      // int32 [M, 1] or [1, 1]; undefined: 0
  bool within = false;  // |x * inverse| rounds to qmax at most: the scale comes from the row's greatest |x|
};

// [..., K] -> [M, K], a view where that is possible.
inline at::Tensor as_matrix(const at::Tensor& t) {
  const int64_t k = t.size(-1);
  return t.reshape({k == 0 ? 0 : t.numel() / k, k});
}

// Parameters from the range of each row of x [M, K], K >= 1: dynamic_params of csrc/kernels/affine.inc.
inline RowParams dynamic_params(const at::Tensor& x, int64_t qmin, int64_t qmax, bool symmetric) {
  const auto range = at::aminmax(x, /*dim=*/-1, /*keepdim=*/true);  // NaN where the row holds one
  at::Tensor least = std::get<0>(range).to(at::kFloat), greatest = std::get<1>(range).to(at::kFloat);
  const at::Tensor magnitude = at::maximum(greatest, least.neg());
  const at::Tensor undefined = (magnitude < std::numeric_limits<double>::infinity()).logical_not_();
  const at::Tensor none = magnitude == 0;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto finish = [&](const at::Tensor& scale) {
    return scale.clamp_min(kLeastScale).masked_fill_(none, 1.0).masked_fill_(undefined, nan);
  };
  RowParams p;
  if (symmetric) {
    p.scale = finish(divide(magnitude, static_cast<double>(qmax)));
    p.within = true;
  } else {
    least = least.clamp_max(0.0);
    greatest = greatest.clamp_min(0.0);
    const double steps = static_cast<double>(qmax - qmin);
    const at::Tensor extent = greatest - least;  // infinite if it exceeds the largest number: then half of both
    const at::Tensor halves = divide(greatest * 0.5 - least * 0.5, steps) * 2.0;
    p.scale = finish(at::where(extent.isinf(), halves, divide(extent, steps)));
    const at::Tensor zero = at::rsub(at::true_divide(least, p.scale), static_cast<double>(qmin)).round_();
    p.zero = zero.clamp_(qmin, qmax).masked_fill_(none, 0.0).masked_fill_(undefined, 0.0).to(at::kInt);
  }
  p.inverse = torchquant::reciprocal(p.scale);
  return p;
}

// scale float32 [1, 1] for all rows; zero int32 [1, 1], or undefined for 0.
inline RowParams static_params(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero) {
  const at::Tensor has_nan = x.amax(-1, /*keepdim=*/true).isnan();  // a maximum propagates NaN without [M, K] flags
  return {scale.expand({x.size(0), 1}).masked_fill(has_nan, std::numeric_limits<double>::quiet_NaN()),
          torchquant::reciprocal(scale), zero};
}

// q [M, K] = clamp(rint(x * inverse) + zero, qmin, qmax). The sum is taken before the clamp, with the same result: adding
// rounds monotonically and is exact where the sum is within the limits.
inline void quantize_into(const at::Tensor& q, const at::Tensor& x, const RowParams& p, int64_t qmin, int64_t qmax) {
  const at::Tensor zero = p.zero.defined() ? p.zero.to(at::kFloat) : p.zero;
  in_blocks<4>({x, q, p.inverse, zero}, [&](const std::array<at::Tensor, 4>& part) {
    at::Tensor y = at::mul(part[0], part[2]);  // float32, also of a half type: both have dimensions
    y.round_().nan_to_num_(0.0);
    if (part[3].defined()) y.add_(part[3]);
    if (!p.within) y.clamp_(qmin, qmax);
    part[1].copy_(y);
  });
}

using QuantizedRows = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline QuantizedRows rows_of(const at::Tensor& input, const RowParams& p, const at::Tensor& q) {  // in input's shape
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = 1;
  const at::Tensor zero = p.zero.defined() ? p.zero.expand_as(p.scale).clone(at::MemoryFormat::Contiguous)
                                           : at::zeros_like(p.scale, p.scale.options().dtype(at::kInt));
  return {q.view(input.sizes()), p.scale.view(sizes), zero.view(sizes)};
}

inline QuantizedRows quantized_rows(const at::Tensor& input, int64_t qmin, int64_t qmax, bool symmetric) {
  const at::Tensor x = as_matrix(input), q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const RowParams p = dynamic_params(x, qmin, qmax, symmetric);
  quantize_into(q, x, p, qmin, qmax);
  return rows_of(input, p, q);
}

// Rows without elements: the range is zero, and scale and zero point are given or 1 and 0.
inline QuantizedRows empty_rows(const at::Tensor& input, const at::Tensor& scale, const at::Tensor& zero) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  const at::Tensor q = at::empty(sizes, input.options().dtype(at::kChar));
  sizes.back() = 1;
  const at::Tensor scales = at::ones(sizes, input.options().dtype(at::kFloat));
  const at::Tensor zeros = at::zeros(sizes, input.options().dtype(at::kInt));
  if (scale.defined()) scales.copy_(scale.reshape({}));
  if (zero.defined()) zeros.copy_(zero.reshape({}));
  return {q, scales, zeros};
}

// sum_k q[m, k] of int8 [M, K], int32 [M, 1]
inline at::Tensor row_sums(const at::Tensor& q) {
  const at::Tensor sums = at::empty({q.size(0), 1}, q.options().dtype(at::kInt));
  const int64_t rows = q.size(0), height = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, q.size(1)));
  for (int64_t first = 0; first < rows; first += height) {  // sum() first converts its operand to int32
    const int64_t count = std::min(height, rows - first);
    sums.narrow(0, first, count).copy_(q.narrow(0, first, count).sum(-1, /*keepdim=*/true, at::kInt));
  }
  return sums;
}

}  // namespace torchquant
