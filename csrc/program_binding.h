// torchquant._C.Program.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace torchquant {

void add_program(pybind11::module_& m);

}  // namespace torchquant
