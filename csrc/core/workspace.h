// Scratch memory of a thread, kept from call to call: fresh pages cost more than the work on them.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace torchquant {

class Workspace {
 public:
  static Workspace& of_this_thread() {
    thread_local Workspace workspace;
    return workspace;
  }

  // At least `bytes` bytes, aligned to 64, or null; valid until this thread's next call.
  uint8_t* get(int64_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(rounded)));
      capacity_ = data_ ? rounded : 0;
    }
    return data_;
  }

  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

 private:
  Workspace() = default;
  ~Workspace() { std::free(data_); }

  uint8_t* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace torchquant
