// Who calls a layer: functions of Python that read the interpreter's frames. torchquant/nn/call_guard.py uses them; in
// Python the same reads take several microseconds.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace torchquant {

extern PyMethodDef caller_methods[];

}  // namespace torchquant
