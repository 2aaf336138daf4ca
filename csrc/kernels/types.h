// The choices that several families of kernels share. Their numbers are those of the C interface
// (core/torchquant_core.h), which checks that at compile time.
#pragma once

#include <cstdint>

namespace torchquant {

enum class FloatType : int { kF32, kBF16, kF16 };
enum class OutType : int { kF32, kBF16, kF16, kI8, kU8, kI32 };
enum class Activation : int {
  kNone,
  kRelu,
  kGelu,
  kGeluTanh,
  kSilu,
  kTanh,
  kSigmoid,
  kRelu6,
  kHardswish,
  kHardsigmoid,
  kLeakyRelu
};
constexpr int64_t output_bytes(OutType type) {  // of one element
  return type == OutType::kF32 || type == OutType::kI32 ? 4 : type == OutType::kBF16 || type == OutType::kF16 ? 2 : 1;
}

enum class RowMode : int { kStatic, kSymmetric, kAsymmetric };

}  // namespace torchquant
