// Arguments of an operator that may be missing.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace torchquant {

using OptTensor = std::optional<at::Tensor>;
using OptInt = std::optional<int64_t>;

// An optional tensor can be missing in two ways: no value, or an undefined tensor (torch's own convention).
inline bool present(const OptTensor& t) { return t && t->defined(); }
inline OptTensor optional_of(const at::Tensor& t) { return t.defined() ? OptTensor(t) : std::nullopt; }

}  // namespace torchquant
