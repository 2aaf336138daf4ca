// The core (core/torchquant_core.h) as an operator calls it: torch's threads, torch's types, a failure as an exception.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <new>
#include <string_view>

#include "common/checks.h"
#include "core/torchquant_core.h"
#include "cpu/fork.h"
#include "cpu/rows.h"

namespace torchquant {

inline int64_t torch_threads(void* /*context*/) {
  if (just_forked.load(std::memory_order_relaxed)) threads_after_fork();
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

inline void run_on_torch_threads(void* /*context*/, int64_t begin, int64_t end, int64_t grain, tq_body body,
                                 void* argument) {
  if (just_forked.load(std::memory_order_relaxed)) threads_after_fork();
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(argument, first, last); });
}

inline constexpr tq_parallel kTorchThreads = {nullptr, torch_threads, run_on_torch_threads};

inline void check_status(tq_status status) {
  if (status == TQ_OUT_OF_MEMORY) throw std::bad_alloc();
}

inline tq_type type_of(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16: return TQ_BF16;
    case at::kHalf: return TQ_F16;
    case at::kChar: return TQ_I8;
    case at::kByte: return TQ_U8;
    case at::kInt: return TQ_I32;
    default: return TQ_F32;
  }
}
inline tq_type type_of(const at::Tensor& t) { return type_of(t.scalar_type()); }

inline tq_activation activation_of(const char* op, std::string_view name) {
  return static_cast<tq_activation>(activation_from(op, name));
}

// The tensor itself where its rows are a fixed distance apart, otherwise a copy.
inline at::Tensor as_rows(const at::Tensor& input) {
  return input.is_contiguous() || row_stride(input) ? input : input.contiguous();
}

// A result of as_rows with k elements in a row.
inline tq_rows rows_of(const at::Tensor& rows, int64_t k) {
  tq_rows r;
  r.x = rows.const_data_ptr();
  r.type = type_of(rows);
  r.k = k;
  r.m = k ? rows.numel() / k : 0;
  r.stride = row_stride(rows).value_or(k);  // no value: there are no rows
  return r;
}

}  // namespace torchquant
