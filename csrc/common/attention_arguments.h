// The checks of attention on every device, and its mask in the form that the kernels read.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace torchquant {

inline constexpr int64_t kMaxAttentionLength = int64_t{1} << 20;

struct AttentionShape {
  int64_t batch, heads, queries, d, key_heads, keys, dv;
  double factor;  // of the scores, in powers of 2
};

inline AttentionShape check_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                      std::optional<double> scale) {
  const char* op = "attention";
  check_float(op, "query", query);
  check_dtype(op, "key", key, query.scalar_type());
  check_dtype(op, "value", value, query.scalar_type());
  TORCH_CHECK_VALUE(query.dim() == 4, op, ": query must be [batch, heads, queries, d], got ", describe(query));
  const int64_t batch = query.size(0), heads = query.size(1), d = query.size(3);
  TORCH_CHECK_VALUE(d >= 1, op, ": query must be [batch, heads, queries, d] with d at least 1, got ", describe(query));
  TORCH_CHECK_VALUE(key.dim() == 4 && key.size(0) == batch && key.size(3) == d, op,
                    ": key must be [batch, key heads, keys, d] with batch = ", batch, " and d = ", d, ", got ",
                    describe(key));
  TORCH_CHECK_VALUE(key.size(1) >= 1 ? heads % key.size(1) == 0 : heads == 0, op,
                    ": key heads must divide the query's ", heads, " heads, got ", key.size(1));
  TORCH_CHECK_VALUE(
      value.dim() == 4 && value.size(0) == batch && value.size(1) == key.size(1) && value.size(2) == key.size(2), op,
      ": value must be [", batch, ", ", key.size(1), ", ", key.size(2), ", e], as key is, got ", describe(value));
  TORCH_CHECK_VALUE(query.size(2) <= kMaxAttentionLength && key.size(2) <= kMaxAttentionLength, op, ": at most ",
                    kMaxAttentionLength, " queries and keys, got ", describe(query), " and ", describe(key));
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(d)));
  TORCH_CHECK_VALUE(std::abs(factor) <= 0x1p126, op, ": scale must be finite, got ", factor);
  return {batch, heads, query.size(2), d, key.size(1), key.size(2), value.size(3), factor * 0x1.71547652b82fep+0};
}

// bool or fp32, expanded to [B, H, Q, K], keys next to each other.
inline at::Tensor expanded_mask(const at::Tensor& mask, at::IntArrayRef shape, const char* op = "attention") {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool || is_float_input(mask.scalar_type()), op,
                   ": mask must be bool, float32, bfloat16 or float16, got ", describe(mask));
  const bool fits = mask.dim() <= 4 && at::is_expandable_to(mask.sizes(), shape);
  TORCH_CHECK_VALUE(fits, op, ": mask must broadcast to [batch, heads, queries, keys] = ", shape, ", got ",
                    describe(mask));
  at::Tensor m = mask.scalar_type() == at::kBool ? mask : mask.to(at::kFloat);
  if (m.dim() == 0) m = m.reshape({1});
  if (m.size(-1) != shape[3]) {  // one value for all keys
    std::vector<int64_t> sizes(m.sizes().begin(), m.sizes().end());
    sizes.back() = shape[3];
    m = m.expand(sizes);
  }
  if (m.size(-1) != 1 && m.stride(-1) != 1) m = m.contiguous();
  return m.expand(shape);
}

}  // namespace torchquant
