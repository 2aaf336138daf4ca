// What this machine can do at most: int8 multiply-adds per second of each instruction set, and read bandwidth.
//
//   peak THREADS SECONDS NAME...      prints one line "NAME VALUE" each, GOPS or GB/s, summed over the threads
//
// The multiply loops are assembly, because an accumulator that a compiler spills to the stack makes the peak look half
// as high as it is. 24 (16, 8) independent accumulators cover the latency; the operands are registers, so nothing but
// the multipliers limits them. The "avx2" figure is the triple vpmaddubsw, vpmaddwd, vpaddd that AVX2 needs in vpdpbusd's place.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Each step runs `count` rounds of its instruction and returns the operations done (a multiply-add counts as two).

__attribute__((target("avx512f"))) double avx512_vnni(long count) {
  long left = count;
  asm volatile(
      "1:\n"
      ".irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23\n"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm\\r\n"
      ".endr\n"
      "dec %0\n"
      "jnz 1b\n"
      "vzeroupper\n"
      : "+r"(left)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23");
  return 24.0 * 128 * count;
}

__attribute__((target("avx2"))) double avx_vnni(long count) {
  long left = count;
  asm volatile(
      "1:\n"
      ".irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13\n"
      "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm\\r\n"
      ".endr\n"
      "dec %0\n"
      "jnz 1b\n"
      "vzeroupper\n"
      : "+r"(left)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13");
  return 14.0 * 64 * count;
}

__attribute__((target("avx2"))) double avx2(long count) {
  long left = count;
  asm volatile(
      "1:\n"
      ".irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\n"
      "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n"
      "vpmaddwd %%ymm14, %%ymm12, %%ymm12\n"
      "vpaddd %%ymm12, %%ymm\\r, %%ymm\\r\n"
      ".endr\n"
      "dec %0\n"
      "jnz 1b\n"
      "vzeroupper\n"
      : "+r"(left)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
        "xmm12");
  return 12.0 * 64 * count;
}

struct __attribute__((packed)) TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {};
  unsigned char rows[16] = {};
};

__attribute__((target("amx-tile,amx-int8"))) double amx_int8(long count) {
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  // _tile_loadconfig() tells g++ that it reads one pointer, whereupon it drops the stores to the rest of the structure.
  asm volatile("ldtilecfg %0" ::"m"(config));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (long i = 0; i < count; i++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 16 * 16 * 64 * 2 * count;
}

// Linux hands out the tile registers on request only, once per process.
bool request_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

__attribute__((target("avx2"))) double read_once(const std::vector<char>& buffer) {
  const char* p = buffer.data();
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  const size_t bytes = buffer.size() / 128 * 128;
  for (size_t i = 0; i < bytes; i += 128) {
    _mm_prefetch(p + i + 1024, _MM_HINT_T0);
    _mm_prefetch(p + i + 1024 + 64, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      sums[j] = _mm256_or_si256(sums[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
    }
  }
  asm volatile("" ::"x"(sums[0]), "x"(sums[1]), "x"(sums[2]), "x"(sums[3]));
  return double(bytes);
}

// The best rate over short windows, all threads in the same window: other processes can only lower it.
double best_rate(int threads, double seconds, const std::function<std::function<double()>()>& prepare) {
  constexpr int windows = 8;
  std::vector<std::vector<double>> rates(windows, std::vector<double>(threads));
  std::atomic<int> preparing{threads};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; t++) {
    pool.emplace_back([&, t] {
      const std::function<double()> step = prepare();
      step();
      preparing--;
      while (preparing > 0) std::this_thread::yield();
      for (int w = 0; w < windows; w++) {
        const Clock::time_point begin = Clock::now();
        double work = 0;
        do work += step();
        while (seconds_since(begin) < seconds / windows);
        rates[w][t] = work / seconds_since(begin);
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  double best = 0;
  for (const std::vector<double>& row : rates) {
    double sum = 0;
    for (double rate : row) sum += rate;
    best = std::max(best, sum);
  }
  return best / 1e9;
}

double measure(const std::string& name, int threads, double seconds) {
  const auto repeat = [&](double (*step)(long), long count) {
    return best_rate(threads, seconds, [=] { return [=] { return step(count); }; });
  };
  if (name == "amx_int8") return request_tiles() ? repeat(amx_int8, 2000) : -1;
  if (name == "avx512_vnni") return repeat(avx512_vnni, 5000);
  if (name == "avx_vnni") return repeat(avx_vnni, 5000);
  if (name == "avx2") return repeat(avx2, 5000);
  if (name.rfind("read_", 0) == 0) {  // read_16 reads 16 MiB, shared out to the threads
    const size_t bytes = size_t(std::atof(name.c_str() + 5) * (1 << 20)) / threads;
    return best_rate(threads, seconds, [=] {
      const auto buffer = std::make_shared<std::vector<char>>(bytes + 4096, 1);
      return [=] { return read_once(*buffer); };
    });
  }
  return -1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: peak THREADS SECONDS NAME...\n");
    return 2;
  }
  for (int i = 3; i < argc; i++)
    std::printf("%s %.1f\n", argv[i], measure(argv[i], std::atoi(argv[1]), std::atof(argv[2])));
}
