#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <stdexcept>

#if defined(TQ_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace torchquant {

const KernelTable& scalar_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avxvnni_kernels();
const KernelTable& avx512vnni_kernels();
const KernelTable& amxint8_kernels();

namespace {

// What cpuid and xgetbv report: the registers that the rows below ask about.
struct Cpu {
  uint32_t ecx1 = 0, ebx7 = 0, ecx7 = 0, edx7 = 0, eax71 = 0;  // of leaf 1, of leaf 7, of its subleaf 1
  uint64_t xcr0 = 0;                                           // registers that the operating system saves
};

constexpr bool has(uint64_t bits, uint64_t wanted) { return (bits & wanted) == wanted; }
constexpr uint64_t bit(int index) { return uint64_t{1} << index; }

bool needs_nothing(const Cpu&) { return true; }

#if defined(TQ_X86)
Cpu detect() {
  Cpu cpu;
  uint32_t eax, ebx, ecx, edx, ignore;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return cpu;
  if (!has(ecx, bit(27))) return cpu;  // OSXSAVE: xgetbv exists
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  uint32_t eax7;
  if (!__get_cpuid_count(7, 0, &eax7, &cpu.ebx7, &cpu.ecx7, &cpu.edx7)) return cpu;
  if (eax7 >= 1) __get_cpuid_count(7, 1, &cpu.eax71, &ignore, &ignore, &ignore);
  cpu.ecx1 = ecx;
  cpu.xcr0 = static_cast<uint64_t>(high) << 32 | low;
  return cpu;
}

// Linux hands out the 8 KB of tile state per process, and only on request.
bool request_amx_permission() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

bool needs_avx2(const Cpu& cpu) {
  return has(cpu.ecx1, bit(12) | bit(29)) && has(cpu.xcr0, 0x6) && has(cpu.ebx7, bit(5));  // FMA, F16C; YMM; AVX2
}
bool needs_avx_vnni(const Cpu& cpu) { return needs_avx2(cpu) && has(cpu.eax71, bit(4)); }
bool needs_avx512_vnni(const Cpu& cpu) {  // ZMM registers; F, DQ, BW, VL; VNNI
  return needs_avx2(cpu) && has(cpu.xcr0, 0xe6) && has(cpu.ebx7, bit(16) | bit(17) | bit(30) | bit(31)) &&
         has(cpu.ecx7, bit(11));
}
bool needs_amx_int8(const Cpu& cpu) {  // tile registers; AMX-TILE, AMX-INT8
  return needs_avx512_vnni(cpu) && has(cpu.xcr0, 0x60000) && has(cpu.edx7, bit(24) | bit(25)) &&
         request_amx_permission();
}
#define TQ_ON_X86(needs, kernels) needs, kernels
#else
Cpu detect() { return {}; }
#define TQ_ON_X86(needs, kernels) nullptr, nullptr
#endif

struct Row {
  const char* name;
  bool (*needs)(const Cpu&);
  const KernelTable& (*kernels)();  // null where the binary does not hold them
};

// One row for each instruction set, in ascending priority.
constexpr Row kIsas[] = {
    {"scalar", needs_nothing, scalar_kernels},
    {"avx2", TQ_ON_X86(needs_avx2, avx2_kernels)},
    {"avx_vnni", TQ_ON_X86(needs_avx_vnni, avxvnni_kernels)},
    {"avx512_vnni", TQ_ON_X86(needs_avx512_vnni, avx512vnni_kernels)},
    {"amx_int8", TQ_ON_X86(needs_amx_int8, amxint8_kernels)},
};
constexpr int kCount = static_cast<int>(std::size(kIsas));

const Row& row_of(Isa isa) { return kIsas[static_cast<int>(isa)]; }

const std::vector<bool>& supported() {  // by number; asked once, because AMX is requested on the way
  static const std::vector<bool> found = [] {
    const Cpu cpu = detect();
    std::vector<bool> answers;
    for (const Row& row : kIsas) answers.push_back(row.needs && row.needs(cpu));
    return answers;
  }();
  return found;
}

template <class Condition>
std::vector<Isa> best_first(const Condition& condition) {
  std::vector<Isa> isas;
  for (int i = kCount - 1; i >= 0; --i)
    if (condition(static_cast<Isa>(i))) isas.push_back(static_cast<Isa>(i));
  return isas;
}

std::atomic<const KernelTable*>& active_table() {
  static std::atomic<const KernelTable*> table{kernels_of(usable_isas().front())};
  return table;
}

}  // namespace

int isa_count() { return kCount; }

const char* isa_name(Isa isa) { return row_of(isa).name; }

std::optional<Isa> isa_from_name(const std::string& name) {
  for (int i = 0; i < kCount; ++i)
    if (name == kIsas[i].name) return static_cast<Isa>(i);
  return std::nullopt;
}

bool isa_built(Isa isa) { return row_of(isa).kernels != nullptr; }

bool isa_supported(Isa isa) { return supported()[static_cast<size_t>(isa)]; }

std::vector<Isa> built_isas() { return best_first(isa_built); }

std::vector<Isa> usable_isas() {
  return best_first([](Isa isa) { return isa_built(isa) && isa_supported(isa); });
}

bool is_usable(const char* name) {
  const std::optional<Isa> isa = isa_from_name(name);
  return isa && isa_built(*isa) && isa_supported(*isa);
}

const KernelTable* kernels_of(Isa isa) { return isa_built(isa) ? &row_of(isa).kernels() : nullptr; }

const KernelTable& kernels() { return *active_table().load(std::memory_order_relaxed); }

Isa active_isa() { return *isa_from_name(kernels().name); }

void set_active_isa(Isa isa) {
  if (!isa_built(isa) || !isa_supported(isa))
    throw std::invalid_argument(std::string("instruction set not usable here: ") + isa_name(isa));
  active_table().store(kernels_of(isa), std::memory_order_relaxed);
}

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
