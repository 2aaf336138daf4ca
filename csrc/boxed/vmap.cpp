// torch.func.vmap over every operator. Two rules:
//
// - Operators that work on rows or single elements treat any number of leading dimensions alike. Where only their input
//   has a batch dimension, it becomes one more of these, and one call does all the work.
// - Everything else is called once per entry of the batch, and the results are stacked. torch's own loop would do the
//   same, with a warning for each operator and without results that are lists.
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "boxed/complete.h"
#include "boxed/schemas.h"

namespace torchquant {
namespace {

using c10::IValue;

// The arguments of these operators that have leading dimensions of their own choice, and how many dimensions behind them
// the operator needs.
struct Rows {
  std::set<std::string> arguments;
  int64_t least_dimensions;
  bool weight_groups = false;  // the groups are those of a weight, not of the rows
};
const std::map<std::string, Rows> kRows = {
    {"activation", {{"input"}, 0}},
    {"gated_activation", {{"gate", "up"}, 0}},
    {"rms_norm", {{"input"}, 1}},
    {"layer_norm", {{"input", "residual"}, 1}},
    {"quantize_per_token", {{"input"}, 1}},
    {"quantize_rows", {{"input"}, 1}},
    {"int8_mm", {{"input"}, 1}},
    {"linear_dynamic", {{"input"}, 1}},
    {"linear_dynamic_split", {{"input"}, 1}},
    {"linear_dynamic_intx", {{"input"}, 1, true}},
    {"linear_static_intx", {{"input"}, 1, true}},
    {"linear_intx", {{"input"}, 1, true}},
    {"qat_linear", {{"input"}, 1}},
    {"qat_linear_intx", {{"input"}, 1, true}},
    {"quantize", {{"input"}, 0}},
    {"dequantize", {{"input"}, 0}},
    {"fake_quantize", {{"input"}, 0}},
    {"fake_quantize_learned", {{"input"}, 0}},
};

// One call of an operator: its arguments, those with a batch have it as their first dimension.
struct Call {
  const c10::OperatorHandle& op;
  std::vector<IValue> arguments;
  std::vector<bool> batched;
  int64_t size = 0;

  const std::string& name(size_t i) const { return op.schema().arguments()[i].name(); }

  std::vector<IValue> operator()(std::vector<IValue> values) const {
    op.callBoxed(&values);
    return values;
  }
};

at::Tensor tensor_of(const IValue& value) { return value.isTensor() ? value.toTensor() : at::Tensor(); }

// The arguments for one call with all entries of the batch as leading dimension, or none where that is not the same.
std::optional<std::vector<IValue>> as_rows(const Call& call) {
  const auto found = kRows.find(short_name(call.op));
  if (found == kRows.end()) return std::nullopt;
  const Rows& rows = found->second;
  std::vector<IValue> values = call.arguments;
  for (size_t i = 0; i < values.size(); ++i) {
    const bool is_rows = rows.arguments.count(call.name(i));
    if (call.batched[i] && !is_rows) return std::nullopt;
    const at::Tensor t = tensor_of(values[i]);
    if (is_rows && t.defined()) {
      if (t.dim() - int64_t{call.batched[i]} < rows.least_dimensions) return std::nullopt;
      if (!call.batched[i]) {
        std::vector<c10::SymInt> sizes = t.sym_sizes().vec();
        sizes.insert(sizes.begin(), call.size);
        values[i] = t.expand_symint(sizes);
      }
    }
    // A group's scales have the input's leading dimensions, and an axis counts from the front.
    if (call.name(i) == "group_size" && !values[i].isNone() && !rows.weight_groups) return std::nullopt;
    if (call.name(i) == "axis" && !values[i].isNone()) return std::nullopt;
  }
  return values;
}

IValue stacked(const std::vector<IValue>& results) {
  if (results[0].isTensor()) {
    std::vector<at::Tensor> tensors;
    for (const IValue& result : results) tensors.push_back(result.toTensor());
    return at::stack(tensors);
  }
  std::vector<at::Tensor> list;
  for (size_t member = 0; member < results[0].toTensorList().size(); ++member) {
    std::vector<at::Tensor> tensors;
    for (const IValue& result : results) tensors.push_back(result.toTensorList().get(member));
    list.push_back(at::stack(tensors));
  }
  return list;
}

std::vector<IValue> one_by_one(const Call& call) {
  TORCH_CHECK_VALUE(call.size > 0, short_name(call.op), ": torch.func.vmap needs at least one entry, got a batch of 0");
  std::vector<std::vector<IValue>> results(call.op.schema().returns().size());
  for (int64_t entry = 0; entry < call.size; ++entry) {
    std::vector<IValue> values = call.arguments;
    for (size_t i = 0; i < values.size(); ++i)
      if (call.batched[i]) values[i] = values[i].toTensor().select(0, entry);
    values = call(std::move(values));
    for (size_t i = 0; i < results.size(); ++i) results[i].push_back(values[i]);
  }
  std::vector<IValue> outputs;
  for (const auto& result : results) outputs.push_back(stacked(result));
  return outputs;
}

IValue with_batch(const IValue& result, int64_t level) {
  if (result.isTensor()) return at::functorch::makeBatched(result.toTensor(), 0, level);
  std::vector<at::Tensor> list;
  for (const at::Tensor& t : result.toTensorVector()) list.push_back(at::functorch::makeBatched(t, 0, level));
  return list;
}

// The level of the innermost vmap that one of these tensors belongs to, or 0 (levels count from 1). A tensor of an outer
// vmap alone could wait until its turn comes, but may as well be served now.
int64_t level_of(const std::vector<IValue>& arguments) {
  int64_t level = 0;
  for (const IValue& argument : arguments) {
    const at::Tensor t = tensor_of(argument);
    if (const auto* batch = t.defined() ? at::functorch::maybeGetBatchedImpl(t) : nullptr)
      level = std::max(level, batch->level());
  }
  return level;
}

void over_batch(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_batches(c10::DispatchKey::FuncTorchBatched);
  const size_t count = op.schema().arguments().size();
  Call call{op, torch::jit::pop(*stack, count), std::vector<bool>(count)};
  const int64_t level = level_of(call.arguments);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor t = tensor_of(call.arguments[i]);
    const auto* batch = t.defined() ? at::functorch::maybeGetBatchedImpl(t) : nullptr;
    if (!batch || batch->level() != level) continue;
    call.batched[i] = true;
    call.size = batch->value().size(batch->bdim());
    call.arguments[i] = batch->value().movedim(batch->bdim(), 0);
  }
  const bool any = std::find(call.batched.begin(), call.batched.end(), true) != call.batched.end();
  std::vector<IValue> outputs;
  if (!any) {
    outputs = call(call.arguments);
  } else {
    const auto rows = as_rows(call);
    outputs = rows ? call(*rows) : one_by_one(call);
    for (IValue& output : outputs) output = with_batch(output, level);
  }
  stack->insert(stack->end(), outputs.begin(), outputs.end());
}

}  // namespace

void complete_vmap() {
  static torch::Library library(torch::Library::IMPL, "torchquant", c10::DispatchKey::FuncTorchBatched, __FILE__,
                                __LINE__);
  for (const c10::OperatorHandle& op : operators_of("torchquant"))
    library.impl(short_name(op).c_str(), torch::CppFunction::makeFromBoxedFunction<&over_batch>());
}

}  // namespace torchquant
