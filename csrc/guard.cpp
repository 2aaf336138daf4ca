// Guard(entries): entries are tuples (dictionary, key, expected). `holds()` is true as long as each dictionary has the
// expected object, the very same one, under its key.
//
// - ABSENT as the expected object: the key is not in the dictionary.
// - A dictionary as the expected object keeps its number of entries: an empty dictionary of hooks stays empty.
// - A tensor as the expected object keeps its memory and its version, which counts changes in place. Tensors of
//   inference mode have no version: the values of small ones are compared instead. Changes in place of large ones go
//   unnoticed.
//
// A model has hundreds of entries, and each call looks at all of them: this is a type of the C API, because it holds
// references to dictionaries of modules that refer to it, and so takes part in the collection of cycles. An entry is
// looked up by its position in the dictionary, which is a hint: if another key is there, the key is looked up.
#include "guard.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kComparedBytes = 4096;

PyObject* absent = nullptr;

struct Entry {
  PyObject* dictionary;
  PyObject* key;
  PyObject* expected;
  Py_ssize_t position = 0;  // after the entry, as PyDict_Next leaves it, minus one step
  Py_ssize_t length = -1;   // of an expected dictionary
  const c10::TensorImpl* tensor = nullptr;
  const void* data = nullptr;  // of an expected tensor
  uint32_t version = 0;
  bool has_version = false;
  std::string values;  // of a small tensor without version
};

const void* data_of(const at::Tensor& t) {  // also where reading it would be an error (fake tensors)
  if (!t.has_storage()) return nullptr;
  const auto* base = static_cast<const char*>(t.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get());
  return base + t.storage_offset() * static_cast<int64_t>(t.itemsize());
}

bool is_compared(const at::Tensor& t) {  // its values may be read as bytes
  return t.is_inference() && t.is_cpu() && t.has_storage() && t.is_contiguous() && data_of(t);
}

void remember_tensor(Entry& e) {
  const at::Tensor& t = THPVariable_Unpack(e.expected);
  e.tensor = t.unsafeGetTensorImpl();
  e.data = data_of(t);
  e.has_version = !t.is_inference();
  if (e.has_version) e.version = e.tensor->version_counter().current_version();
  else if (is_compared(t) && static_cast<int64_t>(t.nbytes()) <= kComparedBytes)
    e.values.assign(static_cast<const char*>(e.data), t.nbytes());
}

bool tensor_holds(const Entry& e) {
  const at::Tensor& t = THPVariable_Unpack(e.expected);
  if (t.unsafeGetTensorImpl() != e.tensor || data_of(t) != e.data) return false;
  if (e.has_version) return !t.is_inference() && e.tensor->version_counter().current_version() == e.version;
  return e.values.empty() || (is_compared(t) && t.nbytes() == e.values.size() &&
                              std::memcmp(e.data, e.values.data(), e.values.size()) == 0);
}

// The object under the entry's key, borrowed; null: there is none, or an exception was raised.
PyObject* find(Entry& e) {
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = e.position;
  if (PyDict_Next(e.dictionary, &position, &key, &value) && key == e.key) return value;
  if (e.expected != absent) {
    for (position = 0; PyDict_Next(e.dictionary, &position, &key, &value);) {
      if (key == e.key) {
        e.position = position - 1;
        break;
      }
    }
  }
  return PyDict_GetItemWithError(e.dictionary, e.key);
}

// 1: as expected; 0: not; -1: an exception was raised.
int entry_holds(Entry& e) {
  PyObject* const value = find(e);
  if (!value) return PyErr_Occurred() ? -1 : e.expected == absent;
  if (value != e.expected) return 0;
  if (e.length >= 0) return PyDict_GET_SIZE(value) == e.length;
  return !e.tensor || tensor_holds(e);
}

struct Guard {
  PyObject_HEAD std::vector<Entry>* entries;
};

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (const auto* entries = reinterpret_cast<Guard*>(self)->entries) {
    for (const Entry& e : *entries) {
      Py_VISIT(e.dictionary);
      Py_VISIT(e.key);
      Py_VISIT(e.expected);
    }
  }
  return 0;
}

int clear(PyObject* self) {
  const std::unique_ptr<std::vector<Entry>> entries(std::exchange(reinterpret_cast<Guard*>(self)->entries, nullptr));
  if (!entries) return 0;
  for (Entry& e : *entries) {
    Py_CLEAR(e.dictionary);
    Py_CLEAR(e.key);
    Py_CLEAR(e.expected);
  }
  return 0;
}

void deallocate(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  HANDLE_TH_ERRORS
  PyObject* list = nullptr;
  static const char* const kNames[] = {"entries", nullptr};
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O", const_cast<char**>(kNames), &list)) return nullptr;
  THPObjectPtr sequence(PySequence_Fast(list, "Guard: entries must be a sequence of tuples"));
  if (!sequence) return nullptr;
  THPObjectPtr self(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  auto& entries = reinterpret_cast<Guard*>(self.get())->entries;
  entries = new std::vector<Entry>;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence.get());
  entries->reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const item = PySequence_Fast_GET_ITEM(sequence.get(), i);
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 3 || !PyDict_Check(PyTuple_GET_ITEM(item, 0)) ||
        !PyUnicode_Check(PyTuple_GET_ITEM(item, 1))) {
      PyErr_Format(PyExc_TypeError, "Guard: entries must be tuples (dict, str, expected object), got %R", item);
      return nullptr;
    }
    Entry e{};
    e.dictionary = Py_NewRef(PyTuple_GET_ITEM(item, 0));
    e.key = Py_NewRef(PyTuple_GET_ITEM(item, 1));
    PyUnicode_InternInPlace(&e.key);  // names of attributes are, so that keys are usually the same object
    e.expected = Py_NewRef(PyTuple_GET_ITEM(item, 2));
    if (PyDict_Check(e.expected)) e.length = PyDict_GET_SIZE(e.expected);
    if (THPVariable_Check(e.expected)) remember_tensor(e);
    entries->push_back(std::move(e));
  }
  return self.release();
  END_HANDLE_TH_ERRORS
}

PyObject* holds(PyObject* self, PyObject* /*unused*/) {
  HANDLE_TH_ERRORS
  auto* const entries = reinterpret_cast<Guard*>(self)->entries;
  if (!entries) Py_RETURN_FALSE;
  for (Entry& e : *entries) {
    const int held = entry_holds(e);
    if (held < 0) return nullptr;
    if (!held) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyObject* broken(PyObject* self, PyObject* /*unused*/) {
  HANDLE_TH_ERRORS
  THPObjectPtr found(PyList_New(0));
  auto* const entries = reinterpret_cast<Guard*>(self)->entries;
  if (!found || !entries) return found.release();
  for (size_t i = 0; i < entries->size(); ++i) {
    const int held = entry_holds((*entries)[i]);
    if (held < 0) return nullptr;
    if (held) continue;
    THPObjectPtr index(PyLong_FromSize_t(i));
    if (!index || PyList_Append(found.get(), index.get()) != 0) return nullptr;
  }
  return found.release();
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"holds", holds, METH_NOARGS, "Whether each entry is as it was."},
    {"broken", broken, METH_NOARGS, "The indices of the entries that are not as they were."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_methods, methods},
    {Py_tp_doc, const_cast<char*>("Guard(entries): whether dictionaries still hold the expected objects.")},
    {0, nullptr},
};

PyType_Spec spec = {"torchquant._C.Guard", sizeof(Guard), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

}  // namespace

int add_guard(PyObject* module) {
  PyObject* const type = PyType_FromSpec(&spec);
  if (!type) return -1;
  absent = PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  if (!absent || PyObject_SetAttrString(type, "ABSENT", absent) != 0) return -1;
  return PyModule_AddObject(module, "Guard", type);
}

}  // namespace torchquant
