// Operators without gradients of their own (csrc/autograd). Unregistered, autograd would give their float results a
// requires_grad that nothing can follow. Two kinds:
//
// - Results that are constants to autograd by definition: integers, masks, and the ranges and scales that are observed
//   for them. Autograd looks through these operators, and their results require no gradient.
// - All others refuse tensors that require a gradient. This is what a new operator gets.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <set>
#include <string>

#include "autograd/follows.h"
#include "boxed/complete.h"
#include "boxed/schemas.h"

namespace torchquant {
namespace {

const std::set<std::string> kConstantResults = {
    "quantize",           "dequantize",         "quantize_per_token",
    "pack_weight",        "unpack_weight",      "int8_mm",
    "pack_conv_weight",   "unpack_conv_weight", "quantize_rows",
    "quantize_pack",      "pack_intx_weight",   "unpack_intx_weight",
    "quantize_pack_intx",
    "embedding_intx",  // no argument of it is differentiable
    "quantize_kv",        "dequantize_kv",
    "fake_quantize_mask",  // values and mask for a gradient of one's own
    "in_range",           "positive",           "minmax",
};

void refuse_gradients(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& parameters = op.schema().arguments();
  const auto arguments = torch::jit::last(*stack, parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!arguments[i].isTensor() || !arguments[i].toTensor().defined()) continue;
    const at::Tensor& t = arguments[i].toTensor();
    const std::string& name = parameters[i].name();
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !(requires_grad(t) || has_tangent(t)), short_name(op),
                                ": no gradients, but ", name, " requires one; pass ", name,
                                ".detach(), or call it under torch.no_grad()");
  }
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  op.callBoxed(stack);
}

}  // namespace

void complete_autograd() {
  static torch::Library library(torch::Library::IMPL, "torchquant", c10::DispatchKey::Autograd, __FILE__, __LINE__);
  for (const c10::OperatorHandle& op : operators_of("torchquant")) {
    if (op.hasKernelForDispatchKey(c10::DispatchKey::Autograd)) continue;
    const std::string name = short_name(op);
    if (kConstantResults.count(name)) library.impl(name.c_str(), torch::CppFunction::makeFallthrough());
    else library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
  }
  // The gradients belong to torchquant's operators: autograd looks through torchquant_aten's.
  static torch::Library aten(torch::Library::IMPL, "torchquant_aten", c10::DispatchKey::Autograd, __FILE__, __LINE__);
  for (const c10::OperatorHandle& op : operators_of("torchquant_aten"))
    aten.impl(short_name(op).c_str(), torch::CppFunction::makeFallthrough());
}

}  // namespace torchquant
