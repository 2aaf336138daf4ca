// What runs on CUDA tensors without a compiler for them: the operators composed of ATen's. Nothing in this folder
// depends on the device, so the same functions are registered twice: for torchquant on CUDA, and as torchquant_aten for
// every device, where the tests compare them with the CPU's kernels and where faster kernels (torchquant/triton) leave
// what they do not cover.
//
// Rules of this folder: no value is read on the host (.item(), nonzero, comparisons in C++), so values inside tensors
// are trusted; every tensor of a call lies on the input's device; a result depends on no order of additions but the
// specification's (torchquant/functional).
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <utility>

namespace torchquant {

// Registers functions so that the ATen operators inside run below autograd and autocast. Autograd would record them, one
// by one, where the operator itself has no gradient and is looked through; autocast would round a product's operands.
class AtenKernels {
 public:
  explicit AtenKernels(torch::Library& library) : library_(library) {}

  template <class Result, class... Arguments>
  void impl(const char* name, Result (*kernel)(Arguments...)) {
    library_.impl(name, [kernel](Arguments... arguments) -> Result {
      at::AutoDispatchBelowADInplaceOrView no_autograd;
      c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      return kernel(std::forward<Arguments>(arguments)...);
    });
  }

 private:
  torch::Library& library_;
};

// The gradients belong to torchquant's operators: autograd looks through torchquant_aten's.
class NoGradients {
 public:
  explicit NoGradients(torch::Library& library) : library_(library) {}

  template <class Kernel>
  void impl(const char* name, Kernel) {
    library_.impl(name, torch::CppFunction::makeFallthrough());
  }

 private:
  torch::Library& library_;
};

}  // namespace torchquant

// implement: template <class Library> void implement(Library& m) { m.impl("name", &function); ... }
#define TORCHQUANT_IMPLEMENT_ATEN(implement) \
  TORCHQUANT_IMPLEMENT_ON_CUDA(implement)    \
  TORCHQUANT_IMPLEMENT_AS_ATEN(implement)

#define TORCHQUANT_IMPLEMENT_ON_CUDA(implement) \
  TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {     \
    torchquant::AtenKernels kernels(m);         \
    implement(kernels);                         \
  }

#define TORCHQUANT_IMPLEMENT_AS_ATEN(implement)                       \
  TORCH_LIBRARY_IMPL(torchquant_aten, CompositeExplicitAutograd, m) { \
    torchquant::AtenKernels kernels(m);                               \
    implement(kernels);                                               \
  }                                                                   \
  TORCH_LIBRARY_IMPL(torchquant_aten, Autograd, m) {                  \
    torchquant::NoGradients none(m);                                  \
    implement(none);                                                  \
  }
