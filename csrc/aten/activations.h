// The activation functions, in ATen: torchquant/functional/activations.py in C++.
#pragma once

#include <ATen/ATen.h>

#include "kernels/kernel_table.h"

namespace torchquant {

// fp32 of any shape and strides; NaN stays NaN.
at::Tensor apply_activation(const at::Tensor& x, Activation activation);

}  // namespace torchquant
