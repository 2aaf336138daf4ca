// The multiply loops are assembly, because an accumulator that a compiler spills to the stack makes the peak look half
// as high as it is. Independent accumulators (24, 14, 8) cover the latency; the operands are registers, so nothing but
// the execution ports limits them. No torch header, and nothing to compile at run time.
#include "bench/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>

#include "isa.h"
#include "kernels/target.h"

#if defined(TQ_X86)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torchquant::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

#if defined(TQ_X86)

// Each loop runs `count` rounds of its instructions and returns the operations done.
#define TQ_LOOP(body, ...) \
  __asm__ volatile("1:\n" body "dec %0\njnz 1b\nvzeroupper\n" : "+r"(count) : : "cc", __VA_ARGS__)
#define TQ_LOW_REGISTERS                                                                                              \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"

__attribute__((target("avx512f"))) double avx512_vnni(int64_t count) {
  const double operations = 24.0 * 128 * static_cast<double>(count);
  TQ_LOOP(
      ".irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23\n"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm\\r\n"
      ".endr\n",
      TQ_LOW_REGISTERS, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23");
  return operations;
}

// The accumulators are and remain zero, because infinities and denormals are slow on some CPUs.
__attribute__((target("avx512f"))) double fp32_fma_512(int64_t count) {
  const double operations = 24.0 * 32 * static_cast<double>(count);
  __asm__ volatile("vpxord %%zmm30, %%zmm30, %%zmm30\n" : : : "xmm30");
  TQ_LOOP(
      ".irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23\n"
      "vfmadd231ps %%zmm30, %%zmm30, %%zmm\\r\n"
      ".endr\n",
      TQ_LOW_REGISTERS, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23");
  return operations;
}

__attribute__((target("avx2"))) double fp32_fma_256(int64_t count) {
  const double operations = 14.0 * 16 * static_cast<double>(count);
  __asm__ volatile("vpxor %%ymm15, %%ymm15, %%ymm15\n" : : : "xmm15");
  TQ_LOOP(
      ".irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13\n"
      "vfmadd231ps %%ymm15, %%ymm15, %%ymm\\r\n"
      ".endr\n",
      TQ_LOW_REGISTERS);
  return operations;
}

__attribute__((target("avx2"))) double avx_vnni(int64_t count) {
  const double operations = 14.0 * 64 * static_cast<double>(count);
  TQ_LOOP(
      ".irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13\n"
      "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm\\r\n"
      ".endr\n",
      TQ_LOW_REGISTERS);
  return operations;
}

// The instructions of avx2.cpp for one row and two weight vectors: |x| once, then sign, multiply, widen, add for each of them.
// 11 holds x, 8 and 9 the weights, 10 the ones.
#define TQ_EXACT(weights, sum)             \
  "vpsignb %%ymm11, %%ymm" weights         \
  ", %%ymm13\n"                            \
  "vpmaddubsw %%ymm13, %%ymm12, %%ymm13\n" \
  "vpmaddwd %%ymm10, %%ymm13, %%ymm13\n"   \
  "vpaddd %%ymm13, %%ymm" sum ", %%ymm" sum "\n"
#define TQ_EXACT_ROW(sum0, sum1) "vpabsb %%ymm11, %%ymm12\n" TQ_EXACT("8", sum0) TQ_EXACT("9", sum1)

__attribute__((target("avx2"))) double avx2(int64_t count) {
  const double operations = 8.0 * 64 * static_cast<double>(count);
  TQ_LOOP(TQ_EXACT_ROW("0", "1") TQ_EXACT_ROW("2", "3") TQ_EXACT_ROW("4", "5") TQ_EXACT_ROW("6", "7"),
          TQ_LOW_REGISTERS);
  return operations;
}

// The same without signs, as in libraries that let vpmaddubsw saturate or restrict its operands to seven bits.
__attribute__((target("avx2"))) double avx2_saturating(int64_t count) {
  const double operations = 12.0 * 64 * static_cast<double>(count);
  TQ_LOOP(
      ".irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\n"
      "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n"
      "vpmaddwd %%ymm14, %%ymm12, %%ymm12\n"
      "vpaddd %%ymm12, %%ymm\\r, %%ymm\\r\n"
      ".endr\n",
      TQ_LOW_REGISTERS);
  return operations;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Four products of two by two tiles, as the kernel runs them. is_usable() has requested the tile registers.
double amx_int8(int64_t count) {
  const double operations = 4.0 * 16 * 16 * 64 * 2 * static_cast<double>(count);
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  __asm__ volatile("ldtilecfg %0\n.irp r, 0, 1, 2, 3, 4, 5, 6, 7\ntilezero %%tmm\\r\n.endr\n" ::"m"(config));
  __asm__ volatile(
      "1:\n"
      "tdpbusd %%tmm6, %%tmm4, %%tmm0\n"
      "tdpbusd %%tmm7, %%tmm4, %%tmm1\n"
      "tdpbusd %%tmm6, %%tmm5, %%tmm2\n"
      "tdpbusd %%tmm7, %%tmm5, %%tmm3\n"
      "dec %0\n"
      "jnz 1b\n"
      "tilerelease\n"
      : "+r"(count)
      :
      : "cc");
  return operations;
}

struct Loop {
  const char* name;
  const char* needs;  // instruction set of isa.h
  double (*run)(int64_t count);
};
constexpr Loop kLoops[] = {
    {"amx_int8", "amx_int8", amx_int8},           {"avx512_vnni", "avx512_vnni", avx512_vnni},
    {"avx_vnni", "avx_vnni", avx_vnni},           {"avx2", "avx2", avx2},
    {"avx2_saturating", "avx2", avx2_saturating}, {"fp32_fma_512", "avx512_vnni", fp32_fma_512},
    {"fp32_fma_256", "avx2", fp32_fma_256},
};

// Four streams a quarter of the buffer apart (they keep more lines in flight than one), or one.
template <int kStreams>
__attribute__((target("avx2"))) void read_once(const char* p, int64_t bytes) {
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  const int64_t apart = bytes / kStreams / 128 * 128;
  for (int64_t i = 0; i < apart; i += 128) {
    TQ_UNROLL
    for (int s = 0; s < kStreams; ++s) {
      const char* line = p + s * apart + i;
      _mm_prefetch(line + 1024, _MM_HINT_T0);
      _mm_prefetch(line + 1024 + 64, _MM_HINT_T0);
      TQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        const __m256i* vector = reinterpret_cast<const __m256i*>(line + 32 * j);
        sums[j] = _mm256_or_si256(sums[j], _mm256_loadu_si256(vector));
      }
    }
  }
  __asm__ volatile("" ::"x"(sums[0]), "x"(sums[1]), "x"(sums[2]), "x"(sums[3]));
}

// Pages of 2 MiB where the system has them: with 4 KiB pages the address translation would be measured.
std::shared_ptr<char> filled_buffer(int64_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t rounded = (static_cast<size_t>(bytes) + 4096 + kHugePage - 1) / kHugePage * kHugePage;
  std::shared_ptr<char> buffer(static_cast<char*>(std::aligned_alloc(kHugePage, rounded)), std::free);
  if (!buffer) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(buffer.get(), rounded, MADV_HUGEPAGE);
#endif
  std::fill(buffer.get(), buffer.get() + rounded, char{1});
  return buffer;
}

// The best rate over short windows, all threads in the same window: other processes can only lower it. `prepare` runs
// on each thread and returns the step that is repeated there; a step returns the work it did.
double best_rate(int threads, double seconds, const std::function<std::function<double()>()>& prepare) {
  constexpr int kWindows = 8;
  std::vector<std::vector<double>> rates(kWindows, std::vector<double>(static_cast<size_t>(threads)));
  std::atomic<int> preparing{threads};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      const std::function<double()> step = prepare();
      step();
      --preparing;
      while (preparing > 0) std::this_thread::yield();
      for (std::vector<double>& window : rates) {
        const Clock::time_point begin = Clock::now();
        double work = 0;
        do work += step();
        while (seconds_since(begin) < seconds / kWindows);
        window[static_cast<size_t>(t)] = work / seconds_since(begin);
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  double best = 0;
  for (const std::vector<double>& window : rates) {
    double sum = 0;
    for (double rate : window) sum += rate;
    best = std::max(best, sum);
  }
  return best / 1e9;
}

#endif  // TQ_X86

#if defined(__GNUC__) && !defined(__clang__)
#define TQ_AS_WRITTEN __attribute__((noinline, optimize("O2", "no-tree-vectorize")))
#else
#define TQ_AS_WRITTEN __attribute__((noinline))
#endif

template <class Rows>
inline void triple_loop(const Rows& rows, int64_t m, int64_t n, int64_t k, int32_t* c) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) c[i * n + j] = rows(i, j, k);
  }
}

TQ_AS_WRITTEN int32_t dot_as_written(const int8_t* a, const int8_t* w, int64_t k) {
  int32_t sum = 0;
#if defined(__clang__)
#pragma clang loop vectorize(disable) interleave(disable)
#endif
  for (int64_t i = 0; i < k; ++i) sum += static_cast<int32_t>(a[i]) * w[i];
  return sum;
}

__attribute__((noinline)) int32_t dot_vectorised(const int8_t* a, const int8_t* w, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += static_cast<int32_t>(a[i]) * w[i];
  return sum;
}

}  // namespace

std::vector<std::string> peak_names() {
  std::vector<std::string> names;
#if defined(TQ_X86)
  for (const Loop& loop : kLoops)
    if (is_usable(loop.needs)) names.emplace_back(loop.name);
#endif
  return names;
}

double measure_peak(const std::string& name, int threads, double seconds) {
#if defined(TQ_X86)
  for (const Loop& loop : kLoops) {
    if (name != loop.name || !is_usable(loop.needs)) continue;
    const int64_t count = loop.run == amx_int8 ? 1000 : 5000;  // about 20 microseconds
    return best_rate(threads, seconds, [&] { return [&, count] { return loop.run(count); }; });
  }
#endif
  throw std::invalid_argument("no peak of this name on this machine: " + name);
}

double measure_bandwidth(int64_t bytes, int threads, double seconds) {
#if defined(TQ_X86)
  if (!is_usable("avx2")) return 0;
  const int64_t share = std::max<int64_t>(bytes / threads, 512);
  const int64_t repeats = std::max<int64_t>(1, (int64_t{1} << 19) / share);  // the clock costs what 8 KiB do
  const auto rate = [&](void (*read)(const char*, int64_t)) {
    return best_rate(threads, seconds / 2, [=] {
      const std::shared_ptr<char> buffer = filled_buffer(share);
      return [=] {
        for (int64_t i = 0; i < repeats; ++i) read(buffer.get(), share);
        return static_cast<double>(share) * static_cast<double>(repeats);
      };
    });
  };
  return std::max(rate(read_once<1>), rate(read_once<4>));
#else
  return 0;
#endif
}

double naive_product_seconds(int64_t m, int64_t n, int64_t k, bool vectorised) {
  const std::vector<int8_t> a(static_cast<size_t>(m * k), 3), w(static_cast<size_t>(n * k), -5);
  std::vector<int32_t> c(static_cast<size_t>(m * n));
  const auto dot = vectorised ? dot_vectorised : dot_as_written;
  const Clock::time_point begin = Clock::now();
  triple_loop(
      [&](int64_t i, int64_t j, int64_t length) {
        return dot(&a[static_cast<size_t>(i * length)], &w[static_cast<size_t>(j * length)], length);
      },
      m, n, k, c.data());
  const double seconds = seconds_since(begin);
  if (c.back() != -15 * static_cast<int32_t>(k)) throw std::runtime_error("naive_product_seconds: wrong sum");
  return seconds;
}

}  // namespace torchquant::bench
