// The gradient of embedding_bag_intx to per_sample_weights: for each index, its row times the gradient of its bag.
#include "autograd/function.h"
#include "operators.h"

namespace torchquant::embedding {
namespace {

struct EmbeddingBagIntx {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& packed, const OptTensor& offsets,
                          const OptTensor& per_sample_weights, int64_t num_embeddings, int64_t embedding_dim,
                          int64_t bits, OptInt group_size, bool has_zero_point, std::string_view mode,
                          OptInt padding_idx, bool include_last_offset, at::ScalarType output_dtype) {
    ctx->save_for_backward({input, packed, offsets.value_or(Variable())});
    ctx->saved_data["num_embeddings"] = num_embeddings;
    ctx->saved_data["embedding_dim"] = embedding_dim;
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["group_size"] = group_size;
    ctx->saved_data["has_zero_point"] = has_zero_point;
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["weights_dtype"] = static_cast<int64_t>(per_sample_weights->scalar_type());
    return ops::embedding_bag_intx::call_below_autograd(input, packed, offsets, per_sample_weights, num_embeddings,
                                                        embedding_dim, bits, group_size, has_zero_point, mode,
                                                        padding_idx, include_last_offset, output_dtype);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const at::Tensor &input = saved[0], &offsets = saved[2];
    const int64_t rows = number("num_embeddings");
    const at::Tensor of_indices = ops::embedding_intx::call(
        input, saved[1], rows, number("embedding_dim"), number("bits"),
        ctx->saved_data["group_size"].toOptional<int64_t>(), ctx->saved_data["has_zero_point"].toBool(), at::kFloat);
    const at::Tensor grad = grads[0].to(at::kFloat);
    at::Tensor of_bags, outside;
    if (offsets.defined()) {
      const at::Tensor place = at::arange(input.sym_size(0), input.options().dtype(at::kLong));
      const at::Tensor bag = at::searchsorted(offsets.to(at::kLong), place, /*out_int32=*/false, /*right=*/true) - 1;
      outside = bag >= grad.sym_size(0);  // behind the last offset
      of_bags = grad.index_select(0, at::where(outside, at::zeros_like(bag), bag));
    } else {
      of_bags = grad.unsqueeze(1);
    }
    at::Tensor grad_weights = (of_indices * of_bags).sum(-1);
    if (outside.defined()) grad_weights = grad_weights.masked_fill(outside, 0);
    if (const OptInt padding = ctx->saved_data["padding_idx"].toOptional<int64_t>())
      grad_weights = grad_weights.masked_fill(input.eq(*padding < 0 ? *padding + rows : *padding), 0);
    const auto dtype = static_cast<at::ScalarType>(number("weights_dtype"));
    return {Variable(), Variable(), Variable(), grad_weights.to(dtype),
            Variable(), Variable(), Variable(), Variable(),
            Variable(), Variable(), Variable(), Variable(),
            Variable()};
  }
};

at::Tensor embedding_bag_intx_autograd(const at::Tensor& input, const at::Tensor& packed, const OptTensor& offsets,
                                       const OptTensor& per_sample_weights, int64_t num_embeddings,
                                       int64_t embedding_dim, int64_t bits, OptInt group_size, bool has_zero_point,
                                       std::string_view mode, OptInt padding_idx, bool include_last_offset,
                                       at::ScalarType output_dtype) {
  if (!follows(ops::embedding_bag_intx::name, per_sample_weights))
    return ops::embedding_bag_intx::call_below_autograd(input, packed, offsets, per_sample_weights, num_embeddings,
                                                        embedding_dim, bits, group_size, has_zero_point, mode,
                                                        padding_idx, include_last_offset, output_dtype);
  return Differentiable<EmbeddingBagIntx>::apply(input, packed, offsets, per_sample_weights, num_embeddings,
                                                 embedding_dim, bits, group_size, has_zero_point, mode, padding_idx,
                                                 include_last_offset, output_dtype);
}

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) { ops::embedding_bag_intx::implement(m, &embedding_bag_intx_autograd); }

}  // namespace
}  // namespace torchquant::embedding
