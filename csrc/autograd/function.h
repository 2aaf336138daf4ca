// What the gradients of all families share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <memory>
#include <utility>

#include "autograd/follows.h"
#include "common/tensors.h"

namespace torchquant {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Takes the state of torch.func's transforms away from this thread until show() is called or the object is destroyed.
class HiddenTransforms {
 public:
  HiddenTransforms() : outer_(innermost()), state_(std::move(at::functorch::functorchTLSAccessor())) {
    innermost() = this;
  }
  ~HiddenTransforms() {
    give_back();
    innermost() = outer_;
  }
  HiddenTransforms(const HiddenTransforms&) = delete;
  HiddenTransforms& operator=(const HiddenTransforms&) = delete;

  static void show() {
    if (innermost()) innermost()->give_back();
  }

 private:
  static HiddenTransforms*& innermost() {
    static thread_local HiddenTransforms* value = nullptr;
    return value;
  }
  void give_back() {
    if (state_) at::functorch::functorchTLSAccessor() = std::move(state_);
  }

  HiddenTransforms* outer_;
  std::unique_ptr<at::functorch::FuncTorchTLSBase> state_;
};

// Whether a torch.func transform is running (torch's headers offer no other way to ask).
inline bool inside_transforms() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return false;
  try {
    transforms->checkSupportsCppAutogradFunction();
    return false;
  } catch (const c10::Error&) {
    return true;
  }
}

// Gradient has forward(ctx, arguments...) and backward(ctx, grads); apply(arguments...) records one for the other.
//
// torch refuses functions written in C++ inside torch.func.grad and vjp, because it cannot see whether they compute with
// operators alone, which is all that a transform can follow. Those in this folder do, so the transforms are hidden from
// the check that torch makes before it calls forward.
template <class Gradient>
struct Differentiable : torch::autograd::Function<Differentiable<Gradient>> {
  template <class... Arguments>
  static auto forward(AutogradContext* ctx, Arguments&&... arguments) {
    HiddenTransforms::show();
    // torch has turned gradients off; an outer transform needs them. Forward itself computes below autograd.
    const at::AutoGradMode gradients(inside_transforms());
    return Gradient::forward(ctx, std::forward<Arguments>(arguments)...);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return Gradient::backward(ctx, std::move(grads));
  }

  template <class... Arguments>
  static auto apply(Arguments&&... arguments) {
    const HiddenTransforms hidden;
    return torch::autograd::Function<Differentiable<Gradient>>::apply(std::forward<Arguments>(arguments)...);
  }
};

// For operators whose gradient cannot be differentiated: torch.func.grad and vjp always ask for a gradient that can.
inline void refuse_transforms(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(!inside_transforms(), op,
                              ": no gradient under torch.func.grad and vjp, which may differentiate it once more; call "
                              "backward() or torch.autograd.grad on the result instead");
}

}  // namespace torchquant
