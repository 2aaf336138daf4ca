// What the gradients of all families share.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/tensors.h"

namespace torchquant {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Whether a result must be differentiable with respect to t. A forward-mode tangent counts: the function then raises an
// error instead of dropping the tangent.
inline bool follows(const at::Tensor& t) {
  return at::GradMode::is_enabled() && (t.requires_grad() || t._fw_grad(/*level=*/0).defined());
}
inline bool follows(const OptTensor& t) { return present(t) && follows(*t); }

}  // namespace torchquant
