// Gradients of attention, in fp32 and by its formula, in operators that have gradients themselves. The rounding of the
// products to bfloat16 counts as the identity.
#include <ATen/ExpandUtils.h>

#include <limits>
#include <optional>

#include "autograd/function.h"
#include "operators.h"

namespace torchquant {
namespace {

at::Tensor heads_like(const at::Tensor& t, const at::Tensor& query) {  // a key head for every query head
  const c10::SymInt group = query.sym_size(1) / t.sym_size(1);
  return t.to(at::kFloat).repeat_interleave_symint(group, 1);
}

at::Tensor sum_of_heads(const at::Tensor& grad, const at::Tensor& t) {
  if (grad.sym_size(1) == t.sym_size(1)) return grad.to(t.scalar_type());
  const c10::SymInt group = grad.sym_size(1) / t.sym_size(1);
  return grad.unflatten_symint(1, {t.sym_size(1), group}).sum(2).to(t.scalar_type());
}

struct Attention {
  static Variable forward(AutogradContext* ctx, const Variable& query, const Variable& key, const Variable& value,
                          const OptTensor& mask, std::optional<double> scale, bool causal) {
    ctx->save_for_backward({query, key, value, mask.value_or(Variable())});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["causal"] = causal;
    return ops::attention::call_below_autograd(query, key, value, mask, scale, causal);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor query = saved[0].to(at::kFloat), mask = saved[3], grad = grads[0].to(at::kFloat);
    const at::Tensor key = heads_like(saved[1], query), value = heads_like(saved[2], query);
    const auto scale = ctx->saved_data["scale"].toOptional<double>();
    const at::Scalar factor(scale ? c10::SymFloat(*scale)
                                  : c10::SymFloat(1.0) / static_cast<c10::SymFloat>(query.sym_size(3)).sqrt());
    const double lowest = -std::numeric_limits<double>::infinity();
    at::Tensor scores = at::matmul(query, key.transpose(2, 3)) * factor;
    if (mask.defined()) scores = mask.scalar_type() == at::kBool ? scores.masked_fill(~mask, lowest) : scores + mask;
    if (ctx->saved_data["causal"].toBool())
      scores = scores.masked_fill(at::ones_like(scores, at::kBool).triu(1), lowest);
    // A query without any key has weights of zero, not NaN.
    const at::Tensor none = (scores == lowest).all(-1, true);
    const at::Tensor weights = at::softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0);
    const at::Tensor grad_weights = at::matmul(grad, value.transpose(2, 3));
    const at::Tensor grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, true));
    Variable grad_query, grad_key, grad_value, grad_mask;
    if (ctx->needs_input_grad(0)) grad_query = (at::matmul(grad_scores, key) * factor).to(saved[0].scalar_type());
    if (ctx->needs_input_grad(1))
      grad_key = sum_of_heads(at::matmul(grad_scores.transpose(2, 3), query) * factor, saved[1]);
    if (ctx->needs_input_grad(2)) grad_value = sum_of_heads(at::matmul(weights.transpose(2, 3), grad), saved[2]);
    if (mask.defined() && mask.scalar_type() != at::kBool && ctx->needs_input_grad(3))
      grad_mask = at::sum_to(grad_scores, mask.sym_sizes()).to(mask.scalar_type());
    return {grad_query, grad_key, grad_value, grad_mask, Variable(), Variable()};
  }
};

at::Tensor attention_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const OptTensor& mask, std::optional<double> scale, bool causal) {
  if (follows(ops::attention::name, query, key, value, mask))
    return Differentiable<Attention>::apply(query, key, value, mask, scale, causal);
  return ops::attention::call_below_autograd(query, key, value, mask, scale, causal);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) { ops::attention::implement(m, &attention_autograd); }

}  // namespace
}  // namespace torchquant
