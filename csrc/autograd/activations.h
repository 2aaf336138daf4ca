// Derivatives of the activation functions, composed of operators that have derivatives themselves.
#pragma once

#include <ATen/ATen.h>

#include <string>

namespace torchquant {

// d activation / d x at `pre`, times grad.
inline at::Tensor activation_backward(const std::string& activation, const at::Tensor& grad, const at::Tensor& pre) {
  if (activation == "relu") return at::where(pre > 0, grad, at::zeros_like(grad));
  if (activation == "gelu") return at::gelu_backward(grad, pre, "none");
  if (activation == "gelu_tanh") return at::gelu_backward(grad, pre, "tanh");
  if (activation == "tanh") return at::tanh_backward(grad, at::tanh(pre));
  if (activation == "sigmoid") return at::sigmoid_backward(grad, at::sigmoid(pre));
  if (activation == "relu6") return at::where(at::logical_and(pre > 0, pre < 6), grad, at::zeros_like(grad));
  if (activation == "hardswish") return at::hardswish_backward(grad, pre);
  if (activation == "hardsigmoid")  // not at::hardsigmoid_backward, which has no gradient of its own
    return at::where(at::logical_and(pre > -3, pre < 3), grad * (1.0 / 6.0), at::zeros_like(grad));
  if (activation == "leaky_relu") return at::where(pre > 0, grad, grad * 0.01);
  if (activation == "silu") {  // not at::silu_backward, which has no gradient of its own
    const at::Tensor s = at::sigmoid(pre);
    return grad * s * (1 + pre * (1 - s));
  }
  return grad;
}

}  // namespace torchquant
