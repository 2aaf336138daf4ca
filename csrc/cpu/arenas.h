// Scratch memory of objects that run many steps in one call (programs, decoders): one block for each call that is under
// way, kept from call to call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/fork.h"

namespace torchquant {

class Arena {  // 64-byte aligned memory
 public:
  explicit Arena(int64_t bytes) : bytes_((std::max<int64_t>(bytes, 1) + 4095) / 4096 * 4096) {
    data_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes_)));
    if (!data_) throw std::bad_alloc();
  }
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  uint8_t* data_;
};

class Arenas {
 public:
  // Arenas of more bytes are not kept.
  explicit Arenas(int64_t most_bytes = std::numeric_limits<int64_t>::max()) : most_bytes_(most_bytes) {}

  std::unique_ptr<Arena> take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(program_mutex());
      for (auto& arena : arenas_) {
        if (arena->bytes() < bytes) continue;
        std::swap(arena, arenas_.back());
        std::unique_ptr<Arena> taken = std::move(arenas_.back());
        arenas_.pop_back();
        return taken;
      }
      if (!arenas_.empty()) arenas_.pop_back();  // too small: replaced by the new one
    }
    return std::make_unique<Arena>(bytes);
  }

  void give_back(std::unique_ptr<Arena> arena) {
    if (arena->bytes() > most_bytes_) return;
    const std::lock_guard<std::mutex> lock(program_mutex());
    if (arenas_.size() < kMost) arenas_.push_back(std::move(arena));
  }

 private:
  static constexpr size_t kMost = 16;

  const int64_t most_bytes_;
  std::vector<std::unique_ptr<Arena>> arenas_;  // not in use; under the lock of programs (fork.h)
};

}  // namespace torchquant
