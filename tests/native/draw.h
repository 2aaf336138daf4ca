// The source of a case: bytes (of the fuzzer, read as decisions; zeros after the last one), and, for the bulk of the
// values, a generator whose seed is one of the decisions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace native {

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t limit) { return static_cast<int64_t>(next() % static_cast<uint64_t>(limit)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  float unit() { return static_cast<float>(next() >> 40) * 0x1p-24f; }  // [0, 1)
  float normal() {                                                      // near enough
    float sum = 0.0f;
    for (int i = 0; i < 4; ++i) sum += unit();
    return (sum - 2.0f) * 1.7320508f;
  }

 private:
  uint64_t state_;
};

class Draw {
 public:
  Draw(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint32_t byte() { return size_ ? (--size_, *data_++) : 0; }
  int64_t below(int64_t limit) {
    uint64_t value = byte();
    for (int64_t reach = 256; reach < limit; reach *= 256) value = value << 8 | byte();
    return static_cast<int64_t>(value % static_cast<uint64_t>(limit));
  }
  bool one_in(int64_t n) { return below(n) == n - 1; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }
  uint64_t seed() {
    uint64_t value = 0;
    for (int i = 0; i < 4; ++i) value = value << 8 | byte();
    return value;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

}  // namespace native
