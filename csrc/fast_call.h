// C++ functions of tensors as functions of Python, at the least cost a call: positional arguments only, read straight
// from the array that the interpreter passes. pybind11 takes 0.15 us more for eight arguments.
#pragma once

#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace torchquant {

struct Argument {
  PyObject* value;
  const char* function;
  size_t position;  // from 0
};

[[noreturn]] inline void refuse(const Argument& a, const char* wanted) {
  TORCH_CHECK_TYPE(false, a.function, ": argument ", a.position + 1, " must be ", wanted, ", got ",
                   Py_TYPE(a.value)->tp_name);
}

inline void read(const Argument& a, at::Tensor& out) {
  if (!THPVariable_Check(a.value)) refuse(a, "a tensor");
  out = THPVariable_Unpack(a.value);  // a reference of our own: another thread may swap what the object holds
}
inline void read(const Argument& a, bool& out) {
  if (!PyBool_Check(a.value)) refuse(a, "a bool");
  out = a.value == Py_True;
}
inline void read(const Argument& a, int64_t& out) {
  if (!PyIndex_Check(a.value)) refuse(a, "an int");
  THPObjectPtr index(PyNumber_Index(a.value));  // NumPy's integers too
  if (!index) throw python_error();
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(index.get(), &overflow);
  if (overflow) refuse(a, "an int of 64 bits");
}
inline void read(const Argument& a, double& out) {
  if (!PyFloat_Check(a.value) && !PyLong_Check(a.value)) refuse(a, "a float");
  out = PyFloat_AsDouble(a.value);
  if (PyErr_Occurred()) throw python_error();
}
inline void read(const Argument& a, std::string_view& out) {  // lives as long as the argument
  Py_ssize_t size = 0;
  const char* text = PyUnicode_Check(a.value) ? PyUnicode_AsUTF8AndSize(a.value, &size) : nullptr;
  if (PyErr_Occurred()) throw python_error();
  if (!text) refuse(a, "a str");
  out = {text, static_cast<size_t>(size)};
}
inline void read(const Argument& a, std::string& out) {
  std::string_view view;
  read(a, view);
  out = view;
}
inline void read(const Argument& a, at::ScalarType& out) {
  if (!THPDtype_Check(a.value)) refuse(a, "a torch.dtype");
  out = reinterpret_cast<THPDtype*>(a.value)->scalar_type;
}
template <class T>
void read(const Argument& a, std::optional<T>& out) {
  if (a.value != Py_None) read(a, out.emplace());
}
template <class T>
void read(const Argument& a, std::vector<T>& out) {
  if (!PyList_Check(a.value) && !PyTuple_Check(a.value)) refuse(a, "a list or a tuple");
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(a.value);
  for (Py_ssize_t i = 0; i < size; ++i)
    read({PySequence_Fast_GET_ITEM(a.value, i), a.function, a.position}, out.emplace_back());
}

inline PyObject* to_python(at::Tensor&& tensor) { return THPVariable_Wrap(std::move(tensor)); }
inline PyObject* to_python(std::vector<at::Tensor>&& tensors) {
  THPObjectPtr list(PyList_New(static_cast<Py_ssize_t>(tensors.size())));
  if (!list) throw python_error();
  for (size_t i = 0; i < tensors.size(); ++i)
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(std::move(tensors[i])));
  return list.release();
}

template <const char* kName, auto kFunction>
struct FastCall;
template <const char* kName, class Result, class... Parameters, Result (*kFunction)(Parameters...)>
struct FastCall<kName, kFunction> {
  using Values = std::tuple<std::decay_t<Parameters>...>;

  template <size_t... kIndex>
  static Result run(PyObject* const* arguments, std::index_sequence<kIndex...>) {
    Values values;
    (read({arguments[kIndex], kName, kIndex}, std::get<kIndex>(values)), ...);
    const pybind11::gil_scoped_release no_gil;
    return kFunction(std::get<kIndex>(values)...);
  }

  static PyObject* call(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    constexpr size_t kCount = sizeof...(Parameters);
    TORCH_CHECK_TYPE(count == static_cast<Py_ssize_t>(kCount), kName, ": expected ", kCount,
                     " positional arguments, got ", count);
    return to_python(run(arguments, std::make_index_sequence<kCount>()));
    END_HANDLE_TH_ERRORS
  }

  static PyMethodDef method() {  // through void*: the table's field is the signature of all kinds of methods
    return {kName, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call)), METH_FASTCALL, nullptr};
  }
};

}  // namespace torchquant
