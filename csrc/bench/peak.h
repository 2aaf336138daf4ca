// The most that this machine can do: the roofline for every figure of a benchmark.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace torchquant::bench {

// Names that measure_peak() accepts and this CPU can run, best first: the instruction sets of isa.h that multiply bytes
// ("amx_int8", "avx512_vnni", "avx_vnni", "avx2"), "avx2_saturating", "fp32_fma_512", "fp32_fma_256".
std::vector<std::string> peak_names();

// Billions of operations per second (a multiply-add counts as two) over all threads, the best of several windows that
// take `seconds` together. Throws std::invalid_argument for a name that is not in peak_names().
double measure_peak(const std::string& name, int threads, double seconds);

// GB/s at which `threads` threads together read `bytes` bytes again and again, each its own share; huge pages where the
// system gives them. 0 where this build has no reader (not x86).
double measure_bandwidth(int64_t bytes, int threads, double seconds);

// Seconds that the textbook's triple loop takes for int8 [m, k] x int8 [n, k] -> int32 [m, n], on one thread.
// vectorised: as the compiler vectorizes it at -O3 for any x86-64; otherwise as written.
double naive_product_seconds(int64_t m, int64_t n, int64_t k, bool vectorised);

}  // namespace torchquant::bench
