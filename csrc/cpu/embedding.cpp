// embedding_intx, embedding_bag_intx.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "common/embedding_arguments.h"
#include "cpu/core_call.h"
#include "cpu/intx.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant::embedding {
namespace {

// int64, contiguous, each a row of the weight.
at::Tensor checked_indices(const char* op, const at::Tensor& input, int64_t rows) {
  const at::Tensor indices = input.to(at::kLong).contiguous();
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const int64_t count = indices.numel();
  uint64_t greatest = 0;  // negative indices are the greatest of all
  for (int64_t i = 0; i < count; ++i) greatest = std::max(greatest, static_cast<uint64_t>(index[i]));
  if (greatest >= static_cast<uint64_t>(rows))
    for (int64_t i = 0; i < count; ++i)
      TORCH_CHECK_INDEX(0 <= index[i] && index[i] < rows, op, ": input must hold indices from 0 to ", rows - 1,
                        " (num_embeddings = ", rows, "), got ", index[i]);
  return indices;
}

at::Tensor embedding_intx(const at::Tensor& input, const at::Tensor& packed, int64_t num_embeddings,
                          int64_t embedding_dim, int64_t bits, OptInt group_size, bool has_zero_point,
                          at::ScalarType output_dtype) {
  const char* op = "embedding_intx";
  const IntxShape shape =
      check_table(op, input, num_embeddings, embedding_dim, bits, group_size, has_zero_point, output_dtype);
  intx::check_packed(op, packed, shape, "num_embeddings", "embedding_dim");
  const at::Tensor indices = checked_indices(op, input, shape.n);
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.push_back(shape.k);
  const at::Tensor out = empty_output(sizes, packed.options().dtype(output_dtype));
  const tq_intx_shape core = intx::core_shape(shape);
  check_status(tq_embedding_intx(packed.const_data_ptr<uint8_t>(), &core, indices.const_data_ptr<int64_t>(),
                                 indices.numel(), out.mutable_data_ptr(), type_of(out), &kTorchThreads));
  return out;
}

// Where each bag begins, and the end of the last one.
std::vector<int64_t> bag_offsets(const char* op, const at::Tensor& input, const OptTensor& offsets, int64_t bags,
                                 bool include_last_offset) {
  const int64_t count = input.numel();
  std::vector<int64_t> at;
  if (!present(offsets)) {
    for (int64_t b = 0; b <= bags; ++b) at.push_back(b * input.size(1));
    return at;
  }
  const at::Tensor given = offsets->to(at::kLong).contiguous();
  at.assign(given.const_data_ptr<int64_t>(), given.const_data_ptr<int64_t>() + given.numel());
  if (!include_last_offset) at.push_back(count);
  TORCH_CHECK_VALUE(at[0] == 0 || bags == 0, op, ": offsets must begin with 0, got ", at[0]);
  for (int64_t b = 0; b < bags; ++b)
    TORCH_CHECK_VALUE(at[b] <= at[b + 1] && at[b + 1] <= count, op, ": offsets must ascend to at most ", count,
                      ", the number of indices, got ", at[b], " and ", at[b + 1]);
  return at;
}

at::Tensor embedding_bag_intx(const at::Tensor& input, const at::Tensor& packed, const OptTensor& offsets,
                              const OptTensor& per_sample_weights, int64_t num_embeddings, int64_t embedding_dim,
                              int64_t bits, OptInt group_size, bool has_zero_point, std::string_view mode,
                              OptInt padding_idx, bool include_last_offset, at::ScalarType output_dtype) {
  const char* op = "embedding_bag_intx";
  const IntxShape shape =
      check_table(op, input, num_embeddings, embedding_dim, bits, group_size, has_zero_point, output_dtype);
  tq_bags call{};
  call.mode = bag_mode_from(op, mode);
  call.bags = check_bags(op, input, offsets, per_sample_weights, call.mode, include_last_offset);
  call.padding = padding_row(op, padding_idx, shape.n);
  intx::check_packed(op, packed, shape, "num_embeddings", "embedding_dim");
  const at::Tensor indices = checked_indices(op, input, shape.n);
  const std::vector<int64_t> at = bag_offsets(op, input, offsets, call.bags, include_last_offset);
  at::Tensor weights;
  if (present(per_sample_weights)) weights = per_sample_weights->to(at::kFloat).contiguous();  // exact
  call.index = indices.const_data_ptr<int64_t>();
  call.offset = at.data();
  call.weight = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
  const at::Tensor out = empty_output({call.bags, shape.k}, packed.options().dtype(output_dtype));
  const tq_intx_shape core = intx::core_shape(shape);
  check_status(tq_embedding_bag_intx(packed.const_data_ptr<uint8_t>(), &core, &call, out.mutable_data_ptr(),
                                     type_of(out), &kTorchThreads));
  return out;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::embedding_intx::implement(m, &embedding_intx);
  ops::embedding_bag_intx::implement(m, &embedding_bag_intx);
}

}  // namespace
}  // namespace torchquant::embedding
