// Guard(entries): entries are tuples (place, key, expected). `holds()` is true as long as each entry is as it was:
//
// - (dictionary, key, expected): the dictionary has the expected object, the very same one, under the key. ABSENT as the
//   expected object: the key is not in the dictionary. A dictionary as the expected object keeps its number of entries:
//   an empty dictionary of hooks stays empty. A tensor as the expected object keeps its memory and its version, which
//   counts changes in place. Tensors of inference mode have no version: the values of small ones are compared instead.
//   Changes in place of large ones go unnoticed.
// - (class, key, expected): the same for what the class itself defines.
// - (list, None, tuple): the list has the items of the tuple, the very same objects.
// - (dictionary, None, tuple): the dictionary has these keys and values in turn, in this order.
// - (object, None, class): the object has this class, and its attributes are in the dictionary in which they were.
//
// A model has thousands of entries, and each call asks about all of them. The entries are therefore grouped by
// dictionary, and those of a dictionary that has not changed (dict_watch.h) are not compared again. This is a type of
// the C API, because it holds references to dictionaries of modules that refer to it, and so takes part in the
// collection of cycles.
#include "guard.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "dict_watch.h"

namespace torchquant {
namespace {

constexpr int64_t kComparedBytes = 4096;
constexpr size_t kTensorsAhead = 8;

PyObject* absent = nullptr;

struct Entry {         // of a dictionary
  PyObject* key;       // null: all keys and values
  PyObject* expected;  // null: only the number of entries
  Py_ssize_t length;   // of the dictionary, or of an expected dictionary; -1: any
  size_t index;
};

struct Record {
  PyObject* owner;  // of the reference: the dictionary or a class
  PyObject* dict;
  DictWatch watch;
  std::vector<Entry> entries;
};

struct Instance {
  PyObject* object;
  PyTypeObject* type;
  PyObject* dict;
  size_t index;
};

struct HeldList {
  PyObject* list;
  PyObject* items;  // a tuple
  size_t index;
};

struct HeldTensor {
  PyObject* object;
  c10::TensorImpl* impl;
  c10::Storage storage;  // keeps its memory, so that no other has the same address
  const void* data;      // of the storage
  int64_t offset;
  uint32_t version;
  bool has_version;
  std::string values;  // of a small tensor without version
  size_t index;
};

struct State {
  std::vector<Record> records;
  std::vector<Instance> instances;
  std::vector<HeldList> lists;
  std::vector<HeldTensor> tensors;
  std::unordered_map<PyObject*, size_t> places;  // records by dictionary
};

const void* data_of(const c10::Storage& s) {  // also where reading it would be an error (fake tensors)
  return s ? s.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get() : nullptr;
}

bool is_compared(const at::Tensor& t) {  // its values may be read as bytes
  return t.is_inference() && t.is_cpu() && t.has_storage() && t.is_contiguous() && t.const_data_ptr();
}

HeldTensor remembered(PyObject* object, size_t index) {
  const at::Tensor& t = THPVariable_Unpack(object);
  c10::TensorImpl* const impl = t.unsafeGetTensorImpl();
  const c10::Storage storage = t.has_storage() ? t.storage() : c10::Storage();
  const int64_t offset = t.has_storage() ? t.storage_offset() : 0;
  HeldTensor made{Py_NewRef(object), impl, storage, data_of(storage), offset, 0, !t.is_inference(), {}, index};
  if (made.has_version) made.version = impl->version_counter().current_version();
  else if (is_compared(t) && static_cast<int64_t>(t.nbytes()) <= kComparedBytes)
    made.values.assign(static_cast<const char*>(t.const_data_ptr()), t.nbytes());
  return made;
}

bool tensor_holds(const HeldTensor& e) {
  const at::Tensor& t = THPVariable_Unpack(e.object);
  if (t.unsafeGetTensorImpl() != e.impl) return false;
  const c10::Storage& storage = e.impl->unsafe_storage();
  if (storage.unsafeGetStorageImpl() != e.storage.unsafeGetStorageImpl() || data_of(storage) != e.data) return false;
  if (storage && e.impl->storage_offset() != e.offset) return false;
  if (e.has_version) return !e.impl->is_inference() && e.impl->version_counter().current_version() == e.version;
  return e.values.empty() || (is_compared(t) && t.nbytes() == e.values.size() &&
                              std::memcmp(t.const_data_ptr(), e.values.data(), e.values.size()) == 0);
}

// What tensor_holds reads: a model's tensors are no longer near after the model has run.
void fetch(const HeldTensor& e) {
  __builtin_prefetch(e.object);
  const char* const impl = reinterpret_cast<const char*>(e.impl);
  for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(impl + at);
  __builtin_prefetch(e.storage.unsafeGetStorageImpl());
}

bool has_items(PyObject* dict, PyObject* expected) {
  if (PyDict_GET_SIZE(dict) * 2 != PyTuple_GET_SIZE(expected)) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0, i = 0;
  for (; PyDict_Next(dict, &position, &key, &value); i += 2)
    if (PyTuple_GET_ITEM(expected, i) != key || PyTuple_GET_ITEM(expected, i + 1) != value) return false;
  return true;
}

// 1: as expected; 0: not; -1: an exception was raised.
int entry_holds(const Record& r, const Entry& e) {
  if (!e.key) return e.expected ? has_items(r.dict, e.expected) : PyDict_GET_SIZE(r.dict) == e.length;
  PyObject* const value = PyDict_GetItemWithError(r.dict, e.key);
  if (!value) return PyErr_Occurred() ? -1 : e.expected == absent;
  return value == e.expected;
}

bool instance_holds(const Instance& o) {
  if (Py_TYPE(o.object) != o.type) return false;
  if (!o.dict) return true;
  PyObject* const dict = PyObject_GenericGetDict(o.object, nullptr);
  if (!dict) PyErr_Clear();
  Py_XDECREF(dict);
  return dict == o.dict;
}

bool list_holds(const HeldList& l) {
  const Py_ssize_t size = PyTuple_GET_SIZE(l.items);
  if (PyList_GET_SIZE(l.list) != size) return false;
  for (Py_ssize_t i = 0; i < size; ++i)
    if (PyList_GET_ITEM(l.list, i) != PyTuple_GET_ITEM(l.items, i)) return false;
  return true;
}

// Calls broken(index) for each entry that is not as it was, until it returns false. -1 and an exception: failed.
template <class Broken>
int look(State& s, const Broken& broken) {
  for (const Instance& o : s.instances)
    if (!instance_holds(o) && !broken(o.index)) return 0;
  for (Record& r : s.records) {
    if (r.watch.is_unchanged()) continue;
    r.watch.look();
    for (const Entry& e : r.entries) {
      const int held = entry_holds(r, e);
      if (held == 1) continue;
      r.watch.forget();  // the next call compares again
      if (held < 0) return -1;
      if (!broken(e.index)) return 0;
    }
  }
  for (const HeldList& l : s.lists)
    if (!list_holds(l) && !broken(l.index)) return 0;
  for (size_t i = 0; i < s.tensors.size(); ++i) {
    if (i + kTensorsAhead < s.tensors.size()) fetch(s.tensors[i + kTensorsAhead]);
    const HeldTensor& t = s.tensors[i];
    if (!tensor_holds(t) && !broken(t.index)) return 0;
  }
  return 0;
}

struct Guard {
  PyObject_HEAD State* state;
};

template <class Visit>
int each_reference(State& s, const Visit& visit) {
  for (Record& r : s.records) {
    if (const int result = visit(r.owner)) return result;
    for (Entry& e : r.entries) {
      if (const int result = visit(e.key)) return result;
      if (const int result = visit(e.expected)) return result;
    }
  }
  for (Instance& o : s.instances) {
    if (const int result = visit(o.object)) return result;
    auto* type = reinterpret_cast<PyObject*>(o.type);
    if (const int result = visit(type)) return result;
    if (const int result = visit(o.dict)) return result;
  }
  for (HeldList& l : s.lists) {
    if (const int result = visit(l.list)) return result;
    if (const int result = visit(l.items)) return result;
  }
  for (HeldTensor& t : s.tensors)
    if (const int result = visit(t.object)) return result;
  return 0;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  State* const state = reinterpret_cast<Guard*>(self)->state;
  return state ? each_reference(*state, [&](PyObject* o) { return o ? visit(o, arg) : 0; }) : 0;
}

int clear(PyObject* self) {
  const std::unique_ptr<State> state(std::exchange(reinterpret_cast<Guard*>(self)->state, nullptr));
  if (!state) return 0;
  std::vector<PyObject*> held;  // released after the dictionaries are no longer watched
  each_reference(*state, [&](PyObject* o) {
    if (o) held.push_back(o);
    return 0;
  });
  state->records.clear();
  for (PyObject* const o : held) Py_DECREF(o);
  return 0;
}

void deallocate(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

// The dictionary of what a class itself defines, borrowed.
PyObject* dict_of(PyTypeObject* type) {
#if PY_VERSION_HEX < 0x030C0000
  return type->tp_dict;
#else
  PyObject* const dict = PyType_GetDict(type);
  Py_XDECREF(dict);  // the class keeps it
  return dict;
#endif
}

Record& record_of(State& s, PyObject* owner, PyObject* dict) {
  const auto [found, is_new] = s.places.try_emplace(dict, s.records.size());
  if (is_new) s.records.push_back({Py_NewRef(owner), dict, DictWatch(dict), {}});
  return s.records[found->second];
}

PyObject* interned(PyObject* text) {  // names of attributes are, so that they are usually the same object
  PyObject* own = Py_NewRef(text);
  if (PyUnicode_CheckExact(own)) PyUnicode_InternInPlace(&own);
  return own;
}

// False: the tuple is not an entry.
bool add(State& s, PyObject* place, PyObject* key, PyObject* expected, size_t index) {
  const bool is_type = PyType_Check(place);
  PyObject* const dict = is_type               ? dict_of(reinterpret_cast<PyTypeObject*>(place))
                         : PyDict_Check(place) ? place
                                               : nullptr;
  if (key != Py_None) {
    if (!dict || !PyUnicode_Check(key)) return false;
    record_of(s, place, dict).entries.push_back({interned(key), Py_NewRef(expected), -1, index});
    if (PyDict_Check(expected))
      record_of(s, expected, expected).entries.push_back({nullptr, nullptr, PyDict_GET_SIZE(expected), index});
    if (THPVariable_Check(expected)) s.tensors.push_back(remembered(expected, index));
    return true;
  }
  if (PyType_Check(expected)) {
    if (is_type || dict) return false;
    PyObject* const own = PyObject_GenericGetDict(place, nullptr);
    if (!own) PyErr_Clear();
    s.instances.push_back({Py_NewRef(place), reinterpret_cast<PyTypeObject*>(Py_NewRef(expected)), own, index});
    return true;
  }
  if (!PyTuple_Check(expected)) return false;
  if (PyList_Check(place)) s.lists.push_back({Py_NewRef(place), Py_NewRef(expected), index});
  else if (dict && !is_type) record_of(s, place, dict).entries.push_back({nullptr, Py_NewRef(expected), -1, index});
  else return false;
  return true;
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
  auto& state = reinterpret_cast<Guard*>(self.get())->state;
  state = new State;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence.get());
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const item = PySequence_Fast_GET_ITEM(sequence.get(), i);
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 3 ||
        !add(*state, PyTuple_GET_ITEM(item, 0), PyTuple_GET_ITEM(item, 1), PyTuple_GET_ITEM(item, 2),
             static_cast<size_t>(i))) {
      PyErr_Format(PyExc_TypeError,
                   "Guard: entries must be tuples (dict or class, str, expected object), (dict or list, None, tuple) "
                   "or (object, None, class), got %R",
                   item);
      return nullptr;
    }
  }
  return self.release();
  END_HANDLE_TH_ERRORS
}

PyObject* holds(PyObject* self, PyObject* /*unused*/) {
  HANDLE_TH_ERRORS
  State* const state = reinterpret_cast<Guard*>(self)->state;
  bool held = state != nullptr;
  const auto stop = [&](size_t /*index*/) { return held = false; };
  if (state && look(*state, stop) < 0) return nullptr;
  return Py_NewRef(held ? Py_True : Py_False);
  END_HANDLE_TH_ERRORS
}

PyObject* broken(PyObject* self, PyObject* /*unused*/) {
  HANDLE_TH_ERRORS
  State* const state = reinterpret_cast<Guard*>(self)->state;
  std::vector<size_t> indices;
  const auto collect = [&](size_t index) {
    indices.push_back(index);
    return true;
  };
  if (state && look(*state, collect) < 0) return nullptr;
  std::sort(indices.begin(), indices.end());
  indices.erase(std::unique(indices.begin(), indices.end()), indices.end());
  THPObjectPtr found(PyList_New(0));
  for (const size_t i : indices) {
    THPObjectPtr index(PyLong_FromSize_t(i));
    if (!found || !index || PyList_Append(found.get(), index.get()) != 0) return nullptr;
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
    {Py_tp_doc, const_cast<char*>("Guard(entries): whether Python objects are still what they were.")},
    {0, nullptr},
};

PyType_Spec spec = {"torchquant._C.Guard", sizeof(Guard), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

}  // namespace

int add_guard(PyObject* module) {
  start_watching_dicts();
  PyObject* const type = PyType_FromSpec(&spec);
  if (!type) return -1;
  absent = PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  if (!absent || PyObject_SetAttrString(type, "ABSENT", absent) != 0) return -1;
  return PyModule_AddObject(module, "Guard", type);
}

}  // namespace torchquant
