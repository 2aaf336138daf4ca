// What the parts of a call cost, for the benchmark that breaks a module's call down.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace torchquant::bench {

// Seconds per call, the least over batches, of one part of torchquant::linear_dynamic(input, ...) without weight zero
// points, on this thread, called from a C++ loop:
//   "kernel"      quantizing the rows and the product with everything fused, in buffers that are there already
//   "allocation"  making the output tensor
//   "operator"    the whole operator through the dispatcher, as autograd's and inference mode's state ask for
double part_seconds(const std::string& part, const at::Tensor& input, const at::Tensor& packed,
                    const at::Tensor& weight_scale, const at::Tensor& bias, int64_t out_features, double seconds);

}  // namespace torchquant::bench
