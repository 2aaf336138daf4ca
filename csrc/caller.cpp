#include "caller.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <frameobject.h>
#include <torch/csrc/utils/object_ptr.h>

#include <unordered_map>
#include <utility>

namespace torchquant {
namespace {

using Object = THPObjectPtr;

// What the functions compare with; set_up gives the values, which live as long as the process.
struct Known {
  PyObject* call_impl = nullptr;  // the code of nn.Module._call_impl
  PyObject* wrapped_call_impl = nullptr;
  PyObject* module_getattr = nullptr;
  PyObject* object_getattribute = nullptr;
  PyObject* containers = nullptr;  // a dictionary: class, its method __getitem__
  PyObject* replaced = nullptr;    // the class ReplacedActivation
  PyObject* module_class = nullptr;
  PyObject* module_call = nullptr;
  PyObject* learn = nullptr;  // finds what surrounds a call: learn(frame)
} known;

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

struct Names {
  PyObject* getattr = interned("__getattr__");
  PyObject* getattribute = interned("__getattribute__");
  PyObject* getitem = interned("__getitem__");
  PyObject* modules = interned("_modules");
  PyObject* forward = interned("forward");
  PyObject* call = interned("__call__");
  PyObject* compiled = interned("_compiled_call_impl");
  PyObject* original_class = interned("original_class");
  PyObject* original_forward = interned("original_forward");
  PyObject* hooks[4] = {interned("_forward_pre_hooks"), interned("_forward_hooks"), interned("_backward_hooks"),
                        interned("_backward_pre_hooks")};
};

const Names& names() {
  static const Names values;
  return values;
}

// A call in a function: its code and the offset of the instruction. The table holds the code, so that its address cannot
// be used again.
struct SiteHash {
  size_t operator()(const std::pair<PyObject*, int>& site) const {
    return std::hash<void*>()(site.first) * 31 + static_cast<size_t>(site.second);
  }
};
std::unordered_map<std::pair<PyObject*, int>, PyObject*, SiteHash> sites;
constexpr size_t kMostSites = 20000;  // functions that are made again and again

int offset_of(PyFrameObject* frame) {
#if PY_VERSION_HEX >= 0x030B0000
  return PyFrame_GetLasti(frame);
#else
  return frame->f_lasti * 2;
#endif
}

bool runs(PyFrameObject* frame, PyObject* code) {
  Object own(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
  return own.get() == code;
}

PyFrameObject* back(PyFrameObject* frame) { return PyFrame_GetBack(frame); }

// True if Python code sees the values that functions return: a debugger, a profiler in Python, a mode of torch.
bool is_watched(const PyThreadState* state) {
  return state->c_tracefunc || (state->c_profileobj && PyCallable_Check(state->c_profileobj)) ||
         at::impl::PythonTorchFunctionTLS::stack_len() || c10::impl::TorchDispatchModeTLS::stack_len();
}

PyObject* set_up(PyObject* /*self*/, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 9) return PyErr_Format(PyExc_TypeError, "set_up: expected 9 arguments, got %zd", count);
  for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(arguments[i]);
  known = {arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
           arguments[5], arguments[6], arguments[7], arguments[8]};
  Py_RETURN_NONE;
}

void forget() {
  auto old = std::move(sites);
  sites.clear();
  for (auto& [site, call] : old) {
    Py_DECREF(site.first);
    Py_DECREF(call);
  }
}

PyObject* forget_calls(PyObject* /*self*/, PyObject* /*none*/) {
  forget();
  Py_RETURN_NONE;
}

// What surrounds a call that is not in the table yet; a new reference.
PyObject* learned(PyObject* frame, PyObject* code, int offset) {
  PyObject* const call = PyObject_CallFunctionObjArgs(known.learn, frame, nullptr);
  if (!call) return nullptr;
  if (sites.size() >= kMostSites) forget();
  const auto [place, is_new] = sites.insert({{code, offset}, call});
  if (is_new) {
    Py_INCREF(code);
    Py_INCREF(call);
  }
  return call;
}

// The calling frame of the module whose forward calls this function, and what is known of the call: None if other code
// than torch's runs between the two, if somebody watches, or if nothing can be fused.
PyObject* caller(PyObject* /*self*/, PyObject* skip) {
  PyFrameObject* const here = PyEval_GetFrame();  // borrowed
  long frames = PyLong_AsLong(skip);
  if (frames == -1 && PyErr_Occurred()) return nullptr;
  if (!here || is_watched(PyThreadState_Get())) Py_RETURN_NONE;
  Object first(reinterpret_cast<PyObject*>(back(here)));
  for (; frames > 0 && first; --frames)
    first = Object(reinterpret_cast<PyObject*>(back(reinterpret_cast<PyFrameObject*>(first.get()))));
  if (!first || !runs(reinterpret_cast<PyFrameObject*>(first.get()), known.call_impl)) Py_RETURN_NONE;
  Object second(reinterpret_cast<PyObject*>(back(reinterpret_cast<PyFrameObject*>(first.get()))));
  if (!second || !runs(reinterpret_cast<PyFrameObject*>(second.get()), known.wrapped_call_impl)) Py_RETURN_NONE;
  Object frame(reinterpret_cast<PyObject*>(back(reinterpret_cast<PyFrameObject*>(second.get()))));
  if (!frame) Py_RETURN_NONE;
  auto* const of = reinterpret_cast<PyFrameObject*>(frame.get());
  Object code(reinterpret_cast<PyObject*>(PyFrame_GetCode(of)));
  const int offset = offset_of(of);
  const auto found = sites.find({code.get(), offset});
  Object call(found == sites.end() ? learned(frame.get(), code.get(), offset) : Py_NewRef(found->second));
  if (!call) return nullptr;
  if (call.get() == Py_None) Py_RETURN_NONE;
  return PyTuple_Pack(2, frame.get(), call.get());
}

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030C0000
// Python 3.11 has no function that reads one variable; these are the first fields of its frames.
struct InterpreterFrame {
  PyObject *function, *globals, *builtins, *locals, *code;
  PyFrameObject* frame_object;
  InterpreterFrame* previous;
  void* instruction;
  int stack_top;
  bool is_entry;
  char owner;
  PyObject* variables[1];
};
struct Frame {
  PyObject_HEAD PyFrameObject* back;
  InterpreterFrame* inner;
};
#endif

// The value of a parameter or variable of a function by its index, or None.
PyObject* local(PyObject* /*self*/, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyFrame_Check(arguments[0]))
    return PyErr_Format(PyExc_TypeError, "local: expected a frame and an index");
  const Py_ssize_t index = PyLong_AsSsize_t(arguments[1]);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  auto* const frame = reinterpret_cast<PyFrameObject*>(arguments[0]);
  Object code(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
  if (index < 0 || index >= reinterpret_cast<PyCodeObject*>(code.get())->co_nlocals) Py_RETURN_NONE;
  PyObject* value = nullptr;
#if PY_VERSION_HEX >= 0x030C0000
  Object variables(PyCode_GetVarnames(reinterpret_cast<PyCodeObject*>(code.get())));
  if (!variables) return nullptr;
  value = PyFrame_GetVar(frame, PyTuple_GET_ITEM(variables.get(), index));
  if (!value) {  // it has no value
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  return value;
#elif PY_VERSION_HEX >= 0x030B0000
  value = reinterpret_cast<Frame*>(frame)->inner->variables[index];
#else
  value = frame->f_localsplus[index];
#endif
  return Py_NewRef(value ? value : Py_None);
}

// The attribute of an object, or null without an error.
Object attribute(PyObject* object, PyObject* name) {
  PyObject* value = nullptr;
#if PY_VERSION_HEX >= 0x030D0000
  if (PyObject_GetOptionalAttr(object, name, &value) < 0) PyErr_Clear();
#else
  if (_PyObject_LookupAttr(object, name, &value) < 0) PyErr_Clear();
#endif
  return Object(value);
}

// The element of a container such as a ModuleList at the key of an Item.
PyObject* element(PyObject* module, PyObject* item, PyObject* modules) {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(module));
  PyObject* const get = PyDict_GetItemWithError(known.containers, type);
  if (!get || PyTuple_GET_SIZE(item) != 1 || attribute(type, names().getitem).get() != get) {
    PyErr_Clear();
    return nullptr;
  }
  PyObject* const key = PyTuple_GET_ITEM(item, 0);
  if (PyLong_Check(key)) {
    const long index = PyLong_AsLong(key);
    if (index < 0) {
      PyErr_Clear();
      return nullptr;
    }
  }
  Object name(PyObject_Str(key));
  return name ? PyDict_GetItemWithError(modules, name.get()) : nullptr;
}

// The module that `owner.a.b` yields for the path ("a", "b"), or None if that is uncertain. No code of a class runs.
PyObject* module_at(PyObject* /*self*/, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(arguments[1]))
    return PyErr_Format(PyExc_TypeError, "module_at: expected an object and a tuple");
  const Names& name_of = names();
  PyObject* module = arguments[0];  // borrowed: its parents hold it
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[1]); ++i) {
    PyObject* const step = PyTuple_GET_ITEM(arguments[1], i);
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(module));
    if (attribute(type, name_of.getattr).get() != known.module_getattr ||
        attribute(type, name_of.getattribute).get() != known.object_getattribute)
      Py_RETURN_NONE;
    Object fields(PyObject_GenericGetDict(module, nullptr));
    PyObject* const modules = fields ? PyDict_GetItemWithError(fields.get(), name_of.modules) : nullptr;
    if (!modules || !PyDict_Check(modules)) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    if (PyTuple_Check(step)) {
      module = element(module, step, modules);
    } else {
      if (attribute(type, step).get() || PyDict_Contains(fields.get(), step) != 0) {
        PyErr_Clear();
        Py_RETURN_NONE;
      }
      module = PyDict_GetItemWithError(modules, step);
    }
    if (!module) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
  }
  return Py_NewRef(module);
}

bool is_module(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(known.module_class));
}

// holder(layer, owner, path, reads): the module that holds the layer at the path; None if another module is there, or if a
// path in `reads` does not lead to a module.
PyObject* holder(PyObject* /*self*/, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4 || !PyTuple_Check(arguments[2]) || !PyTuple_Check(arguments[3]))
    return PyErr_Format(PyExc_TypeError, "holder: expected a layer, an owner and two tuples");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[3]); ++i) {
    PyObject* const one[] = {arguments[1], PyTuple_GET_ITEM(arguments[3], i)};
    Object module(module_at(nullptr, one, 2));
    if (!module) return nullptr;
    if (!is_module(module.get())) Py_RETURN_NONE;
  }
  PyObject* const whole[] = {arguments[1], arguments[2]};
  Object layer(module_at(nullptr, whole, 2));
  if (!layer) return nullptr;
  const Py_ssize_t steps = PyTuple_GET_SIZE(arguments[2]);
  if (layer.get() != arguments[0] || layer.get() == Py_None || !steps) Py_RETURN_NONE;
  if (steps == 1) return Py_NewRef(arguments[1]);
  Object shorter(PyTuple_GetSlice(arguments[2], 0, steps - 1));
  if (!shorter) return nullptr;
  PyObject* const above[] = {arguments[1], shorter.get()};
  return module_at(nullptr, above, 2);
}

// True if a call of an activation runs its forward only: no hooks, no other forward, no patched class.
bool is_plain_activation(PyObject* place) {
  if (!PyObject_TypeCheck(place, reinterpret_cast<PyTypeObject*>(known.replaced))) return false;
  const Names& name_of = names();
  Object fields(PyObject_GenericGetDict(place, nullptr));
  if (!fields) return false;
  for (PyObject* name : name_of.hooks) {
    PyObject* const hooks = PyDict_GetItemWithError(fields.get(), name);
    if (!hooks || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks)) return false;
  }
  PyObject* const compiled = PyDict_GetItemWithError(fields.get(), name_of.compiled);
  if (PyDict_Contains(fields.get(), name_of.forward) != 0 || (compiled && compiled != Py_None)) return false;
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(place));
  Object own = attribute(type, name_of.original_class);
  return own && attribute(own.get(), name_of.forward).get() == attribute(type, name_of.original_forward).get() &&
         attribute(own.get(), name_of.call).get() == known.module_call;
}

PyObject* is_plain_activation_method(PyObject* /*self*/, PyObject* place) {
  const bool plain = is_plain_activation(place);
  if (PyErr_Occurred()) PyErr_Clear();
  return PyBool_FromLong(plain);
}

// The activation at a path that receives the output of the layer at another path; or None.
PyObject* follower(PyObject* /*self*/, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "follower: expected 4 arguments, got %zd", count);
  PyObject* const layer_at[] = {arguments[1], arguments[2]};
  PyObject* const place_at[] = {arguments[1], arguments[3]};
  Object layer(module_at(nullptr, layer_at, 2));
  if (!layer) return nullptr;
  if (layer.get() != arguments[0]) Py_RETURN_NONE;
  Object place(module_at(nullptr, place_at, 2));
  if (!place) return nullptr;
  const bool plain = is_plain_activation(place.get());
  if (PyErr_Occurred()) PyErr_Clear();
  if (!plain) Py_RETURN_NONE;
  return place.release();
}

template <class Function>
PyCFunction as_method(Function function) {  // through void*: the field is the signature of all kinds of methods
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace

PyMethodDef caller_methods[] = {
    {"set_up_caller", as_method(&set_up), METH_FASTCALL, nullptr},
    {"forget_calls", as_method(&forget_calls), METH_NOARGS, nullptr},
    {"caller", as_method(&caller), METH_O, nullptr},
    {"local", as_method(&local), METH_FASTCALL, nullptr},
    {"is_plain_activation", as_method(&is_plain_activation_method), METH_O, nullptr},
    {"follower", as_method(&follower), METH_FASTCALL, nullptr},
    {"holder", as_method(&holder), METH_FASTCALL, nullptr},
    {"module_at", as_method(&module_at), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace torchquant
