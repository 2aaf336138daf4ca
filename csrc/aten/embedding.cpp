// embedding_intx, embedding_bag_intx: torchquant/functional/embedding.py in ATen.
#include <ATen/ATen.h>

#include <limits>
#include <tuple>
#include <vector>

#include "aten/intx_rows.h"
#include "aten/register.h"
#include "common/device.h"
#include "common/embedding_arguments.h"

namespace torchquant::embedding {
namespace {

// The rows of flat indices, float32 [count, K]: packed rows are selected, and only these are unpacked.
at::Tensor rows_at(const at::Tensor& indices, const at::Tensor& packed, const IntxShape& s) {
  IntxShape some = s;
  some.n = indices.numel();
  const intx::Weight w = intx::unpacked(packed.index_select(0, indices), some);
  const at::Tensor integers = w.q.to(at::kFloat), zero = w.zero.to(at::kFloat);  // exact, and so is their difference
  std::vector<at::Tensor> groups;
  for (int64_t g = 0; g < s.groups(); ++g) {
    const at::Tensor part = integers.narrow(1, g * s.group(), s.inputs(g));
    groups.push_back((part - zero.narrow(1, g, 1)) * w.scale.narrow(1, g, 1));
  }
  return at::cat(groups, 1);
}

at::Tensor flat_indices(const at::Tensor& input) { return input.reshape({-1}).to(at::kLong); }

at::Tensor embedding_intx(const at::Tensor& input, const at::Tensor& packed, int64_t num_embeddings,
                          int64_t embedding_dim, int64_t bits, OptInt group_size, bool has_zero_point,
                          at::ScalarType output_dtype) {
  const char* op = "embedding_intx";
  const IntxShape s =
      check_table(op, input, num_embeddings, embedding_dim, bits, group_size, has_zero_point, output_dtype);
  check_device(op, "packed", packed, input);
  check_intx_packed(op, packed, s.n, intx::row_bytes(s));
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.push_back(s.k);
  if (input.numel() == 0) return at::empty(sizes, packed.options().dtype(output_dtype));
  return rows_at(flat_indices(input), packed, s).to(output_dtype).reshape(sizes);
}

// Where each bag begins, and the end of the last one: int64 [bags + 1], ascending within the indices whatever was given,
// because the values are trusted to fit and not read here.
at::Tensor bag_offsets(const at::Tensor& input, const OptTensor& offsets, int64_t bags, bool include_last_offset) {
  const at::TensorOptions options = input.options().dtype(at::kLong);
  if (!present(offsets)) return at::arange(bags + 1, options) * input.size(1);
  const at::Tensor given = offsets->to(at::kLong);
  const at::Tensor ends = include_last_offset ? given : at::cat({given, at::full({1}, input.numel(), options)});
  return std::get<0>(at::cummax(ends.clamp(0, input.numel()), 0));
}

at::Tensor embedding_bag_intx(const at::Tensor& input, const at::Tensor& packed, const OptTensor& offsets,
                              const OptTensor& per_sample_weights, int64_t num_embeddings, int64_t embedding_dim,
                              int64_t bits, OptInt group_size, bool has_zero_point, std::string_view mode,
                              OptInt padding_idx, bool include_last_offset, at::ScalarType output_dtype) {
  const char* op = "embedding_bag_intx";
  const IntxShape s =
      check_table(op, input, num_embeddings, embedding_dim, bits, group_size, has_zero_point, output_dtype);
  const tq_bag_mode how = bag_mode_from(op, mode);
  const int64_t bags = check_bags(op, input, offsets, per_sample_weights, how, include_last_offset);
  const int64_t padding = padding_row(op, padding_idx, s.n);
  check_device(op, "packed", packed, input);
  check_device(op, "offsets", offsets, input);
  check_device(op, "per_sample_weights", per_sample_weights, input);
  check_intx_packed(op, packed, s.n, intx::row_bytes(s));
  const at::TensorOptions floats = packed.options().dtype(at::kFloat);
  if (bags == 0 || input.numel() == 0) return at::zeros({bags, s.k}, floats.dtype(output_dtype));
  const at::Tensor indices = flat_indices(input), at = bag_offsets(input, offsets, bags, include_last_offset);
  const at::Tensor counts = indices.ne(padding).unsqueeze(1);
  // A bag's rows are added one after the other, from 0; their maximum begins with the first.
  const auto over_bags = [&](const at::Tensor& t, bool max) {
    return at::segment_reduce(t, max ? "max" : "sum", {}, {}, at, 0, /*unsafe=*/true,
                              max ? -std::numeric_limits<double>::infinity() : 0.0);
  };
  at::Tensor rows = rows_at(indices, packed, s);
  if (present(per_sample_weights)) rows = rows * per_sample_weights->to(at::kFloat).reshape({-1, 1});
  rows =
      at::where(counts, rows, at::full({}, how == TQ_BAG_MAX ? -std::numeric_limits<double>::infinity() : 0.0, floats));
  at::Tensor out = over_bags(rows, how == TQ_BAG_MAX);
  const at::Tensor count = over_bags(counts.to(at::kFloat), false);
  if (how == TQ_BAG_MEAN) out = out / count;
  return at::where(count == 0, at::zeros({}, floats), out).to(output_dtype);
}

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::embedding_intx>(&embedding_intx);
  m.impl<ops::embedding_bag_intx>(&embedding_bag_intx);
}

}  // namespace
}  // namespace torchquant::embedding
