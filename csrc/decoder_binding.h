// torchquant._C.Decoder: the blocks of a decoder as one call.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace torchquant {

void add_decoder(pybind11::module_& m);

}  // namespace torchquant
