// Has a dictionary of Python changed since it was last looked at?
//
// - Python 3.10 and 3.11 number the changes of all dictionaries: each dictionary has the number of its last change.
// - Python 3.12 and later tell a function of ours about each change of a dictionary that we watch. Some of them (3.13.0)
//   forget it where an attribute is assigned whose value lies in the object itself instead of the dictionary. Whether
//   this Python does is tried out; such dictionaries then count as changed.
// - Free-threaded Python, and a Python that refuses to watch: every dictionary counts as changed, and is read again.
//
// No torch header. The caller holds the GIL and a reference to the dictionary for as long as the watch lives.
#pragma once

#include <Python.h>

#include <cstdint>
#include <utility>

#if !defined(Py_GIL_DISABLED) && !defined(PYPY_VERSION)
#if PY_VERSION_HEX < 0x030C0000
#define TORCHQUANT_DICT_VERSIONS 1
#else
#define TORCHQUANT_DICT_WATCHERS 1
#include <unordered_map>
#endif
#endif

namespace torchquant {

#if defined(TORCHQUANT_DICT_WATCHERS)
struct WatchedDict {
  uint64_t changes = 0;  // that were announced
  int64_t watches = 0;   // that look at it
};

struct DictWatcher {                 // one for the process
  int id = -1;                       // -1: Python gave none
  bool announces_attributes = true;  // also those whose values lie in the object
  std::unordered_map<PyObject*, WatchedDict> dicts;
};

inline DictWatcher& dict_watcher() {
  static DictWatcher watcher;
  return watcher;
}

inline int on_dict_change(PyDict_WatchEvent /*event*/, PyObject* dict, PyObject* /*key*/, PyObject* /*value*/) {
  DictWatcher& watcher = dict_watcher();
  const auto found = watcher.dicts.find(dict);
  if (found == watcher.dicts.end()) return 0;
  ++found->second.changes;
  return 0;
}

class DictWatch {
 public:
  explicit DictWatch(PyObject* dict) : dict_(dict) {
    DictWatcher& watcher = dict_watcher();
    if (watcher.id < 0) return;
    WatchedDict& state = watcher.dicts[dict];
    if (state.watches == 0 && PyDict_Watch(watcher.id, dict) != 0) {
      PyErr_Clear();
      watcher.dicts.erase(dict);
      return;
    }
    ++state.watches;
    state_ = &state;
    seen_ = state.changes - 1;
  }
  ~DictWatch() {
    if (!state_ || --state_->watches > 0) return;
    DictWatcher& watcher = dict_watcher();
    if (PyDict_Unwatch(watcher.id, dict_) != 0) PyErr_Clear();
    watcher.dicts.erase(dict_);
  }
  DictWatch(DictWatch&& other) noexcept
      : dict_(other.dict_), state_(std::exchange(other.state_, nullptr)), seen_(other.seen_) {}
  DictWatch& operator=(DictWatch&&) = delete;

  bool is_unchanged() const {
    return state_ && state_->changes == seen_ &&
           (dict_watcher().announces_attributes || !reinterpret_cast<PyDictObject*>(dict_)->ma_values);
  }
  uint64_t changes() const { return state_ ? state_->changes : 0; }
  void look() {  // before the dictionary is read
    if (state_) seen_ = state_->changes;
  }
  void forget() {  // it counts as changed
    if (state_) seen_ = state_->changes - 1;
  }

 private:
  PyObject* dict_;
  WatchedDict* state_ = nullptr;  // entries of an unordered_map stay in their place
  uint64_t seen_ = 0;
};
// Whether each of many assignments of an attribute is announced, also those that Python's interpreter has optimised.
inline bool announces_attributes() {
  constexpr const char* kMake = R"(
class Owner:
    pass
owner = Owner()
owner.number = 0
place = owner.__dict__
)";
  constexpr const char* kAssign = R"(
def assign(value):
    owner.number = value
for value in range(300):
    assign((value,))
    object.__setattr__(owner, "number", [value])
)";
  constexpr uint64_t kChanges = 600;
  PyObject* const names = PyDict_New();
  bool announced = false;
  if (names && PyDict_SetItemString(names, "__builtins__", PyEval_GetBuiltins()) == 0) {
    PyObject* done = PyRun_String(kMake, Py_file_input, names, names);
    PyObject* const place = done ? PyDict_GetItemString(names, "place") : nullptr;
    Py_XDECREF(done);
    if (place) {
      const DictWatch watch(place);
      const uint64_t before = watch.changes();
      done = PyRun_String(kAssign, Py_file_input, names, names);
      announced = done && watch.changes() - before >= kChanges;
      Py_XDECREF(done);
    }
  }
  PyErr_Clear();
  Py_XDECREF(names);
  return announced;
}

// Has to be called once, when the module is imported.
inline void start_watching_dicts() {
  DictWatcher& watcher = dict_watcher();
  if (watcher.id >= 0) return;
  watcher.id = PyDict_AddWatcher(on_dict_change);
  if (watcher.id < 0) PyErr_Clear();
  else watcher.announces_attributes = announces_attributes();
}
#else
inline void start_watching_dicts() {}

class DictWatch {
 public:
  explicit DictWatch(PyObject* dict) : dict_(dict) {}

#if defined(TORCHQUANT_DICT_VERSIONS)
  bool is_unchanged() const { return seen_ == reinterpret_cast<PyDictObject*>(dict_)->ma_version_tag; }
  void look() { seen_ = reinterpret_cast<PyDictObject*>(dict_)->ma_version_tag; }
  void forget() { seen_ = 0; }
#else
  bool is_unchanged() const { return false; }
  void look() {}
  void forget() {}
#endif

 private:
  PyObject* dict_;
  uint64_t seen_ = 0;  // no dictionary has this number
};
#endif

}  // namespace torchquant
