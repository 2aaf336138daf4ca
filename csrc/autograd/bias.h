// The gradient of a bias. A function saves "bias_edge" and "bias_dtype" in its forward.
#pragma once

#include "autograd/function.h"
#include "common/tensors.h"

namespace torchquant {

// Autograd numbers the tensors that are present, so the bias's number depends on the optional tensors before it.
inline bool bias_wants_gradient(AutogradContext* ctx) {
  const int64_t edge = ctx->saved_data["bias_edge"].toInt();
  return edge >= 0 && ctx->needs_input_grad(static_cast<size_t>(edge));
}

// In the bias's own type, summed in float32 over all but the last dimension.
inline at::Tensor bias_gradient(AutogradContext* ctx, const at::Tensor& grad) {
  const auto type = static_cast<at::ScalarType>(ctx->saved_data["bias_dtype"].toInt());
  return grad.reshape_symint({-1, grad.sym_size(-1)}).sum(0).to(type);
}

inline int64_t dtype_number(const OptTensor& bias) {
  return static_cast<int64_t>(present(bias) ? bias->scalar_type() : at::kFloat);
}

}  // namespace torchquant
