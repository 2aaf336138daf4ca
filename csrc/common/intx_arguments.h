// The arguments of the operators on weights of 2 to 8 bits: checked, and the shape that follows from them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "common/checks.h"
#include "common/tensors.h"
#include "formats/intx_tiles.h"

namespace torchquant {

// rows, columns: what the operator calls N and K.
inline IntxShape intx_shape(const char* op, int64_t n, int64_t k, int64_t bits, std::optional<int64_t> group_size,
                            bool has_zero, const char* rows = "out_features", const char* columns = "in_features") {
  TORCH_CHECK_VALUE(2 <= bits && bits <= 8, op, ": bits must be from 2 to 8, got ", bits);
  TORCH_CHECK_VALUE(k >= 1 && k <= kMaxK, op, ": ", columns, " must be between 1 and ", kMaxK, ", got ", k);
  TORCH_CHECK_VALUE(n >= 1 && n <= kMaxN, op, ": ", rows, " must be between 1 and ", kMaxN, ", got ", n);
  TORCH_CHECK_VALUE(!group_size || (1 <= *group_size && *group_size <= k), op,
                    ": group_size must be None (one scale per output channel) or between 1 and ", columns, " = ", k,
                    ", got ", group_size.value_or(0));
  const IntxShape shape{n, k, bits, group_size.value_or(0), has_zero};
  TORCH_CHECK_VALUE(shape.group() <= intx_most_inputs(bits), op, ": a scale must have at most ", intx_most_inputs(bits),
                    " inputs for sums that fit int32, got ", shape.group(), "; pass a smaller group_size");
  return shape;
}

// pack_intx_weight's arguments.
inline IntxShape check_intx_weight(const char* op, const at::Tensor& weight, const at::Tensor& scale,
                                   const OptTensor& zero, int64_t bits, std::optional<int64_t> group_size) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kChar, op, ": weight must be int8 [out_features, in_features], got ",
                   describe(weight), "; quantize it first (torchquant.ops.quantize)");
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must be int8 [out_features, in_features], got ", describe(weight));
  const IntxShape shape = intx_shape(op, weight.size(0), weight.size(1), bits, group_size, present(zero));
  const auto check = [&](const char* name, const at::Tensor& t, at::ScalarType type) {
    check_dtype(op, name, t, type);
    const bool channels = t.dim() == 1 && t.size(0) == shape.n && !group_size;
    const bool groups = t.dim() == 2 && t.size(0) == shape.n && t.size(1) == shape.groups() && group_size;
    TORCH_CHECK_VALUE(channels || groups, op, ": ", name, " must be ", dtype_name(type), " [", shape.n,
                      group_size ? ", " + std::to_string(shape.groups()) : "", "], got ", describe(t));
  };
  check("weight_scale", scale, at::kFloat);
  if (present(zero)) check("weight_zero_point", *zero, at::kChar);
  return shape;
}

// linear_static_intx's parameters of the input.
inline void check_static_input(const char* op, const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero,
                               int64_t qmin, int64_t qmax) {
  check_input_parameter(op, "input_scale", scale, at::kFloat, input);
  if (present(zero)) check_input_parameter(op, "input_zero_point", *zero, at::kInt, input);
  TORCH_CHECK_VALUE(-128 <= qmin && qmin < qmax && qmax <= 127, op,
                    ": input_qmin < input_qmax must lie within -128 .. 127, got ", qmin, " and ", qmax);
}

inline void check_intx_packed(const char* op, const at::Tensor& packed, int64_t rows, int64_t columns) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, op, ": packed must be the uint8 result of pack_intx_weight, got ",
                   describe(packed));
  TORCH_CHECK_VALUE(packed.dim() == 2 && packed.size(0) == rows && packed.size(1) == columns && packed.is_contiguous(),
                    op, ": packed must be the uint8 [", rows, ", ", columns, "] result of pack_intx_weight on ",
                    packed.device(), " for this call's out_features, in_features, bits and group_size, got ",
                    describe(packed),
                    "; a weight packed on another type of device goes through unpack_intx_weight there and "
                    "pack_intx_weight here");
}

}  // namespace torchquant
