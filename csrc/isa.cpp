#include "isa.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "kernels/kernel_table.h"

#if defined(TQ_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace torchquant {
namespace {

constexpr const char* kNames[kNumIsas] = {"scalar", "avx2", "avx_vnni", "avx512_vnni", "amx_int8"};

#if defined(TQ_X86)
struct CpuFeatures {
  bool avx2 = false, avx_vnni = false, avx512_vnni = false, amx_int8 = false;
};

uint64_t xgetbv0() {
  uint32_t eax, edx;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (static_cast<uint64_t>(edx) << 32) | eax;
}

// Linux hands out the 8 KB tile state per process and only on request.
bool request_amx_permission() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures f;
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return f;
  const bool osxsave = ecx & (1u << 27), fma = ecx & (1u << 12), f16c = ecx & (1u << 29);
  if (!osxsave || !fma || !f16c) return f;
  const uint64_t xcr0 = xgetbv0();
  const bool os_avx = (xcr0 & 0x6) == 0x6, os_avx512 = (xcr0 & 0xe6) == 0xe6;
  const bool os_amx = (xcr0 & 0x60000) == 0x60000;
  uint32_t eax7, ebx7, ecx7, edx7, eax71 = 0, ignore;
  if (!__get_cpuid_count(7, 0, &eax7, &ebx7, &ecx7, &edx7)) return f;
  if (eax7 >= 1) __get_cpuid_count(7, 1, &eax71, &ignore, &ignore, &ignore);
  f.avx2 = os_avx && (ebx7 & (1u << 5));
  f.avx_vnni = f.avx2 && (eax71 & (1u << 4));
  const uint32_t avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  f.avx512_vnni = f.avx2 && os_avx512 && (ebx7 & avx512) == avx512 && (ecx7 & (1u << 11));
  const uint32_t amx = (1u << 24) | (1u << 25);  // AMX-TILE, AMX-INT8
  f.amx_int8 = f.avx512_vnni && os_amx && (edx7 & amx) == amx && request_amx_permission();
  return f;
}

const CpuFeatures& features() {
  static const CpuFeatures f = detect();
  return f;
}
#endif

// One table per instruction set, in the order of the enum; null where the binary does not hold it.
const KernelTable* registry(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return &scalar_kernels();
#if defined(TQ_X86)
    case Isa::kAvx2: return &avx2_kernels();
    case Isa::kAvxVnni: return &avxvnni_kernels();
    case Isa::kAvx512Vnni: return &avx512vnni_kernels();
    case Isa::kAmxInt8: return &amxint8_kernels();
#endif
    default: return nullptr;
  }
}

std::atomic<int>& active_slot() {
  static std::atomic<int> slot{static_cast<int>(usable_isas().front())};
  return slot;
}

std::atomic<const KernelTable*>& table_slot() {
  static std::atomic<const KernelTable*> slot{registry(active_isa())};
  return slot;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::optional<Isa> isa_from_name(const std::string& name) {
  for (int i = 0; i < kNumIsas; ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  return std::nullopt;
}

bool isa_built(Isa isa) { return registry(isa) != nullptr; }

bool isa_supported(Isa isa) {
  if (isa == Isa::kScalar) return true;
#if defined(TQ_X86)
  const CpuFeatures& f = features();
  switch (isa) {
    case Isa::kAvx2: return f.avx2;
    case Isa::kAvxVnni: return f.avx_vnni;
    case Isa::kAvx512Vnni: return f.avx512_vnni;
    case Isa::kAmxInt8: return f.amx_int8;
    default: return false;
  }
#else
  return false;
#endif
}

std::vector<Isa> built_isas() {
  std::vector<Isa> isas;
  for (int i = kNumIsas - 1; i >= 0; --i)
    if (isa_built(static_cast<Isa>(i))) isas.push_back(static_cast<Isa>(i));
  return isas;
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> isas;
  for (Isa isa : built_isas())
    if (isa_supported(isa)) isas.push_back(isa);
  return isas;
}

Isa active_isa() { return static_cast<Isa>(active_slot().load(std::memory_order_relaxed)); }

void set_active_isa(Isa isa) {
  if (!isa_built(isa) || !isa_supported(isa))
    throw std::invalid_argument(std::string("instruction set not usable here: ") + isa_name(isa));
  table_slot().store(registry(isa), std::memory_order_relaxed);
  active_slot().store(static_cast<int>(isa), std::memory_order_relaxed);
}

const KernelTable& kernels() { return *table_slot().load(std::memory_order_relaxed); }

std::string cpu_name() {
#if defined(TQ_X86)
  uint32_t regs[12], max_leaf, unused;
  if (!__get_cpuid(0x80000000u, &max_leaf, &unused, &unused, &unused) || max_leaf < 0x80000004u) return "x86-64";
  for (uint32_t i = 0; i < 3; ++i)
    __get_cpuid(0x80000002u + i, &regs[4 * i], &regs[4 * i + 1], &regs[4 * i + 2], &regs[4 * i + 3]);
  char text[49] = {0};
  std::memcpy(text, regs, 48);
  std::string name(text);
  const size_t first = name.find_first_not_of(' '), last = name.find_last_not_of(' ');
  return first == std::string::npos ? "x86-64" : name.substr(first, last - first + 1);
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "unknown";
#endif
}

}  // namespace torchquant
