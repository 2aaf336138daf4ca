// Weights of 2 to 8 bits as arguments of the operators on the CPU: the core's shape, and the check of the packed form.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/intx_arguments.h"
#include "core/torchquant_intx.h"

namespace torchquant::intx {

inline tq_intx_shape core_shape(const IntxShape& s) { return {s.n, s.k, s.bits, s.group_size, s.has_zero}; }

// rows and columns: what the operator calls N and K.
inline void check_packed(const char* op, const at::Tensor& packed, const IntxShape& shape,
                         const char* rows = "out_features", const char* columns = "in_features") {
  check_intx_packed(op, packed, num_tiles(shape.n), shape.tile_bytes());
  const uint8_t* tile = packed.const_data_ptr<uint8_t>();
  const int32_t* header = intx_header(tile, shape);
  TORCH_CHECK_VALUE(is_intx_tile_of(tile, shape), op, ": packed was made for ", rows, " = ", header[1], ", ", columns,
                    " = ", header[2], ", bits = ", header[3], ", group_size = ", header[4], " (layout ", header[0],
                    "), but this call has ", rows, " = ", shape.n, ", ", columns, " = ", shape.k,
                    ", bits = ", shape.bits, ", group_size = ", shape.group_size, " (layout ", kIntxVersion,
                    "); pack the weight again with pack_intx_weight");
}

}  // namespace torchquant::intx
