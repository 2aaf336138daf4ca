// Arguments of the activation kernels.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace torchquant {

// A run of elements: out = activation(x), or activation(x) * up.
struct ActivationArgs {
  const void* x;
  const void* up;  // of x's type (then so is out), or null
  void* out;
  int64_t n;
  FloatType in_type, out_type;
  Activation activation;
};

}  // namespace torchquant
