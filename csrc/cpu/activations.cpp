// activation, gated_activation: elementwise, one pass, the arithmetic of a linear layer's activation.
//
// No input is copied without need. A dense tensor in any order of dimensions is one run of elements, and so is its
// result; rows further apart than they are long (a half of a fused projection) are read row by row. Any other input is
// copied first.
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/core_call.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant {
namespace {

bool is_dense(const at::Tensor& t) { return t.unsafeGetTensorImpl()->is_non_overlapping_and_dense_or_false(); }

// Uninitialised, with torch's rule for elementwise results: the input's strides where it is dense, otherwise their order.
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

void run(tq_activation_call call, const at::Tensor& out, const Source& x, const Source* up) {
  call.x = x.held.const_data_ptr();
  call.up = up ? up->held.const_data_ptr() : nullptr;
  call.out = out.mutable_data_ptr();
  call.x_type = type_of(x.held);
  call.out_type = type_of(out);
  if (x.by_row || (up && up->by_row)) {
    call.length = out.size(-1);
    call.rows = out.numel() / call.length;
    call.x_stride = x.by_row ? x.stride : call.length;
    call.up_stride = up && up->by_row ? up->stride : call.length;
  } else {
    call.length = out.numel();
    call.rows = 1;
  }
  check_status(tq_activate(&call, &kTorchThreads));
}

at::Tensor activation(const at::Tensor& input, std::string_view activation, std::optional<at::ScalarType> dtype) {
  const char* op = "activation";
  check_float(op, "input", input);
  const at::ScalarType out_dtype = dtype.value_or(input.scalar_type());
  TORCH_CHECK_TYPE(is_float_input(out_dtype), op, ": dtype must be float32, bfloat16 or float16, got ",
                   dtype_name(out_dtype));
  tq_activation_call call{};
  call.activation = activation_of(op, activation);
  at::Tensor out = empty_elementwise(input, out_dtype);
  if (out.numel() > 0) run(call, out, source_of(input, out), nullptr);
  return out;
}

at::Tensor gated_activation(const at::Tensor& gate, const at::Tensor& up, std::string_view activation) {
  const char* op = "gated_activation";
  check_float(op, "gate", gate);
  check_dtype(op, "up", up, gate.scalar_type());
  TORCH_CHECK_VALUE(gate.sizes() == up.sizes(), op, ": up must have gate's shape ", gate.sizes(), ", got ",
                    describe(up));
  tq_activation_call call{};
  call.activation = activation_of(op, activation);
  at::Tensor out = empty_elementwise(gate, gate.scalar_type());
  if (out.numel() == 0) return out;
  const Source second = source_of(up, out);
  run(call, out, source_of(gate, out), &second);
  return out;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::activation::implement(m, &activation);
  ops::gated_activation::implement(m, &gated_activation);
}

}  // namespace
}  // namespace torchquant
