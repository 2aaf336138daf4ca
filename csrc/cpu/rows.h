// A tensor as the core reads it: rows that are a fixed distance apart.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace torchquant {

// The distance between rows (slices along the last dimension), if each row is contiguous and all distances are equal:
// a contiguous tensor, or a slice of one along its last dimension. Otherwise no value.
inline std::optional<int64_t> row_stride(const at::Tensor& t) {
  if (t.dim() < 1 || (t.size(-1) != 1 && t.stride(-1) != 1)) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t expected = 0;
  for (int64_t d = t.dim() - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (!stride) stride = expected = t.stride(d);
    else if (t.stride(d) != expected) return std::nullopt;
    expected *= t.size(d);
  }
  return stride.value_or(t.size(-1));
}

}  // namespace torchquant
