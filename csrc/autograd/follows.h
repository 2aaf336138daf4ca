// Whether a result must be differentiable.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include "common/tensors.h"

namespace torchquant {

inline bool requires_grad(const at::Tensor& t) { return t.requires_grad(); }
inline bool requires_grad(const OptTensor& t) { return present(t) && t->requires_grad(); }
inline bool has_tangent(const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const OptTensor& t) { return present(t) && has_tangent(*t); }

// Whether op must record its gradient with respect to one of these tensors. A forward-mode tangent raises instead of
// vanishing.
template <class... Tensors>
bool follows(const char* op, const Tensors&... tensors) {
  if (!at::GradMode::is_enabled()) return false;
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(tensors) || ...), op,
                              ": jvp is not implemented (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad); "
                              "use reverse mode: backward(), torch.func.grad, vjp or jacrev");
  return (requires_grad(tensors) || ...);
}

}  // namespace torchquant
