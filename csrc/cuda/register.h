// What runs on CUDA tensors without a compiler for them: the operators composed of ATen's. Nothing in this folder
// depends on the device, so the same functions are registered twice: for torchquant on CUDA, and as torchquant_aten for
// every device, where the tests compare them with the CPU's kernels and where faster kernels (torchquant/triton) leave
// what they do not cover.
//
// Rules of this folder: no value is read on the host (.item(), nonzero, comparisons in C++), so values inside tensors
// are trusted; every tensor of a call lies on the input's device; a result depends on no order of additions but the
// specification's (torchquant/functional).
#pragma once

#include <torch/library.h>

#define TORCHQUANT_IMPLEMENT_ATEN(implement)                \
  TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { implement(m); } \
  TORCH_LIBRARY_IMPL(torchquant_aten, CompositeExplicitAutograd, m) { implement(m); }
