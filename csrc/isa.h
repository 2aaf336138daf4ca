// Instruction sets as values: which are built, which this CPU and operating system support, which one is active.
//
// isa.cpp has one row for each instruction set: its name, what it needs, its table of kernels. An instruction set is
// added with one row there and one file in kernels/. "Built" is a property of the binary, "supported" of the machine;
// the two questions have two functions. The choice is made once, as "go down the list from the best"; `set_active_isa`
// overrides the choice for tests and for users. No torch header: the tests of the kernels use this without torch.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels/kernel_table.h"

namespace torchquant {

enum class Isa : int {};  // the number of a row in isa.cpp

int isa_count();
const char* isa_name(Isa isa);
std::optional<Isa> isa_from_name(const std::string& name);

bool isa_built(Isa isa);
bool isa_supported(Isa isa);             // by this CPU and operating system
std::vector<Isa> built_isas();           // best first
std::vector<Isa> usable_isas();          // built and supported, best first
bool is_usable(const char* name);        // the same question about one, by its name
const KernelTable* kernels_of(Isa isa);  // null where it is not built

Isa active_isa();
void set_active_isa(Isa isa);  // throws std::invalid_argument where it is not usable
const KernelTable& kernels();  // those of the active instruction set

std::string cpu_name();

}  // namespace torchquant
