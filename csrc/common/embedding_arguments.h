// The arguments of the operators on quantized embeddings: checked, and what follows from them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "common/intx_arguments.h"
#include "core/torchquant_embedding.h"

namespace torchquant::embedding {

inline void check_indices_type(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kLong || t.scalar_type() == at::kInt, op, ": ", name,
                   " must be int64 or int32, got ", describe(t), "; convert it with .to(torch.int64)");
}

inline IntxShape check_table(const char* op, const at::Tensor& input, int64_t num_embeddings, int64_t embedding_dim,
                             int64_t bits, OptInt group_size, bool has_zero_point, at::ScalarType output_dtype) {
  check_indices_type(op, "input", input);
  check_float_type(op, "output_dtype", output_dtype);
  return intx_shape(op, num_embeddings, embedding_dim, bits, group_size, has_zero_point, "num_embeddings",
                    "embedding_dim");
}

inline tq_bag_mode bag_mode_from(const char* op, std::string_view mode) {
  if (mode == "sum") return TQ_BAG_SUM;
  if (mode == "mean") return TQ_BAG_MEAN;
  if (mode == "max") return TQ_BAG_MAX;
  TORCH_CHECK_VALUE(false, op, ": mode must be one of sum, mean, max, got '", mode, "'");
}

// The number of bags.
inline int64_t check_bags(const char* op, const at::Tensor& input, const OptTensor& offsets, const OptTensor& weights,
                          tq_bag_mode mode, bool include_last_offset) {
  if (present(offsets)) {
    TORCH_CHECK_VALUE(input.dim() == 1, op, ": input must be [N] where offsets are given, got ", describe(input),
                      "; each row of a matrix is a bag without offsets");
    check_indices_type(op, "offsets", *offsets);
    TORCH_CHECK_VALUE(offsets->dim() == 1 && offsets->size(0) >= int64_t{include_last_offset}, op,
                      ": offsets must be [bags]", include_last_offset ? " and the end of the last bag" : "", ", got ",
                      describe(*offsets));
  } else {
    TORCH_CHECK_VALUE(input.dim() == 2, op, ": input must be [bags, N], or [N] with offsets, got ", describe(input));
    TORCH_CHECK_VALUE(!include_last_offset, op, ": include_last_offset must come with offsets, got none");
  }
  if (present(weights)) {
    check_float(op, "per_sample_weights", *weights);
    TORCH_CHECK_VALUE(weights->sizes() == input.sizes(), op, ": per_sample_weights must have input's shape ",
                      input.sizes(), ", got ", describe(*weights));
    TORCH_CHECK_VALUE(mode == TQ_BAG_SUM, op, ": per_sample_weights must come with mode = 'sum', got '",
                      mode == TQ_BAG_MEAN ? "mean" : "max", "'");
  }
  return present(offsets) ? offsets->size(0) - int64_t{include_last_offset} : input.size(0);
}

// The row that counts as none, or -1.
inline int64_t padding_row(const char* op, OptInt padding_idx, int64_t rows) {
  if (!padding_idx) return -1;
  TORCH_CHECK_VALUE(-rows <= *padding_idx && *padding_idx < rows, op, ": padding_idx must be from ", -rows, " to ",
                    rows - 1, " (num_embeddings = ", rows, "), got ", *padding_idx);
  return *padding_idx < 0 ? *padding_idx + rows : *padding_idx;
}

}  // namespace torchquant::embedding
