// The C interface's instruction sets (isa.h), and the scratch memory of a thread.
#include "isa.h"

#include "core/torchquant_core.h"
#include "core/workspace.h"

using namespace torchquant;

int32_t tq_isa_count(void) { return isa_count(); }
const char* tq_isa_name(int32_t isa) { return isa_name(static_cast<Isa>(isa)); }
bool tq_isa_usable(int32_t isa) { return isa_built(static_cast<Isa>(isa)) && isa_supported(static_cast<Isa>(isa)); }
int32_t tq_active_isa(void) { return static_cast<int32_t>(active_isa()); }
tq_status tq_set_active_isa(int32_t isa) {
  if (!tq_isa_usable(isa)) return TQ_UNUSABLE_ISA;
  set_active_isa(static_cast<Isa>(isa));
  return TQ_OK;
}

void* tq_scratch(int64_t bytes) { return Workspace::of_this_thread().get(bytes); }
