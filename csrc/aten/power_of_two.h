// The weights of attention's softmax (torchquant/functional/attention.py).
#pragma once

#include <ATen/ATen.h>

#include "common/arithmetic.h"

namespace torchquant {

// 2^x for x <= 0 or NaN; zero below 2^-59.5.
inline at::Tensor power_of_two(const at::Tensor& x) {
  constexpr double kMagic = 0x1.8p+23, kLeast = -60.0;
  const at::Tensor y = at::where(x < kLeast, constant_like(x, kLeast), x);
  const at::Tensor z = y + kMagic, n = z - kMagic, f = y - n;
  at::Tensor p = fmaf(f, 0x1.3a02ccp-7, 0x1.c9fc46p-5);
  p = fmaf(p, f, 0x1.ec0378p-3);
  p = fmaf(p, f, 0x1.62e12cp-1);
  p = fmaf(p, f, 1.0);
  const at::Tensor power = (z.view(at::kInt).bitwise_left_shift(23) + 0x3f800000).view(at::kFloat);
  return p * at::where(n <= kLeast, constant_like(x, 0.0), power);
}

}  // namespace torchquant
