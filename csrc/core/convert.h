// From the C interface's types to the kernels'. The numbers are the same, which is checked here.
#pragma once

#include <cstdint>

#include "core/torchquant_core.h"
#include "core/torchquant_intx.h"
#include "kernels/kernel_table.h"

namespace torchquant {

constexpr FloatType float_type(tq_type type) { return static_cast<FloatType>(type); }
constexpr OutType out_type(tq_type type) { return static_cast<OutType>(type); }
constexpr Activation activation_of(tq_activation activation) { return static_cast<Activation>(activation); }
constexpr RowMode row_mode(tq_row_mode mode) { return static_cast<RowMode>(mode); }
constexpr MaskType mask_type(tq_mask_type type) { return static_cast<MaskType>(type); }

inline IntxShape intx_shape_of(const tq_intx_shape& s) { return {s.n, s.k, s.bits, s.group_size, s.has_zero_point}; }

constexpr bool is_float(tq_type type) { return type <= TQ_F16; }
constexpr int64_t element_bytes(tq_type type) {
  return type == TQ_F32 || type == TQ_I32 ? 4 : (type == TQ_BF16 || type == TQ_F16 ? 2 : 1);
}
inline const char* element_at(const void* p, tq_type type, int64_t i) {
  return static_cast<const char*>(p) + i * element_bytes(type);
}
inline char* element_at(void* p, tq_type type, int64_t i) { return static_cast<char*>(p) + i * element_bytes(type); }

static_assert(float_type(TQ_F32) == FloatType::kF32 && float_type(TQ_BF16) == FloatType::kBF16);
static_assert(float_type(TQ_F16) == FloatType::kF16 && out_type(TQ_F32) == OutType::kF32);
static_assert(out_type(TQ_BF16) == OutType::kBF16 && out_type(TQ_F16) == OutType::kF16);
static_assert(out_type(TQ_I8) == OutType::kI8 && out_type(TQ_U8) == OutType::kU8 && out_type(TQ_I32) == OutType::kI32);
static_assert(activation_of(TQ_NONE) == Activation::kNone && activation_of(TQ_RELU) == Activation::kRelu);
static_assert(activation_of(TQ_GELU) == Activation::kGelu && activation_of(TQ_GELU_TANH) == Activation::kGeluTanh);
static_assert(activation_of(TQ_SILU) == Activation::kSilu && activation_of(TQ_TANH) == Activation::kTanh);
static_assert(activation_of(TQ_SIGMOID) == Activation::kSigmoid && activation_of(TQ_RELU6) == Activation::kRelu6);
static_assert(activation_of(TQ_HARDSWISH) == Activation::kHardswish);
static_assert(activation_of(TQ_HARDSIGMOID) == Activation::kHardsigmoid);
static_assert(activation_of(TQ_LEAKY_RELU) == Activation::kLeakyRelu && row_mode(TQ_STATIC) == RowMode::kStatic);
static_assert(row_mode(TQ_SYMMETRIC) == RowMode::kSymmetric && row_mode(TQ_ASYMMETRIC) == RowMode::kAsymmetric);
static_assert(mask_type(TQ_NO_MASK) == MaskType::kNone && mask_type(TQ_BOOL_MASK) == MaskType::kBool);
static_assert(mask_type(TQ_FLOAT_MASK) == MaskType::kFloat);

}  // namespace torchquant
