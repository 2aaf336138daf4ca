// A loop over parts of a range on the caller's threads (tq_parallel), and what a function of the C interface returns.
#pragma once

#include <cstdint>
#include <new>

#include "core/torchquant_core.h"

namespace torchquant {

// body(first, last) for parts that together make up [begin, end). Little work stays on this thread without a callback.
template <class Body>
void parallel_for(const tq_parallel* parallel, int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (!parallel || end - begin <= grain) return body(begin, end);
  const tq_body call = [](void* argument, int64_t first, int64_t last) {
    (*static_cast<const Body*>(argument))(first, last);
  };
  parallel->run(parallel->context, begin, end, grain, call, const_cast<Body*>(&body));
}

inline int64_t threads_of(const tq_parallel* parallel) { return parallel ? parallel->threads(parallel->context) : 1; }

// No exception of the core's own passes the C interface: memory is all that it can lack.
template <class Work>
tq_status status_of(const Work& work) {
  try {
    work();
  } catch (const std::bad_alloc&) {
    return TQ_OUT_OF_MEMORY;
  }
  return TQ_OK;
}

}  // namespace torchquant
