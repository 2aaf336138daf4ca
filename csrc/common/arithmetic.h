// fp32 operations in ATen with the roundings of the specification: torchquant/functional/_arithmetic.py in C++. An ATen operation is a kernel of its own, so nothing is contracted across two of them. What to avoid: addcmul
// and lerp (contracted inside), and division by a number or by a tensor on the CPU without dimensions, which CUDA turns
// into a multiplication by the rounded reciprocal.
#pragma once

#include <ATen/ATen.h>

namespace torchquant {

inline at::Tensor constant_like(const at::Tensor& like, double value) {  // fp32, without dimensions, on like's device
  return at::full({}, value, like.options().dtype(at::kFloat));
}

inline at::Tensor divide(const at::Tensor& numerator, double denominator) {
  return at::true_divide(numerator, constant_like(numerator, denominator));
}

inline at::Tensor reciprocal(const at::Tensor& scale) { return at::true_divide(at::ones_like(scale), scale); }

// a * b + c with one rounding, for fp32 tensors. The product is exact in float64; the sum is rounded to odd there, and
// from there to fp32 once (Boldo & Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
inline at::Tensor fmaf(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
  const at::Tensor product = a.to(at::kDouble) * b.to(at::kDouble), addend = c.to(at::kDouble);
  const at::Tensor total = product + addend;
  const at::Tensor part = total - product;  // two-sum (Knuth): error is exactly (product + addend) - total
  const at::Tensor error = (product - (total - part)) + (addend - part);
  const at::Tensor bits = total.view(at::kLong);
  const at::Tensor inexact = (error > 0).logical_or(error < 0);  // infinities and NaN have a NaN error and stay
  const at::Tensor to_odd = inexact.logical_and(bits.bitwise_and(1) == 0);
  const at::Tensor step = ((error > 0) == (total > 0)).to(at::kLong) * 2 - 1;  // away from zero, or towards it
  return at::where(to_odd, bits + step, bits).view(at::kDouble).to(at::kFloat);
}
inline at::Tensor fmaf(const at::Tensor& a, double b, const at::Tensor& c) { return fmaf(a, constant_like(a, b), c); }
inline at::Tensor fmaf(const at::Tensor& a, const at::Tensor& b, double c) { return fmaf(a, b, constant_like(a, c)); }
inline at::Tensor fmaf(const at::Tensor& a, double b, double c) {
  return fmaf(a, constant_like(a, b), constant_like(a, c));
}

}  // namespace torchquant
