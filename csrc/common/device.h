// The dispatcher sends a call to CUDA when any of its tensors lies there: what lies elsewhere is refused here.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace torchquant {

inline void check_device(const char* op, const char* name, const at::Tensor& t, const at::Tensor& input,
                         const char* first = "input") {
  TORCH_CHECK_VALUE(t.device() == input.device(), op, ": ", name, " must be on the ", first, "'s device ",
                    input.device(), ", got ", t.device(), "; move it with .to(device)");
}
inline void check_device(const char* op, const char* name, const std::optional<at::Tensor>& t, const at::Tensor& input,
                         const char* first = "input") {
  if (t && t->defined()) check_device(op, name, *t, input, first);
}

}  // namespace torchquant
