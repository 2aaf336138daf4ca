// activation, gated_activation: elementwise, one pass, the epilogue's arithmetic (kernels/activation.inc).
//
// Memory is read as it lies. A dense tensor in any order of dimensions is one run of elements, and so is its result;
// rows further apart than they are long (a half of a fused projection) are read row by row. Only what fits neither
// is copied first.
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "common/checks.h"
#include "isa.h"
#include "cpu/output.h"
#include "cpu/rows.h"

namespace torchquant {
namespace {

constexpr int64_t kLine = 64;                   // elements: threads share whole cache lines
constexpr int64_t kThreadedElements = 1 << 14;  // from here a second thread pays

bool is_dense(const at::Tensor& t) { return t.unsafeGetTensorImpl()->is_non_overlapping_and_dense_or_false(); }

// Uninitialised, with torch's rule for elementwise results: the input's strides where it is dense, else their order.
at::Tensor empty_elementwise(const at::Tensor& input, at::ScalarType dtype) {
  const auto options = input.options().dtype(dtype);
  if (input.is_contiguous()) return empty_output(input.sizes(), options);
  at::Tensor out = empty_output({input.numel()}, options);
  if (is_dense(input)) out.unsafeGetTensorImpl()->set_sizes_and_strides(input.sizes(), input.strides());
  else
    out.unsafeGetTensorImpl()->set_sizes_and_strides(input.sizes(),
                                                     at::infer_dense_strides(input.sizes(), input.strides()));
  return out;
}

struct Source {  // elements in the order of the result's memory
  at::Tensor held;
  bool by_row;
  int64_t stride;  // of rows
};

Source source_of(const at::Tensor& input, const at::Tensor& out) {
  if (input.strides() == out.strides() || (input.is_contiguous() && out.is_contiguous())) return {input, false, 0};
  if (out.is_contiguous())
    if (const auto stride = row_stride(input)) return {input, true, *stride};
  at::Tensor copy = at::empty_like(input).as_strided(out.sizes(), out.strides());
  copy.copy_(input);
  return {copy, false, 0};
}

void run(ActivationArgs args, const at::Tensor& out, const Source& x, const Source* up) {
  const KernelTable& table = kernels();
  const int64_t n = out.numel(), in_bytes = x.held.element_size(), out_bytes = out.element_size();
  const char* x_data = static_cast<const char*>(x.held.const_data_ptr());
  const char* up_data = up ? static_cast<const char*>(up->held.const_data_ptr()) : nullptr;
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  const auto span = [&](int64_t x_at, int64_t up_at, int64_t out_at, int64_t count) {
    ActivationArgs a = args;
    a.x = x_data + x_at * in_bytes;
    a.up = up ? up_data + up_at * in_bytes : nullptr;
    a.out = out_data + out_at * out_bytes;
    a.n = count;
    table.activate_span(a);
  };
  if (x.by_row || (up && up->by_row)) {
    const int64_t k = out.size(-1);
    const int64_t x_stride = x.by_row ? x.stride : k, up_stride = up && up->by_row ? up->stride : k;
    at::parallel_for(0, n / k, std::max<int64_t>(1, kThreadedElements / 2 / k), [&](int64_t first, int64_t last) {
      for (int64_t m = first; m < last; ++m) span(m * x_stride, m * up_stride, m * k, k);
    });
    return;
  }
  at::parallel_for(0, ceil_div(n, kLine), kThreadedElements / 2 / kLine, [&](int64_t first, int64_t last) {
    const int64_t from = first * kLine;
    span(from, from, from, std::min(n, last * kLine) - from);
  });
}

at::Tensor activation(const at::Tensor& input, std::string_view activation, std::optional<at::ScalarType> dtype) {
  const char* op = "activation";
  check_float(op, "input", input);
  const at::ScalarType out_dtype = dtype.value_or(input.scalar_type());
  TORCH_CHECK_TYPE(is_float_input(out_dtype), op, ": dtype must be float32, bfloat16 or float16, got ",
                   dtype_name(out_dtype));
  ActivationArgs args{};
  args.in_type = float_type(input.scalar_type());
  args.out_type = float_type(out_dtype);
  args.activation = activation_from(op, activation);
  at::Tensor out = empty_elementwise(input, out_dtype);
  if (out.numel() > 0) run(args, out, source_of(input, out), nullptr);
  return out;
}

at::Tensor gated_activation(const at::Tensor& gate, const at::Tensor& up, std::string_view activation) {
  const char* op = "gated_activation";
  check_float(op, "gate", gate);
  check_dtype(op, "up", up, gate.scalar_type());
  TORCH_CHECK_VALUE(gate.sizes() == up.sizes(), op, ": up must have gate's shape ", gate.sizes(), ", got ",
                    describe(up));
  ActivationArgs args{};
  args.in_type = args.out_type = float_type(gate.scalar_type());
  args.activation = activation_from(op, activation);
  at::Tensor out = empty_elementwise(gate, gate.scalar_type());
  if (out.numel() == 0) return out;
  const Source second = source_of(up, out);
  run(args, out, source_of(gate, out), &second);
  return out;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("activation", &activation);
  m.impl("gated_activation", &gated_activation);
}

}  // namespace
}  // namespace torchquant
