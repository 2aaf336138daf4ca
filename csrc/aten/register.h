// The operators composed of ATen's: they run on CUDA tensors without a CUDA compiler. Nothing in this folder depends on
// the device, so the same functions are registered twice: for torchquant on CUDA, and as torchquant_aten for every device.
// Tests compare torchquant_aten with the CPU's kernels, and faster kernels (torchquant/triton) leave to it what they do
// not cover.
//
// Rules of this folder: no value is read on the host (.item(), nonzero, comparisons in C++), so values inside tensors
// are trusted; every tensor of a call must be on the input's device; a result depends on no order of additions but the
// specification's (torchquant/functional).
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <utility>

#include "operators.h"

namespace torchquant {

// Registers functions so that the ATen operators inside run below autograd and autocast. Autograd would record them
// one by one where it looks through an operator without gradients; autocast would round a product's operands.
class AtenKernels {
 public:
  explicit AtenKernels(torch::Library& library) : library_(library) {}

  template <class Operator>
  void impl(typename Operator::Function* kernel) {
    impl_function(Operator::name, kernel);
  }

 private:
  template <class Result, class... Arguments>
  void impl_function(const char* name, Result (*kernel)(Arguments...)) {
    library_.impl(name, [kernel](Arguments... arguments) -> Result {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      return kernel(std::forward<Arguments>(arguments)...);
    });
  }

  torch::Library& library_;
};

}  // namespace torchquant

// TORCHQUANT_ATEN_KERNELS(m) { m.impl<ops::quantize>(&quantize); } in namespace torchquant, for both libraries; the two
// macros after it for one of them.
#define TORCHQUANT_ATEN_KERNELS(m) TORCHQUANT_ATEN_KERNELS_NAMED(C10_CONCATENATE(aten_kernels_, C10_UID), m)
#define TORCHQUANT_ATEN_KERNELS_NAMED(function, m)                          \
  static void function(AtenKernels& m);                                     \
  TORCH_LIBRARY_IMPL(torchquant, CUDA, library) {                           \
    AtenKernels kernels(library);                                           \
    function(kernels);                                                      \
  }                                                                         \
  TORCH_LIBRARY_IMPL(torchquant_aten, CompositeExplicitAutograd, library) { \
    AtenKernels kernels(library);                                           \
    function(kernels);                                                      \
  }                                                                         \
  static void function(AtenKernels& m)

#define TORCHQUANT_ATEN_KERNEL_ON_CUDA(op, kernel) \
  TORCH_LIBRARY_IMPL(torchquant, CUDA, library) { AtenKernels(library).impl<op>(kernel); }
#define TORCHQUANT_ATEN_KERNEL_AS_ATEN(op, kernel) \
  TORCH_LIBRARY_IMPL(torchquant_aten, CompositeExplicitAutograd, library) { AtenKernels(library).impl<op>(kernel); }
