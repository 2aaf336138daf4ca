// The operators without gradients say so: autograd looks through them, and their results require none. Unregistered, a
// float result (quantize_per_token's scale) would claim a gradient that cannot be computed.
#include <torch/library.h>

namespace {

TORCH_LIBRARY_IMPL(torchquant, Autograd, m) {
  for (const char* name : {"quantize", "dequantize", "quantize_per_token", "pack_weight", "unpack_weight", "int8_mm"})
    m.impl(name, torch::CppFunction::makeFallthrough());
}

}  // namespace
