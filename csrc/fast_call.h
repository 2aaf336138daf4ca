// Operators as functions of Python, at the least cost per call: positional arguments only, read straight from the array
// that the interpreter passes. pybind11 takes 0.15 us more for eight arguments.
#pragma once

#include <ATen/autocast_mode.h>
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

template <class T>
void read(const Argument& a, c10::List<T>& out) {
  std::vector<T> values;
  read(a, values);
  for (T& value : values) out.push_back(std::move(value));
}

inline PyObject* to_python(at::Tensor&& tensor) { return THPVariable_Wrap(std::move(tensor)); }
inline PyObject* to_python(std::vector<at::Tensor>&& tensors) {
  THPObjectPtr list(PyList_New(static_cast<Py_ssize_t>(tensors.size())));
  if (!list) throw python_error();
  for (size_t i = 0; i < tensors.size(); ++i)
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(std::move(tensors[i])));
  return list.release();
}

// What an argument is read into: views need something that holds their elements.
template <class T>
struct Stored {
  using Type = std::decay_t<T>;
};
template <>
struct Stored<at::IntArrayRef> {
  using Type = std::vector<int64_t>;
};

using OptScalarType = std::optional<at::ScalarType>;

// The output's type is no argument of a fast call: this function of the first argument chooses it.
using ChooseType = OptScalarType (*)(const at::Tensor&);
inline OptScalarType same_type(const at::Tensor& /*input*/) { return std::nullopt; }

// Inside an autocast region the output has autocast's type.
inline OptScalarType autocast_type(const at::Tensor& input) {
  const at::DeviceType device = input.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return std::nullopt;
  return at::autocast::get_autocast_dtype(device);
}

template <class Operator, ChooseType kChooseType, class Function>
struct FastCallOf;

// An operator (operators.h) without the detour through torch.ops, which parses every argument against the schema (about
// 2 us, 5 for the many arguments of linear_static). The call still goes through the dispatcher: autograd, fake tensors
// and tracing see the operator.
template <class Operator, ChooseType kChooseType = &same_type>
using FastCall = FastCallOf<Operator, kChooseType, typename Operator::Function>;

template <class Operator, ChooseType kChooseType, class Result, class... Parameters>
struct FastCallOf<Operator, kChooseType, Result(Parameters...)> {
  static constexpr size_t kParameters = sizeof...(Parameters);
  static constexpr bool kChosen[] = {std::is_same_v<Parameters, OptScalarType>...};

  // The position among Python's arguments of parameter i.
  static constexpr size_t position(size_t i) {
    size_t count = 0;
    for (size_t j = 0; j < i; ++j) count += !kChosen[j];
    return count;
  }

  using Values = std::tuple<typename Stored<Parameters>::Type...>;

  template <size_t kIndex>
  static void read_one(PyObject* const* arguments, Values& values) {
    if constexpr (kChosen[kIndex]) std::get<kIndex>(values) = kChooseType(std::get<0>(values));
    else read({arguments[position(kIndex)], Operator::name, position(kIndex)}, std::get<kIndex>(values));
  }

  template <size_t... kIndex>
  static Result run(PyObject* const* arguments, std::index_sequence<kIndex...>) {
    Values values;
    (read_one<kIndex>(arguments, values), ...);
    const pybind11::gil_scoped_release no_gil;
    return Operator::call(std::get<kIndex>(values)...);
  }

  static PyObject* call(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    constexpr size_t kCount = position(kParameters);
    TORCH_CHECK_TYPE(count == static_cast<Py_ssize_t>(kCount), Operator::name, ": expected ", kCount,
                     " positional arguments, got ", count);
    return to_python(run(arguments, std::make_index_sequence<kParameters>()));
    END_HANDLE_TH_ERRORS
  }

  static PyMethodDef method() {  // through void*: the table's field is the signature of all kinds of methods
    return {Operator::name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call)), METH_FASTCALL, nullptr};
  }
};

}  // namespace torchquant
