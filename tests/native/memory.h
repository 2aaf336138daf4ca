// Memory in which one byte too far is a crash: a buffer ends exactly at an unmapped page, or begins right behind one,
// or (under AddressSanitizer, which checks every byte of the heap) is on the heap.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace native {

enum class Place { kBeforeHole, kBehindHole, kHeap };

class Region {  // [unmapped page][room][unmapped page]
 public:
  uint8_t* get(int64_t bytes, bool at_end) {
    if (bytes > room_) map(bytes);
    return at_end ? base_ + kPage + room_ - bytes : base_ + kPage;
  }
  Region() = default;
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region() {
    if (base_) munmap(base_, static_cast<size_t>(room_ + 2 * kPage));
  }

 private:
  static constexpr int64_t kPage = 4096;

  void map(int64_t bytes) {
    if (base_) munmap(base_, static_cast<size_t>(room_ + 2 * kPage));
    room_ = (bytes + kPage - 1) / kPage * kPage;
    void* p = mmap(nullptr, static_cast<size_t>(room_ + 2 * kPage), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || sysconf(_SC_PAGESIZE) != kPage) {
      std::perror("mmap");
      std::abort();
    }
    base_ = static_cast<uint8_t*>(p);
    if (mprotect(base_ + kPage, static_cast<size_t>(room_), PROT_READ | PROT_WRITE)) std::abort();
  }

  uint8_t* base_ = nullptr;
  int64_t room_ = 0;
};

// The buffers of one case after the other; `begin` a case, then `take` its buffers. Regions are kept for the next case.
class Memory {
 public:
  explicit Memory(Place place = Place::kBeforeHole) : place_(place) {}
  void begin(Place place) {
    place_ = place;
    used_ = 0;
    heap_.clear();
  }

  // Filled with a pattern that is no zero, no NaN and no likely value. Aligned to 64 where bytes is a multiple of 64.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    uint8_t* p;
    if (place_ == Place::kHeap) {
      void* block = nullptr;
      if (posix_memalign(&block, 64, static_cast<size_t>(bytes ? bytes : 1))) std::abort();
      heap_.emplace_back(static_cast<uint8_t*>(block));
      p = heap_.back().get();
    } else {
      if (used_ == regions_.size()) regions_.push_back(std::make_unique<Region>());
      p = regions_[used_++]->get(bytes, place_ == Place::kBeforeHole);
    }
    if (bytes) std::memset(p, kUntouched, static_cast<size_t>(bytes));
    return reinterpret_cast<T*>(p);
  }
  static constexpr int kUntouched = 0x5a;

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  Place place_;
  size_t used_ = 0;
  std::vector<std::unique_ptr<Region>> regions_;
  std::vector<std::unique_ptr<uint8_t, Free>> heap_;
};

}  // namespace native
