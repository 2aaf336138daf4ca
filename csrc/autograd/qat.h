// qat_linear without gradients: what it computes, on every device that has the integer operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace torchquant {

enum class OperatorsOf { kTorchquant, kTorchquantAten };

// library: whose linear layer it is, torchquant's with whatever kernels it has on the device or torchquant_aten's.
template <OperatorsOf library>
at::Tensor qat_linear_forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                              const std::optional<at::Tensor>& input_scale,
                              const std::optional<at::Tensor>& input_zero_point,
                              const std::optional<at::Tensor>& input_offset, int64_t input_qmin, int64_t input_qmax,
                              bool input_symmetric, const std::optional<at::Tensor>& weight_scale, int64_t weight_qmin,
                              int64_t weight_qmax, bool weight_symmetric, std::string_view activation,
                              double input_grad_factor, double weight_grad_factor,
                              std::optional<at::ScalarType> output_dtype);

}  // namespace torchquant
