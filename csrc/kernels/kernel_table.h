// What a kernel file exports: one constant table of function pointers per instruction set, and the plain structs that
// travel through it. No torch header; pointers, sizes, strides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "target.h"

namespace torchquant {

enum class FloatType : int { kF32, kBF16, kF16 };
enum class OutType : int { kF32, kBF16, kF16, kI8, kU8, kI32 };
enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid };
enum class RowMode : int { kStatic, kSymmetric, kAsymmetric };

// Rows of float activations -> rows of a panel. Byte = q + offset, where q is numerics.md's int8 value and the offset
// is what the instruction set wants to read (128 for those that multiply unsigned by signed bytes).
struct QuantizeRowsArgs {
  const void* x;  // [m, k], rows x_stride elements apart, contiguous within a row
  FloatType x_type;
  int64_t x_stride, k;
  RowMode mode;
  float scale;  // static mode: the tensor's scale and zero point
  int32_t zero_point;
  int32_t qmin, qmax;  // of q; a symmetric row's scale is its greatest |x| over qmax
  int32_t offset;      // added to every q
  uint8_t* q;          // the panel (int8_tiles.h); from k on it is padded with the offset (q = 0)
  int64_t panel_rows;  // 0: no panel but plain [m, k], not padded
  float* row_scale;    // [m]; NaN flags a row that must give NaN
  int32_t* row_zero;   // [m]: zero point + offset, in units of the panel
  int32_t* row_term;   // [m] or null: sum_k panel - k * row_zero, wanted only with weight zero points
};

// Rows of int8 or uint8 -> rows of a panel; shift is added modulo 256.
struct CopyRowsArgs {
  const uint8_t* x;
  int64_t x_stride, k;
  bool x_signed;  // how x reads; the panel reads as x + shift
  int32_t shift;
  uint8_t* q;  // the panel, padded with zeros
  int64_t panel_rows;
  const int32_t* row_zero;  // [m], in units of the panel
  int32_t* row_term;        // [m] or null
};

// Rows of a float weight [n, k] -> tiles of the packed layout (int8_tiles.h), quantized on the way. The scale
// of an output channel comes from the range of its row, or from `scale`.
struct QuantizePackArgs {
  const void* w;  // rows w_stride elements apart, contiguous within a row
  FloatType w_type;
  int64_t w_stride, n, k;
  RowMode mode;  // kStatic: with the scales in `scale`, zero point 0
  int32_t qmin, qmax;
  int8_t* packed;
  float* scale;   // [n]; NaN where the row must give NaN, its q are 0 then
  int32_t* zero;  // [n]
};

// C[m, n] = out(activation((sum_k (A[m,k] - row_zero[m]) (W[n,k] - weight_zero[n]) + bias_i32[n]) row_scale weight_scale + bias))
struct GemmArgs {
  const uint8_t* a;  // the panel
  int64_t panel_rows, k, n;
  const int8_t* packed;
  const float* row_scale;      // [m]
  const int32_t* row_zero;     // [m]
  bool same_row_zero;          // all of them are equal
  const int32_t* row_term;     // [m] or null
  const float* weight_scale;   // [n]
  const int32_t* weight_zero;  // [n] or null
  const float* bias;           // [n] or null
  const int32_t* bias_i32;     // [n] or null: makes the sum 64-bit
  Activation activation;
  OutType out_type;
  float inv_out_scale;   // int8 and uint8 output: q = clamp(rint(y * inv), lo, hi) + zero
  float out_lo, out_hi;  // qmin - zero, qmax - zero
  int32_t out_zero;
  void* c;
  int64_t ldc;
};

// A run of elements that share a scale, or (scales by element) a run along the channel axis.
// q = int(clamp(rint((x - real_zero) / scale), lo, hi)) + zero ; x' = float(q - zero) * scale + real_zero
struct SpanArgs {
  const void* in;
  void* out;
  int64_t n;
  FloatType float_type;  // of x (quantize: in, dequantize: out)
  bool q_signed;         // int8 or uint8
  bool by_element;       // the five pointers below hold n values instead of 1
  const float* scale;    // quantize: the reciprocal 1 / scale
  const float* real_zero;
  const int32_t* zero;
  const float* lo;
  const float* hi;
};

// A run of elements: out = activation(x), or activation(x) * up.
struct ActivationArgs {
  const void* x;
  const void* up;  // of x's type (then so is out), or null
  void* out;
  int64_t n;
  FloatType in_type, out_type;
  Activation activation;
};

// Rows over their root mean square, or (centered) over their standard deviation about their mean.
struct NormArgs {
  const void* x;         // [m, k], rows x_stride elements apart
  const void* residual;  // added to x first, or null
  const void* weight;    // [k] or null
  const void* bias;      // [k] or null
  void* out;             // [m, k], contiguous
  int64_t x_stride, residual_stride, k;
  FloatType type;  // of x, residual and out
  FloatType weight_type, bias_type;
  float eps;
  bool centered, cast_before_weight;  // cast: to the type of x, before the weight multiplies
};

// One head of attention: queries and the keys and values that they attend to.
enum class MaskType : int { kNone, kBool, kFloat };
struct AttentionArgs {
  const void* q;  // [queries, d], [keys, d], [keys, dv]; rows a stride apart, contiguous within a row
  const void* k;
  const void* v;
  const void* mask;  // [queries, keys]: bool (false: not attended to), or fp32 that is added to the scaled scores
  void* out;         // [queries, dv], of q's type
  int64_t q_stride, k_stride, v_stride, mask_stride, out_stride;
  int64_t queries, keys, d, dv;
  FloatType type;
  MaskType mask_type;
  float scale;      // of the scores, times log2(e)
  bool causal;      // query i attends to keys 0 .. i
  uint8_t* memory;  // attention.h
};

// A run of elements that share a scale, or (by_element) that each have their own, quantized and dequantized again:
// steps = clamp(rint((x - real_zero) * inverse), lo, hi); out = steps * scale + real_zero, NaN where x is NaN.
struct FakeQuantizeArgs {
  const void* x;
  void* out;      // of x's type, or null
  uint8_t* bits;  // one bit an element: the rounded value lies in [lo, hi]; or null
  int64_t bit;    // where in the first byte the first element's bit is; what stands below it is kept
  int64_t n;
  FloatType type;
  bool by_element;  // the five pointers below hold n values instead of 1
  const float* scale;
  const float* inverse;  // 1 / scale
  const float* real_zero;
  const float* lo;
  const float* hi;
};

// What a learned step's backward pass makes of a run. With v = x / scale, inside where lo < v < hi (strictly):
//   grad_x = inside ? grad : 0;  offset_sum += inside ? 0 : grad
//   scale_sum += grad * (inside ? rint(v) - v : clamp(v, lo, hi) + zero)
struct LearnedBackwardArgs {
  const void* grad;
  const void* x;
  void* grad_x;
  int64_t n;
  FloatType type;
  bool by_element;  // all pointers below hold n values instead of 1; the sums are added to
  const float* scale;
  const float* inverse;
  const float* zero;
  const float* lo;
  const float* hi;
  float* scale_sum;
  float* offset_sum;
};

// Bit i % 8 of byte i / 8 belongs to element i.
struct MaskArgs {
  const void* x;
  void* out;      // mask_span: x where the bit is set, else +0
  uint8_t* bits;  // positive_span: x > 0
  int64_t n;
  FloatType type;
};

struct MinMaxArgs {
  const void* x;
  int64_t n;
  FloatType type;
  bool by_element;  // least and greatest hold n values instead of 1
  float* least;     // updated with the finite elements
  float* greatest;
  int64_t* nonfinite;  // the others, counted
};

struct KernelTable {
  const char* name;
  int32_t panel_offset;   // 128: the panel is read unsigned; 0: signed
  int64_t panel_rows;     // rows of a panel's block, at most
  int64_t row_block;      // rows of a register tile (the unit in which threads share rows)
  int64_t tile_block;     // weight tiles of a register tile (the unit in which threads share columns)
  float products_per_ns;  // of one core in the middle of its range: decides when a second thread pays
  void (*quantize_rows)(const QuantizeRowsArgs&, int64_t m0, int64_t m1);
  void (*copy_rows)(const CopyRowsArgs&, int64_t m0, int64_t m1);
  void (*quantize_pack)(const QuantizePackArgs&, int64_t tile0, int64_t tile1);
  void (*gemm)(const GemmArgs&, int64_t m0, int64_t m1, int64_t tile0, int64_t tile1);
  void (*quantize_span)(const SpanArgs&);
  void (*dequantize_span)(const SpanArgs&);
  void (*activate_span)(const ActivationArgs&);
  void (*normalize_rows)(const NormArgs&, int64_t m0, int64_t m1);
  void (*pack_attention)(const AttentionArgs&);                  // keys and values into the scratch memory
  void (*attend)(const AttentionArgs&, int64_t q0, int64_t q1);  // then queries, at most kQueryBlock
  void (*fake_quantize_span)(const FakeQuantizeArgs&);
  void (*learned_backward_span)(const LearnedBackwardArgs&);
  void (*mask_span)(const MaskArgs&);
  void (*positive_span)(const MaskArgs&);
  void (*minmax_span)(const MinMaxArgs&);
};

const KernelTable& scalar_kernels();
#if defined(TQ_X86)
const KernelTable& avx2_kernels();
const KernelTable& avxvnni_kernels();
const KernelTable& avx512vnni_kernels();
const KernelTable& amxint8_kernels();
#endif

const KernelTable& kernels();  // the active one (isa.cpp)

// int32 accumulators hold this many products of any unsigned by signed byte: 255 * 128 * 65,793 < 2^31. With zero
// points on both sides the *final* value fits while 255 * 255 * K does (numerics.md, section 3).
inline constexpr int64_t kMaxProductK = 65793;
inline constexpr int64_t kMaxChunkK = 65728;  // a multiple of 64
inline constexpr int64_t kMaxExactK = 33025;

}  // namespace torchquant
