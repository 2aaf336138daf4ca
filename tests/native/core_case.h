// The core through its C interface alone (csrc/core/torchquant_core.h): whole tensors, threads as callbacks. What every
// case of this kind needs: instruction sets in turn, ways to divide the work, elements of any float type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/torchquant_core.h"
#include "draw.h"
#include "linear_case.h"
#include "memory.h"
#include "reference.h"

namespace native {

// Threads that divide the work at random places: one after the other in random order, or (real) all at once.
class Threads {
 public:
  Threads(uint64_t seed, bool real) : random_(seed), real_(real), count_(1 + random_.below(7)) {
    parallel_ = {this, [](void* self) { return static_cast<Threads*>(self)->count_; }, &Threads::run};
  }
  const tq_parallel* get() const { return &parallel_; }
  int64_t calls() const { return calls_; }

 private:
  struct Part {
    int64_t first, last;
  };

  static void run(void* context, int64_t begin, int64_t end, int64_t /*grain*/, tq_body body, void* argument) {
    Threads& self = *static_cast<Threads*>(context);
    ++self.calls_;
    std::vector<int64_t> cuts{begin, end};
    for (int64_t i = 0; i < self.random_.below(5); ++i) cuts.push_back(begin + self.random_.below(end - begin));
    std::sort(cuts.begin(), cuts.end());
    std::vector<Part> parts;
    for (size_t i = 0; i + 1 < cuts.size(); ++i)
      if (cuts[i] < cuts[i + 1]) parts.push_back({cuts[i], cuts[i + 1]});
    for (size_t i = parts.size(); i > 1; --i)
      std::swap(parts[i - 1], parts[static_cast<size_t>(self.random_.below(static_cast<int64_t>(i)))]);
    if (!self.real_) {
      for (const Part& part : parts) body(argument, part.first, part.last);
      return;
    }
    std::vector<std::thread> threads;
    for (size_t i = 1; i < parts.size(); ++i)
      threads.emplace_back([=, part = parts[i]] { body(argument, part.first, part.last); });
    body(argument, parts[0].first, parts[0].last);
    for (std::thread& thread : threads) thread.join();
  }

  Random random_;
  bool real_;
  int64_t count_, calls_ = 0;
  tq_parallel parallel_;
};

// One case: where its decisions come from, its memory, and whether threads are real.
struct Trial {
  Draw& draw;
  Memory& inputs;
  Memory& outputs;
  bool real_threads;
  Place place = Place::kHeap;
  int64_t divided = 0;  // parallel loops that the core has asked for

  void begin() {
    place = draw.pick({Place::kBeforeHole, Place::kBehindHole, Place::kHeap});
    inputs.begin(place);
  }
  tq_type float_type() { return draw.pick({TQ_F32, TQ_BF16, TQ_F16}); }
};

// Rows and columns of a matrix; one in three has enough elements for a second thread.
struct MatrixSize {
  int64_t rows, columns;
};
inline MatrixSize draw_matrix(Draw& draw) {
  if (draw.one_in(3)) return {120 + draw.below(200), 150 + draw.below(200)};
  return {draw_size(draw, 100), draw_size(draw, 400)};
}

// call(parallel, name) for every usable instruction set, alone and with the work divided; each call with fresh outputs.
template <class Call>
void on_every_path(Trial& trial, uint64_t seed, const Call& call) {
  const int32_t before = tq_active_isa();
  for (int32_t isa = 0; isa < tq_isa_count(); ++isa) {
    if (!tq_isa_usable(isa)) continue;
    CHECK(tq_set_active_isa(isa) == TQ_OK, "%s is usable and cannot be activated", tq_isa_name(isa));
    CHECK(tq_active_isa() == isa, "%s is not active", tq_isa_name(isa));
    trial.outputs.begin(trial.place);
    call(static_cast<const tq_parallel*>(nullptr), std::string(tq_isa_name(isa)) + ", one thread");
    Threads threads(seed + static_cast<uint64_t>(isa), trial.real_threads);
    trial.outputs.begin(trial.place);
    call(threads.get(), std::string(tq_isa_name(isa)) + ", divided");
    trial.divided += threads.calls();
  }
  CHECK(tq_set_active_isa(before) == TQ_OK, "the instruction set cannot be set back");
}

inline int64_t size_of(tq_type type) { return element_bytes(static_cast<OutType>(type)); }
inline float load(const void* x, tq_type type, int64_t i) { return load(x, static_cast<FloatType>(type), i); }
inline void store(void* x, tq_type type, int64_t i, float v) {
  if (type == TQ_F32) static_cast<float*>(x)[i] = v;
  else static_cast<uint16_t*>(x)[i] = type == TQ_BF16 ? narrow(v, 8, 7) : narrow(v, 5, 10);
}
inline float rounded(tq_type type, float v) {
  uint32_t memory = 0;
  store(&memory, type, 0, v);
  return load(&memory, type, 0);
}

inline void* random_elements(Memory& memory, Random& random, int64_t count, tq_type type, int flavour) {
  void* x = memory.take<uint8_t>(count * size_of(type));
  for (int64_t i = 0; i < count; ++i) store(x, type, i, draw_float(random, flavour));
  return x;
}

inline bool same_bytes(const void* a, const std::vector<uint8_t>& b) { return !std::memcmp(a, b.data(), b.size()); }
inline std::vector<uint8_t> bytes_of(const void* p, int64_t count) {
  const auto* first = static_cast<const uint8_t*>(p);
  return std::vector<uint8_t>(first, first + count);
}

}  // namespace native
