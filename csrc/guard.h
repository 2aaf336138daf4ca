// torchquant._C.Guard: whether Python objects are still what they were.
#pragma once

#include <Python.h>

namespace torchquant {

// Adds the type to the module; -1 and an exception where that fails.
int add_guard(PyObject* module);

}  // namespace torchquant
