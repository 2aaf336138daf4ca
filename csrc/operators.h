// One handle per operator: its name and its C++ type, for callers and implementations. The schemas and what
// the arguments mean are in ops.cpp, in the same order; torch compares both when an operator is called for the first time.
//
//   ops::rms_norm::call(input, weight, eps, false)                 through the dispatcher: autograd, tracing and all
//   ops::rms_norm::call_below_autograd(input, weight, eps, false)  from a gradient: the kernel without another gradient
//   ops::rms_norm::implement(m, &rms_norm)                         in TORCH_LIBRARY_IMPL; another type does not compile
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/tensors.h"

namespace torchquant {

// torchquant: every device has its own kernels. torchquant_aten: composed of ATen's operators on all devices.
enum class Library { kTorchquant, kTorchquantAten };

namespace ops {

template <class Self, class Function>
struct Operator;

template <class Self, class Result, class... Arguments>
struct Operator<Self, Result(Arguments...)> {
  using Function = Result(Arguments...);

  template <Library library = Library::kTorchquant>
  static Result call(Arguments... arguments) {
    static const auto handle = find<library, Function>();  // looking it up takes longer than many a kernel
    return handle.call(std::forward<Arguments>(arguments)...);
  }

  static Result call_below_autograd(Arguments... arguments) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    return call(std::forward<Arguments>(arguments)...);
  }

  // Integers that may be symbols of a traced program.
  template <class T>
  using Symbolic = std::conditional_t<std::is_same_v<T, int64_t>, c10::SymInt, T>;
  static Result call_symbolic(Symbolic<Arguments>... arguments) {
    static const auto handle = find<Library::kTorchquant, Result(Symbolic<Arguments>...)>();
    return handle.call(std::forward<Symbolic<Arguments>>(arguments)...);
  }

  static void implement(torch::Library& library, Function* kernel) { library.impl(Self::name, kernel); }

 private:
  template <Library library, class Type>
  static c10::TypedOperatorHandle<Type> find() {
    const std::string space = library == Library::kTorchquant ? "torchquant::" : "torchquant_aten::";
    return c10::Dispatcher::singleton().findSchemaOrThrow((space + Self::name).c_str(), "").template typed<Type>();
  }
};

#define TORCHQUANT_OPERATOR(operator_name, ...)                 \
  struct operator_name : Operator<operator_name, __VA_ARGS__> { \
    static constexpr char name[] = #operator_name;              \
  }

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
using OptScalarType = std::optional<at::ScalarType>;
using Strings = c10::List<std::string>;
using Tensors = std::vector<at::Tensor>;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// affine
TORCHQUANT_OPERATOR(quantize, Tensor(const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, OptInt, OptInt,
                                     ScalarType));
TORCHQUANT_OPERATOR(dequantize, Tensor(const Tensor&, const Tensor&, const OptTensor&, OptInt, OptInt, ScalarType));
TORCHQUANT_OPERATOR(quantize_per_token, ThreeTensors(const Tensor&, bool));

// linear
TORCHQUANT_OPERATOR(pack_weight, Tensor(const Tensor&));
TORCHQUANT_OPERATOR(unpack_weight, Tensor(const Tensor&, int64_t, int64_t));
TORCHQUANT_OPERATOR(int8_mm, Tensor(const Tensor&, const Tensor&, int64_t));
TORCHQUANT_OPERATOR(linear_dynamic, Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                                           const OptTensor&, int64_t, bool, std::string_view, OptScalarType, int64_t));
TORCHQUANT_OPERATOR(linear_dynamic_split, Tensors(const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                                                  const OptTensor&, IntArrayRef, bool, const Strings&, OptScalarType));
TORCHQUANT_OPERATOR(linear_static, Tensor(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const Tensor&,
                                          const OptTensor&, const OptTensor&, int64_t, std::string_view, ScalarType,
                                          const OptTensor&, int64_t, int64_t, int64_t, int64_t, int64_t));

// intx
TORCHQUANT_OPERATOR(pack_intx_weight, Tensor(const Tensor&, const Tensor&, const OptTensor&, int64_t, OptInt));
TORCHQUANT_OPERATOR(unpack_intx_weight, ThreeTensors(const Tensor&, int64_t, int64_t, int64_t, OptInt, bool));
TORCHQUANT_OPERATOR(linear_dynamic_intx, Tensor(const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t,
                                                OptInt, bool, bool, std::string_view, OptScalarType, int64_t));
TORCHQUANT_OPERATOR(linear_static_intx,
                    Tensor(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const OptTensor&, int64_t,
                           int64_t, OptInt, bool, std::string_view, ScalarType, int64_t, int64_t));
TORCHQUANT_OPERATOR(linear_intx, Tensor(const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, OptInt, bool,
                                        std::string_view, OptScalarType));

// conv
TORCHQUANT_OPERATOR(pack_conv_weight, Tensor(const Tensor&, int64_t));
TORCHQUANT_OPERATOR(unpack_conv_weight, Tensor(const Tensor&, IntArrayRef, int64_t));
TORCHQUANT_OPERATOR(conv_static, Tensor(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const Tensor&,
                                        const OptTensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, int64_t,
                                        std::string_view, const OptTensor&, const OptTensor&, int64_t, ScalarType,
                                        const OptTensor&, int64_t, int64_t, int64_t, int64_t, int64_t));
TORCHQUANT_OPERATOR(conv_dynamic,
                    Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, IntArrayRef, IntArrayRef,
                           IntArrayRef, IntArrayRef, int64_t, bool, std::string_view, OptScalarType, int64_t));

// activations
TORCHQUANT_OPERATOR(activation, Tensor(const Tensor&, std::string_view, OptScalarType));
TORCHQUANT_OPERATOR(gated_activation, Tensor(const Tensor&, const Tensor&, std::string_view));

// norms
TORCHQUANT_OPERATOR(rms_norm, Tensor(const Tensor&, const OptTensor&, double, bool));
TORCHQUANT_OPERATOR(layer_norm, Tensor(const Tensor&, const OptTensor&, const OptTensor&, double, const OptTensor&));

// attention
TORCHQUANT_OPERATOR(attention,
                    Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, std::optional<double>, bool));

// fake_quantize
TORCHQUANT_OPERATOR(fake_quantize,
                    Tensor(const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, OptInt, OptInt));
TORCHQUANT_OPERATOR(fake_quantize_mask,
                    TwoTensors(const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, OptInt, OptInt));
TORCHQUANT_OPERATOR(in_range, Tensor(const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, OptInt, OptInt));
TORCHQUANT_OPERATOR(positive, Tensor(const Tensor&));
TORCHQUANT_OPERATOR(mask_gradient, Tensor(const Tensor&, const Tensor&));
TORCHQUANT_OPERATOR(fake_quantize_learned,
                    Tensor(const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t, double, OptInt, OptInt));
TORCHQUANT_OPERATOR(fake_quantize_learned_backward, ThreeTensors(const Tensor&, const Tensor&, const Tensor&,
                                                                 const OptTensor&, int64_t, int64_t, OptInt, OptInt));
TORCHQUANT_OPERATOR(minmax, ThreeTensors(const Tensor&, OptInt, OptInt));

// qat
TORCHQUANT_OPERATOR(quantize_rows,
                    ThreeTensors(const Tensor&, const OptTensor&, const OptTensor&, int64_t, int64_t, bool));
TORCHQUANT_OPERATOR(quantize_pack, ThreeTensors(const Tensor&, const OptTensor&, int64_t, int64_t, bool));
TORCHQUANT_OPERATOR(mm_fake_quantized,
                    Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, int64_t, int64_t));
TORCHQUANT_OPERATOR(qat_linear, Tensor(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&,
                                       const OptTensor&, const OptTensor&, int64_t, int64_t, bool, const OptTensor&,
                                       int64_t, int64_t, bool, std::string_view, double, double, OptScalarType));

// qat_intx
TORCHQUANT_OPERATOR(quantize_pack_intx,
                    ThreeTensors(const Tensor&, const OptTensor&, int64_t, OptInt, int64_t, int64_t, bool));
TORCHQUANT_OPERATOR(qat_linear_intx,
                    Tensor(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, OptInt, int64_t, int64_t,
                           bool, OptInt, bool, std::string_view, double, OptScalarType));

#undef TORCHQUANT_OPERATOR

}  // namespace ops
}  // namespace torchquant
