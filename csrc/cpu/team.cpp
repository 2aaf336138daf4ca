#include "cpu/team.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

#include "cpu/core_call.h"

namespace torchquant {
namespace {

constexpr int64_t kMostThreads = 64;
constexpr auto kSpin = std::chrono::microseconds(50);  // then other programs may have the core
constexpr auto kYield = std::chrono::milliseconds(2);  // then the thread sleeps
constexpr auto kSleep = std::chrono::microseconds(100);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns when `ready()` is true. A thread that `may_sleep` saves power in long pauses.
template <class Ready>
void wait_until(bool may_sleep, const Ready& ready) {
  using Clock = std::chrono::steady_clock;
  for (int i = 0; i < 64; ++i) {  // usually it is soon: without a look at the clock
    if (ready()) return;
    pause();
  }
  for (const auto start = Clock::now();;) {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return;
      pause();
    }
    const auto waited = Clock::now() - start;
    if (waited < kSpin) continue;
    if (may_sleep && waited > kYield) std::this_thread::sleep_for(kSleep);
    else std::this_thread::yield();
  }
}

// The part of one thread. The first thread writes `body` to `last` while the state is kNone and opens the part; whoever
// takes it reads them, and makes the state kNone when the part is done.
struct alignas(64) Part {
  enum State : uint32_t { kNone, kOpen, kTaken, kClosed };
  std::atomic<uint32_t> state{kNone};
  tq_body body = nullptr;
  void* argument = nullptr;
  int64_t first = 0, last = 0;
  std::exception_ptr error;

  bool take() {
    uint32_t expected = kOpen;
    return state.load(std::memory_order_relaxed) == kOpen &&
           state.compare_exchange_strong(expected, kTaken, std::memory_order_acquire, std::memory_order_relaxed);
  }

  void run() noexcept {
    try {
      body(argument, first, last);
    } catch (...) {
      error = std::current_exception();
    }
    state.store(kNone, std::memory_order_release);
  }
};

class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  const tq_parallel* parallel() const { return &parallel_; }

  void close() {
    for (int64_t i = 1; i < threads_; ++i) part(i).state.store(Part::kClosed, std::memory_order_release);
  }

  void serve(int64_t thread) {  // until the team is closed
    if (thread < 1 || thread >= threads_) return;
    Part& own = part(thread);
    for (;;) {
      uint32_t state = Part::kNone;
      wait_until(true, [&] {
        state = own.state.load(std::memory_order_acquire);
        return state == Part::kOpen || state == Part::kClosed;
      });
      if (state == Part::kClosed) return;
      if (own.take()) own.run();
    }
  }

 private:
  Part& part(int64_t thread) { return parts_[static_cast<size_t>(thread)]; }

  void loop(int64_t begin, int64_t end, int64_t grain, tq_body body, void* argument) {
    const int64_t range = end - begin;
    const int64_t wanted = std::min(threads_, (range - 1) / std::max<int64_t>(1, grain) + 1);
    if (busy_ || wanted <= 1) return body(argument, begin, end);  // busy: a loop inside a part
    const int64_t length = (range - 1) / wanted + 1, count = (range - 1) / length + 1;
    busy_ = true;
    for (int64_t i = 1; i < count; ++i) {
      Part& p = part(i);
      p.body = body;
      p.argument = argument;
      p.first = begin + i * length;
      p.last = std::min(end, p.first + length);
      p.state.store(Part::kOpen, std::memory_order_release);
    }
    std::exception_ptr error;
    try {
      body(argument, begin, begin + length);
    } catch (...) {
      error = std::current_exception();
    }
    for (int64_t i = 1; i < count; ++i)
      if (part(i).take()) part(i).run();
    for (int64_t i = 1; i < count; ++i) {
      Part& p = part(i);
      wait_until(false, [&] { return p.state.load(std::memory_order_acquire) == Part::kNone; });
      if (p.error && !error) error = p.error;
      p.error = nullptr;
    }
    busy_ = false;
    if (error) std::rethrow_exception(error);
  }

  static int64_t count_threads(void* context) {
    const Team& team = *static_cast<Team*>(context);
    return team.busy_ ? 1 : team.threads_;
  }

  static void run_loop(void* context, int64_t begin, int64_t end, int64_t grain, tq_body body, void* argument) {
    if (begin < end) static_cast<Team*>(context)->loop(begin, end, grain, body, argument);
  }

  const int64_t threads_;
  bool busy_ = false;  // written by the first thread while all parts are kNone
  const tq_parallel parallel_{this, count_threads, run_loop};
  std::array<Part, kMostThreads> parts_;
};

}  // namespace

void with_team(c10::function_ref<void(const tq_parallel*)> work) {
  const int64_t threads = std::min(torch_threads(nullptr), kMostThreads);
  if (threads < 2) return work(nullptr);
  Team team(threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t /*last*/) {
    if (first != 0) return team.serve(first);
    struct Close {  // also after an exception: at::parallel_for waits for all threads
      Team& team;
      ~Close() { team.close(); }
    } close{team};
    work(team.parallel());
  });
}

}  // namespace torchquant
