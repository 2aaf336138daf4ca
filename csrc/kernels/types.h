// The choices that several families of kernels share. Their numbers are those of the C interface
// (core/torchquant_core.h), which checks that at compile time.
#pragma once

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
enum class RowMode : int { kStatic, kSymmetric, kAsymmetric };

}  // namespace torchquant
