// Threads that stay together for a sequence of short parallel loops.
//
// A parallel region of OpenMP costs some microseconds, about as much as a small layer. A team is one region for many
// loops: its first thread runs the sequence, and each of the others waits for its part of the next loop. A part that
// its thread has not begun when the first thread is done with its own is run by the first thread: nothing ever waits
// for a thread that did not come, so the runtime may give fewer threads than were asked for.
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>

#include "core/torchquant_core.h"

namespace torchquant {

// Calls work(parallel) once, on the calling thread. `parallel` uses as many of torch's threads as are allowed now, and
// is valid until `work` returns; null: one thread. An exception of a part leaves the loop, and so `work`.
void with_team(c10::function_ref<void(const tq_parallel*)> work);

}  // namespace torchquant
