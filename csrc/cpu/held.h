// The tensors whose memory an object points to for as long as it lives.
#pragma once

#include <ATen/core/Tensor.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/checks.h"

namespace torchquant {

// An alias of the tensor, which keeps its memory whatever happens to the tensor; a copy where kernels cannot read it.
inline const at::Tensor& hold(const char* op, std::vector<at::Tensor>& held, const at::Tensor& t, at::ScalarType type,
                              int64_t alignment) {
  TORCH_CHECK_TYPE(t.is_cpu() && t.scalar_type() == type, op, ": a layer's tensor must be ", dtype_name(type),
                   " on the CPU, got ", describe(t));
  at::Tensor own = t.detach();
  if (!own.is_contiguous() || reinterpret_cast<uintptr_t>(own.const_data_ptr()) % static_cast<uintptr_t>(alignment))
    own = own.clone(at::MemoryFormat::Contiguous);
  held.push_back(std::move(own));
  return held.back();
}

// One value for each output channel.
template <class T>
const T* hold_per_output(const char* op, std::vector<at::Tensor>& held, const at::Tensor& t, at::ScalarType type,
                         int64_t outputs) {
  TORCH_CHECK_VALUE(t.numel() == outputs, op, ": a layer's tensor must have one element for each of ", outputs,
                    " channels, got ", describe(t));
  return hold(op, held, t, type, alignof(T)).template const_data_ptr<T>();
}

class HeldTensors {
 public:
  explicit HeldTensors(const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& t : tensors) {
      const c10::StorageImpl& storage = *t.storage().unsafeGetStorageImpl();
      held_.push_back({t, storage.data(), storage.nbytes()});
    }
  }

  // Whether they have the memory that they had: share_memory_() and resize_() of a storage replace it.
  bool unchanged() const {
    for (const Held& held : held_) {
      const c10::StorageImpl& storage = *held.tensor.storage().unsafeGetStorageImpl();
      if (storage.data() != held.data || storage.nbytes() != held.bytes) return false;
    }
    return true;
  }

 private:
  struct Held {
    at::Tensor tensor;
    const void* data;  // of its storage
    size_t bytes;
  };
  std::vector<Held> held_;
};

}  // namespace torchquant
