// Every operator's schema: the table of contents. The C++ types are in operators.h; kernels register next to their code
// (csrc/cpu, csrc/aten), gradients in csrc/autograd, fake kernels in torchquant/ops; all in this order.
#include <torch/library.h>

namespace {

void define_operators(torch::Library& m) {
  // ---- affine
  // q = clamp(rint(input / scale) + zero_point, qmin, qmax). axis: scale is [C], one value per slice along it.
  // group_size: scale is [..., ceil(K / group_size)] (per token: group_size = K). Neither: scale is [1].
  // zero_point: int32, or float32 for a real-valued one; of scale's shape.
  m.def(
      "quantize(Tensor input, Tensor scale, Tensor? zero_point, int qmin, int qmax, int? axis=None, "
      "int? group_size=None, ScalarType dtype=int8) -> Tensor");
  m.def(
      "dequantize(Tensor input, Tensor scale, Tensor? zero_point, int? axis=None, int? group_size=None, "
      "ScalarType dtype=float) -> Tensor");
  // Dynamic per-token parameters. Integers, scales, zero points: int8 [..., K], float32 [..., 1], int32 [..., 1].
  m.def("quantize_per_token(Tensor input, bool symmetric=True) -> (Tensor, Tensor, Tensor)");

  // ---- linear
  // int8 [N, K] <-> the packed layout of csrc/formats/int8_tiles.h, int8 [ceil(N / 16), tile bytes].
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("unpack_weight(Tensor packed, int out_features, int in_features) -> Tensor");

  // Raw int32 accumulators [..., N] of int8 or uint8 input [..., K].
  m.def("int8_mm(Tensor input, Tensor packed, int out_features) -> Tensor");
  // Float input, which is quantized per token to activation_bits bits. output_dtype: input's unless given.
  m.def(
      "linear_dynamic(Tensor input, Tensor packed, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
      "int out_features, bool symmetric=True, str activation=\"none\", ScalarType? output_dtype=None, "
      "int activation_bits=8) -> Tensor");
  // Several linears on one input, which is quantized once. packed: their packed weights, concatenated along dimension
  // 0; weight_scale, weight_zero_point, bias: [sum of out_features]. activations: none, or one name for each.
  m.def(
      "linear_dynamic_split(Tensor input, Tensor packed, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
      "int[] out_features, bool symmetric, str[] activations, ScalarType? output_dtype=None) -> Tensor[]");
  // int8 or uint8 input, or float input, which is quantized to int8 in [input_qmin, input_qmax]. With output_scale the
  // result is int8 or uint8 (output_dtype), clamped to [output_qmin, output_qmax].
  m.def(
      "linear_static(Tensor input, Tensor input_scale, Tensor? input_zero_point, Tensor packed, Tensor weight_scale, "
      "Tensor? weight_zero_point, Tensor? bias, int out_features, str activation=\"none\", "
      "ScalarType output_dtype=float, Tensor? output_scale=None, int output_zero_point=0, int output_qmin=-128, "
      "int output_qmax=127, int input_qmin=-128, int input_qmax=127) -> Tensor");

  // ---- intx
  // Weights of 2 to 8 bits, one scale per output channel or, with group_size, for each group of inputs.
  // int8 [N, K], float32 [N] or [N, groups], int8 of the same shape or None <-> uint8, the packed layout of
  // csrc/formats/intx_tiles.h; on CUDA rows of bits (csrc/aten/intx_rows.h). unpack returns zero points 0 without them.
  m.def(
      "pack_intx_weight(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, int bits, int? group_size=None) "
      "-> Tensor");
  m.def(
      "unpack_intx_weight(Tensor packed, int out_features, int in_features, int bits, int? group_size=None, "
      "bool has_zero_point=False) -> (Tensor, Tensor, Tensor)");
  // As linear_dynamic.
  m.def(
      "linear_dynamic_intx(Tensor input, Tensor packed, Tensor? bias, int out_features, int bits, int? group_size, "
      "bool has_zero_point=False, bool symmetric=True, str activation=\"none\", ScalarType? output_dtype=None, "
      "int activation_bits=8) -> Tensor");
  // As linear_static on float input, with a float result.
  m.def(
      "linear_static_intx(Tensor input, Tensor input_scale, Tensor? input_zero_point, Tensor packed, Tensor? bias, "
      "int out_features, int bits, int? group_size, bool has_zero_point=False, str activation=\"none\", "
      "ScalarType output_dtype=float, int input_qmin=-128, int input_qmax=127) -> Tensor");
  // Activations stay floats.
  m.def(
      "linear_intx(Tensor input, Tensor packed, Tensor? bias, int out_features, int bits, int? group_size, "
      "bool has_zero_point=False, str activation=\"none\", ScalarType? output_dtype=None) -> Tensor");

  // ---- embedding
  // Rows of a weight [num_embeddings, embedding_dim] that pack_intx_weight stored; input: int64 or int32 indices of any
  // shape.
  m.def(
      "embedding_intx(Tensor input, Tensor packed, int num_embeddings, int embedding_dim, int bits, "
      "int? group_size=None, bool has_zero_point=False, ScalarType output_dtype=float) -> Tensor");
  // Sums, means or maxima of rows: input [bags, N], or [N] with the offset of each bag (and, include_last_offset, the end
  // of the last). per_sample_weights multiply the rows of a sum. Rows of the index padding_idx do not count.
  m.def(
      "embedding_bag_intx(Tensor input, Tensor packed, Tensor? offsets, Tensor? per_sample_weights, "
      "int num_embeddings, int embedding_dim, int bits, int? group_size=None, bool has_zero_point=False, "
      "str mode=\"mean\", int? padding_idx=None, bool include_last_offset=False, ScalarType output_dtype=float) -> "
      "Tensor");

  // ---- conv
  // int8 [O, C / groups, kh, kw] or [O, C / groups, k] <-> the packed layout (csrc/formats/int8_conv.h); on CUDA int8
  // [O, (C / groups) * kh * kw].
  m.def("pack_conv_weight(Tensor weight, int groups) -> Tensor");
  m.def("unpack_conv_weight(Tensor packed, int[] weight_shape, int groups) -> Tensor");
  // int8 input [N, C, H, W] or [N, C, L], or float input, which is quantized to int8 in [input_qmin, input_qmax].
  // padding: before and after, for each spatial dimension. residual: float32, or int8 with residual_scale, added before
  // the activation. With output_scale the result is int8, clamped to [output_qmin, output_qmax].
  m.def(
      "conv_static(Tensor input, Tensor input_scale, Tensor? input_zero_point, Tensor packed, Tensor weight_scale, "
      "Tensor? bias, int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
      "str activation=\"none\", Tensor? residual=None, Tensor? residual_scale=None, int residual_zero_point=0, "
      "ScalarType output_dtype=float, Tensor? output_scale=None, int output_zero_point=0, int output_qmin=-128, "
      "int output_qmax=127, int input_qmin=-128, int input_qmax=127) -> Tensor");
  // Float input, which is quantized per sample to activation_bits bits. output_dtype: input's unless given.
  m.def(
      "conv_dynamic(Tensor input, Tensor packed, Tensor weight_scale, Tensor? bias, int[] weight_shape, int[] stride, "
      "int[] padding, int[] dilation, int groups, bool symmetric=True, str activation=\"none\", "
      "ScalarType? output_dtype=None, int activation_bits=8) -> Tensor");

  // ---- activations
  // Elementwise, in the epilogue's arithmetic; dtype: input's unless given. gated: activation(gate) * up.
  m.def("activation(Tensor input, str activation, ScalarType? dtype=None) -> Tensor");
  m.def("gated_activation(Tensor gate, Tensor up, str activation) -> Tensor");

  // ---- norms
  // Over the last dimension, fp32 inside. cast_before_weight: x / rms is rounded to input's type before the weight
  // multiplies. residual: the norm of input + residual.
  m.def("rms_norm(Tensor input, Tensor? weight, float eps, bool cast_before_weight=False) -> Tensor");
  m.def("layer_norm(Tensor input, Tensor? weight, Tensor? bias, float eps, Tensor? residual=None) -> Tensor");

  // ---- attention
  // softmax(query @ key^T * scale + mask) @ value, products in bfloat16. [B, H, Q, D], [B, G, K, D], [B, G, K, E] with
  // H a multiple of G; mask: bool or float, broadcastable to [B, H, Q, K]. Result [B, H, Q, E], in memory [B, Q, H, E].
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, float? scale=None, bool causal=False) -> "
      "Tensor");

  // ---- kv_cache
  // Keys and values of 8 or 4 bits, with a scale and a zero point for each row, or for each group of its channels:
  // float [..., head_dim] <-> uint8 [..., bytes], the rows of csrc/formats/kv_rows.h.
  m.def("quantize_kv(Tensor input, int bits, int? group_size=None) -> Tensor");
  m.def("dequantize_kv(Tensor rows, int head_dim, int bits, int? group_size=None, ScalarType dtype=float) -> Tensor");
  // As attention, with key and value as rows, [B, G, K, bytes], and products of integers. value_dim: E, by default D.
  // recent_key, recent_value: the tokens after those, rows of 8 bits [B, G, R, bytes] with at most 256 channels a group.
  m.def(
      "attention_cached(Tensor query, Tensor key, Tensor value, int bits, int? group_size=None, int? value_dim=None, "
      "Tensor? recent_key=None, Tensor? recent_value=None, Tensor? mask=None, float? scale=None) -> Tensor");

  // ---- fake_quantize
  // Quantize and dequantize in one step, real-valued zero points too; NaN stays NaN. The mask has a bit for each element,
  // set where the rounded value is in the range: uint8 [ceil(numel / 8)], bit i % 8 of byte i / 8 for element i in
  // contiguous order.
  m.def(
      "fake_quantize(Tensor input, Tensor scale, Tensor? zero_point, int qmin, int qmax, int? axis=None, "
      "int? group_size=None) -> Tensor");
  m.def(
      "fake_quantize_mask(Tensor input, Tensor scale, Tensor? zero_point, int qmin, int qmax, int? axis=None, "
      "int? group_size=None) -> (Tensor, Tensor)");
  m.def(
      "in_range(Tensor input, Tensor scale, Tensor? zero_point, int qmin, int qmax, int? axis=None, "
      "int? group_size=None) -> Tensor");
  // Bits of input > 0: relu's mask.
  m.def("positive(Tensor input) -> Tensor");
  // grad where its bit is set, +0 elsewhere.
  m.def("mask_gradient(Tensor grad, Tensor bits) -> Tensor");
  // A learned step, and offset (float32, in input's units): zero_point = clamp(rint(-offset / scale), qmin, qmax).
  m.def(
      "fake_quantize_learned(Tensor input, Tensor scale, Tensor? offset, int qmin, int qmax, float grad_factor, "
      "int? axis=None, int? group_size=None) -> Tensor");
  // Gradients of input, scale and offset, without the factor.
  m.def(
      "fake_quantize_learned_backward(Tensor grad, Tensor input, Tensor scale, Tensor? zero_point, int qmin, int qmax, "
      "int? axis=None, int? group_size=None) -> (Tensor, Tensor, Tensor)");
  // The least and the greatest finite element for each scale (inf and -inf without one), and how many elements are not
  // finite: int64 [1].
  m.def("minmax(Tensor input, int? axis=None, int? group_size=None) -> (Tensor, Tensor, Tensor)");
  // ---- qat
  // Integers, scales, zero points of rows: int8 [..., K], float32 [..., 1], int32 [..., 1]. All rows have the given scale
  // [1] (a row with NaN has scale NaN); without scale, each row has its own, for [qmin, qmax].
  m.def(
      "quantize_rows(Tensor input, Tensor? scale, Tensor? zero_point, int qmin, int qmax, bool symmetric) -> "
      "(Tensor, Tensor, Tensor)");
  // The same for a weight [N, K], per output channel: packed, float32 [N], int32 [N].
  m.def("quantize_pack(Tensor weight, Tensor? scale, int qmin, int qmax, bool symmetric) -> (Tensor, Tensor, Tensor)");
  // grad [M, N] times fake_quantize of a weight [N, K] per row, float32.
  m.def(
      "mm_fake_quantized(Tensor grad, Tensor weight, Tensor scale, Tensor? zero_point, int qmin, int qmax) -> Tensor");
  // Float input and weight, which the operator quantizes; gradients pass straight through. Without input_scale, each
  // token has its own scale; without weight_scale, each channel. With a grad_factor above 0 the scale is learned.
  m.def(
      "qat_linear(Tensor input, Tensor weight, Tensor? bias, Tensor? input_scale, Tensor? input_zero_point, "
      "Tensor? input_offset, int input_qmin, int input_qmax, bool input_symmetric, Tensor? weight_scale, "
      "int weight_qmin, int weight_qmax, bool weight_symmetric, str activation=\"none\", "
      "float input_grad_factor=0.0, float weight_grad_factor=0.0, ScalarType? output_dtype=None) -> Tensor");

  // ---- qat_intx
  // The same for weights of 2 to 8 bits, with one scale per output channel or for each group of inputs.
  // Packed, float32 and int8 [N] or [N, groups]; with the given scales, or for [qmin, qmax].
  m.def(
      "quantize_pack_intx(Tensor weight, Tensor? scale, int bits, int? group_size, int qmin, int qmax, bool symmetric) "
      "-> (Tensor, Tensor, Tensor)");
  // Each token has its own scale; without activation_bits, activations stay float.
  m.def(
      "qat_linear_intx(Tensor input, Tensor weight, Tensor? bias, Tensor? weight_scale, int? group_size, "
      "int weight_qmin, int weight_qmax, bool weight_symmetric=True, int? activation_bits=8, "
      "bool activation_symmetric=False, str activation=\"none\", float weight_grad_factor=0.0, "
      "ScalarType? output_dtype=None) -> Tensor");
}

}  // namespace

TORCH_LIBRARY(torchquant, m) { define_operators(m); }

// The same operators in plain ATen, for any device (csrc/aten/register.h).
TORCH_LIBRARY(torchquant_aten, m) { define_operators(m); }
