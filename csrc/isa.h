// Instruction sets as values: which are built, which this CPU and OS support, which one is active.
//
// "Built" is a property of the binary (x86 or not), "supported" of the machine (cpuid, xgetbv and, for AMX, the
// kernel's permission). They are two questions and have two functions. The choice is made once, as "go down the
// list"; `set_active_isa` overrides it for tests and for users. No torch header: the kernels' own tests use this.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace torchquant {

// In ascending priority; the number is the index into the registry of kernel tables.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3, kAmxInt8 = 4 };
inline constexpr int kNumIsas = 5;

const char* isa_name(Isa isa);
std::optional<Isa> isa_from_name(const std::string& name);

bool isa_built(Isa isa);
bool isa_supported(Isa isa);     // by this CPU and operating system
std::vector<Isa> built_isas();   // best first
std::vector<Isa> usable_isas();  // built and supported, best first

Isa active_isa();
void set_active_isa(Isa isa);  // throws std::invalid_argument where it is not usable

std::string cpu_name();

}  // namespace torchquant
