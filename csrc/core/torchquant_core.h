/* The kernels of torchquant behind a C interface: raw pointers, sizes and strides; no tensor, no exception, no C++
 * type.
 *
 * Everything that computes is below this line: the kernels (csrc/kernels), the choice of the instruction set (isa.h),
 * the layouts of packed weights (csrc/formats) and the division of the work among threads (csrc/core). Above it are the
 * operators of torch (csrc/cpu), which check their arguments, allocate the results, fill a struct and call one function
 * of this file. Nothing here includes a torch header, so that the tests in tests/native and other programs need no
 * torch.
 *
 * - Arguments are not checked again: an argument outside its stated range is a programming error.
 * - Threads are the caller's: tq_parallel is two callbacks, a null pointer means one thread. No result depends on
 *   how the work is divided.
 * - A function returns TQ_OK, or TQ_OUT_OF_MEMORY where scratch memory could not be allocated; results are then
 *   undefined.
 * - A pointer may be null only where its comment mentions null. Sizes may be 0.
 * - What each number means and how it is rounded: torchquant/functional, the specification, under the same names.
 */
#ifndef TORCHQUANT_CORE_H
#define TORCHQUANT_CORE_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default) /* these names can be looked up in the library that contains them */
#endif

typedef enum tq_status { TQ_OK, TQ_OUT_OF_MEMORY, TQ_UNUSABLE_ISA } tq_status;

/* Element types. "Float" below means one of the first three. */
typedef enum tq_type { TQ_F32, TQ_BF16, TQ_F16, TQ_I8, TQ_U8, TQ_I32 } tq_type;

typedef enum tq_activation {
  TQ_NONE,
  TQ_RELU,
  TQ_GELU,
  TQ_GELU_TANH,
  TQ_SILU,
  TQ_TANH,
  TQ_SIGMOID,
  TQ_RELU6,
  TQ_HARDSWISH,
  TQ_HARDSIGMOID,
  TQ_LEAKY_RELU /* slope 0.01 */
} tq_activation;

/* Where the scale of a row comes from: it is given, or from the row's own range, without or with a zero point. */
typedef enum tq_row_mode { TQ_STATIC, TQ_SYMMETRIC, TQ_ASYMMETRIC } tq_row_mode;

/* ---------------------------------------------------------------- threads */

typedef void (*tq_body)(void* argument, int64_t first, int64_t last);

typedef struct tq_parallel {
  void* context;
  /* How many threads `run` would use if it were called now; 1 inside a parallel region. */
  int64_t (*threads)(void* context);
  /* Calls body(argument, first, last) for parts that together make up [begin, end), in any order and on any threads,
   * and returns when all calls have returned. A part of fewer than `grain` is not worth a thread. */
  void (*run)(void* context, int64_t begin, int64_t end, int64_t grain, tq_body body, void* argument);
} tq_parallel;

/* Scratch memory of the calling thread, aligned to 64 bytes, or null; valid until this thread's next call of
 * tq_scratch, tq_linear or tq_attention. */
void* tq_scratch(int64_t bytes);

/* ---------------------------------------------------------------- instruction sets */

/* By number, from 0 (scalar) to tq_isa_count() - 1, in ascending priority. */
int32_t tq_isa_count(void);
const char* tq_isa_name(int32_t isa);
bool tq_isa_usable(int32_t isa); /* this binary has kernels for it, this CPU and operating system support it */
int32_t tq_active_isa(void);
tq_status tq_set_active_isa(int32_t isa); /* for the whole process; TQ_UNUSABLE_ISA changes nothing */

/* ---------------------------------------------------------------- affine: float to int8 and back */

/* Elements that share a scale. A tensor in contiguous order is `count` spans of `length` elements (the last span of
 * each row of `row` elements may be shorter); by_element: a span is a run along the channel axis, and each of its
 * elements has a scale of its own. Made by one of the three functions below. */
typedef struct tq_spans {
  int64_t count, length;
  int64_t per_row, row; /* spans in a row, elements in a row */
  int64_t channels;     /* scales that the spans take in turn, or 1 */
  bool by_element;
} tq_spans;

tq_spans tq_spans_per_tensor(int64_t elements);
tq_spans tq_spans_per_channel(int64_t outer, int64_t channels, int64_t inner); /* a tensor [outer, channels, inner] */
tq_spans tq_spans_per_group(int64_t rows, int64_t row, int64_t group_size);    /* a tensor [rows, row] */

/* q = clamp(rint((x - real_zero) / scale) + zero_point, qmin, qmax); x' = (q - zero_point) * scale + real_zero.
 * Scales are normal numbers of at least 2^-126; NaN makes the values NaN. |qmin|, |qmax|, |zero_point| <= 2^22. */
typedef struct tq_scales {
  int64_t count; /* 1, or one for each channel or span */
  const float* scale;
  const int32_t* zero_point; /* null: 0 */
  const float* real_zero;    /* null: 0 */
  int32_t qmin, qmax;        /* not read by tq_dequantize */
} tq_scales;

tq_status tq_quantize(const void* x, tq_type x_type, void* q, tq_type q_type, const tq_spans* spans,
                      const tq_scales* scales, const tq_parallel* parallel);
tq_status tq_dequantize(const void* q, tq_type q_type, void* x, tq_type x_type, const tq_spans* spans,
                        const tq_scales* scales, const tq_parallel* parallel);

/* [m, k], `stride` elements from row to row; a row is contiguous. */
typedef struct tq_rows {
  const void* x;
  tq_type type;
  int64_t m, k, stride;
} tq_rows;

/* How rows of floats are quantized. A symmetric row's scale is its greatest |x| over qmax. */
typedef struct tq_row_quantization {
  tq_row_mode mode;
  int32_t qmin, qmax; /* within -128 .. 127 */
  float scale;        /* TQ_STATIC: of all rows */
  int32_t zero_point;
} tq_row_quantization;

/* q int8 [m, k], scale [m], zero_point [m]. A row with NaN (and, with a scale of its own, with infinity) gets scale
 * NaN. */
tq_status tq_quantize_rows(const tq_rows* rows, const tq_row_quantization* how, int8_t* q, float* scale,
                           int32_t* zero_point, const tq_parallel* parallel);

/* ---------------------------------------------------------------- linear */

/* A weight int8 [n, k] in the layout that the kernels read (formats/int8_tiles.h): tq_tiles(n) * tq_tile_bytes(k)
 * bytes, aligned to 64. 1 <= n < 2^31, 1 <= k <= 2^23. */
int64_t tq_tiles(int64_t n);
int64_t tq_tile_bytes(int64_t k);
tq_status tq_pack_weight(const int8_t* weight, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k,
                         int8_t* packed, const tq_parallel* parallel);
tq_status tq_unpack_weight(const int8_t* packed, int64_t n, int64_t k, int8_t* weight, const tq_parallel* parallel);

/* Float rows are quantized; rows of TQ_I8 or TQ_U8 are integers already, with the scales and zero points given here. */
typedef struct tq_linear_input {
  tq_rows rows;
  tq_row_quantization quantization; /* float rows */
  const float* scale;               /* integer rows: [1] or, per_row, [m]; null: 1 */
  const int32_t* zero_point;        /* integer rows: [1] or, per_row, [m]; null: 0 */
  bool scale_per_row, zero_point_per_row;
} tq_linear_input;

/* A weight and what follows the product:
 * out[m, n] = activation((sum_k (q[m, k] - zero_point[m]) (W[n, k] - weight_zero_point[n]) + integer_bias[n])
 *                        * (scale[m] * weight_scale[n]) + bias[n] + residual[m, n]), rounded or quantized to out_type. */
typedef struct tq_linear_part {
  int64_t n;
  const int8_t* packed;
  const float* weight_scale;        /* [n]; null only with TQ_I32 */
  const int32_t* weight_zero_point; /* [n] or null */
  const float* bias;                /* [n] or null; not with integer_bias */
  const int32_t* integer_bias;      /* [n] or null; its scale is scale[m] * weight_scale[n] */
  tq_activation activation;
  tq_type out_type;       /* TQ_I32: the sums themselves, k <= 65,793 */
  float out_scale;        /* TQ_I8 and TQ_U8 */
  int32_t out_zero_point; /* the same; out_qmin <= out_zero_point <= out_qmax */
  int32_t out_qmin, out_qmax;
  void* out; /* [m, n], out_stride elements from row to row */
  int64_t out_stride;
  /* Added before the activation, not with TQ_I32; or null. Of TQ_F32, or TQ_I8 with residual_scale and _zero_point. */
  const void* residual; /* [m, n], residual_stride elements from row to row */
  int64_t residual_stride;
  tq_type residual_type;
  float residual_scale;
  int32_t residual_zero_point;
} tq_linear_part;

/* One linear layer or several on the same input, which is then quantized once. */
tq_status tq_linear(const tq_linear_input* input, const tq_linear_part* parts, int64_t count,
                    const tq_parallel* parallel);

/* ---------------------------------------------------------------- images and convolutions */

/* [n, h, w, c]: the channels of a pixel are contiguous, strides are in elements. Integers are canonical int8. */
typedef struct tq_image {
  void* data;
  tq_type type;
  int64_t n, h, w, c;
  int64_t image_stride, row_stride, pixel_stride;
} tq_image;

/* Of the integers of an image: value = (q - zero_point) * scale, qmin <= zero_point <= qmax. */
typedef struct tq_qparams {
  float scale;
  int32_t zero_point, qmin, qmax;
} tq_qparams;

/* out[n, y, x, o] = activation((sum over kh, kw, c of (q - zero_point) W[o, kh, kw, c]) * (scale * weight_scale[o])
 *                              + bias[o] + residual), rounded or quantized to out.type.
 * Where the kernel reaches beyond the image, nothing is added. The sizes of `out` determine how far that is at the
 * bottom and at the right. */
typedef struct tq_conv_call {
  tq_image input;                  /* TQ_I8 */
  const float* input_scale;        /* [1] or, per_image, [n]; NaN: the image's outputs are NaN (int8: zero_point) */
  const int32_t* input_zero_point; /* the same; null: 0 */
  bool per_image;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t groups;       /* divides input.c and out.c */
  const int8_t* packed; /* formats/int8_conv.h, aligned to 64; where tq_conv_is_depthwise: formats/int8_depthwise.h */
  const float* weight_scale; /* [out.c] */
  const float* bias;         /* [out.c] or null */
  tq_activation activation;
  const tq_image* residual; /* TQ_F32 or TQ_I8, of out's n, h, w, c; or null */
  tq_qparams residual_qparams;
  tq_image out; /* a float type, or TQ_I8 with out_qparams */
  tq_qparams out_qparams;
} tq_conv_call;

/* A depthwise convolution has a weight format of its own: one input channel in each of several groups. */
bool tq_conv_is_depthwise(int64_t channels_per_group, int64_t groups);

tq_status tq_conv(const tq_conv_call* call, const tq_parallel* parallel); /* of both kinds */
tq_status tq_conv_depthwise(const tq_conv_call* call, const tq_parallel* parallel);

/* The weight of a depthwise convolution, contiguous int8 [outputs, kernel_h, kernel_w], in the layout that the kernels
 * read: tq_depthwise_blocks runs of tq_depthwise_block_bytes, aligned to 64. */
int64_t tq_depthwise_blocks(int64_t outputs);
int64_t tq_depthwise_block_bytes(int64_t kernel_h, int64_t kernel_w);
tq_status tq_pack_depthwise(const int8_t* weight, int64_t outputs, int64_t kernel_h, int64_t kernel_w, int8_t* packed,
                            const tq_parallel* parallel);
tq_status tq_unpack_depthwise(const int8_t* packed, int64_t outputs, int64_t kernel_h, int64_t kernel_w, int8_t* weight,
                              const tq_parallel* parallel);

/* ---------------------------------------------------------------- steps between convolutions */

/* A float image with any strides: channels_last, contiguous (channel_stride = h * w), or neither. */
typedef struct tq_image_float {
  void* data;
  tq_type type; /* a float type */
  int64_t n, h, w, c;
  int64_t image_stride, row_stride, pixel_stride, channel_stride;
} tq_image_float;

/* Float images to int8 images of the same n, h, w, c, and back. NaN becomes the zero point. */
tq_status tq_image_quantize(const tq_image_float* x, tq_qparams qparams, const tq_image* q,
                            const tq_parallel* parallel);
tq_status tq_image_dequantize(const tq_image* q, tq_qparams qparams, const tq_image_float* x,
                              const tq_parallel* parallel);

/* out = activation(a + b), activation(a * b): real values of int8 images, one sum or product in fp32. `out` is TQ_I8
 * with out_qparams, or of a float type. Strides of 0 repeat: b of a product may be one pixel for each image. */
tq_status tq_image_add(const tq_image* a, tq_qparams a_qparams, const tq_image* b, tq_qparams b_qparams,
                       tq_activation activation, const tq_image* out, tq_qparams out_qparams,
                       const tq_parallel* parallel);
tq_status tq_image_mul(const tq_image* a, tq_qparams a_qparams, const tq_image* b, tq_qparams b_qparams,
                       tq_activation activation, const tq_image* out, tq_qparams out_qparams,
                       const tq_parallel* parallel);

/* y = a, then y * gain + shift with one number for each channel (one rounding where both are there), then y + b or
 * y * b; out = activation(y). Images are TQ_I8 or TQ_F32. Strides of b that are 0 repeat. */
typedef struct tq_image_blend_call {
  tq_image a;
  tq_qparams a_qparams;
  const float* gain;  /* [c] or null */
  const float* shift; /* [c] or null */
  const tq_image* b;  /* of a's size, or null */
  tq_qparams b_qparams;
  bool multiply; /* by b */
  tq_activation activation;
  tq_image out;
  tq_qparams out_qparams;
} tq_image_blend_call;

tq_status tq_image_blend(const tq_image_blend_call* call, const tq_parallel* parallel);

/* out = table[q + 128]: any function of one int8 value. `table`: int8_t [256] for TQ_I8, float [256] for TQ_F32.
 * With `out` a slice of the channels of a wider image this is one part of a concatenation; null copies. */
tq_status tq_image_map(const tq_image* in, const void* table, const tq_image* out, const tq_parallel* parallel);

/* Windows of a pool. The padding is that of both sides; the sizes of `out` say how many windows there are. */
typedef struct tq_window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int64_t dilation_h, dilation_w; /* 1 for tq_image_avg_pool */
} tq_window;

/* The greatest element of each window; -128 where a window has none. int8 to int8, with the same qparams. */
tq_status tq_image_max_pool(const tq_image* in, const tq_window* window, const tq_image* out,
                            const tq_parallel* parallel);

/* The same over the windows [floor(i * in / out), ceil((i + 1) * in / out)). */
tq_status tq_image_adaptive_max_pool(const tq_image* in, const tq_image* out, const tq_parallel* parallel);

/* sum of (q - zero_point) * (scale * (1 / count)), as TQ_I8 with out_qparams or as floats. count: `divisor` where it is
 * not 0, otherwise the elements of the window, with those of the padding or without. A sum fits 32 bits.
 * Of a float image: sum * (1 / count), in fp32; each column of the window from top to bottom, then the columns from left
 * to right. in_qparams is not read. */
tq_status tq_image_avg_pool(const tq_image* in, tq_qparams in_qparams, const tq_window* window, bool count_include_pad,
                            int64_t divisor, const tq_image* out, tq_qparams out_qparams, const tq_parallel* parallel);

/* The same over the windows [floor(i * in / out), ceil((i + 1) * in / out)). */
tq_status tq_image_adaptive_avg_pool(const tq_image* in, tq_qparams in_qparams, const tq_image* out,
                                     tq_qparams out_qparams, const tq_parallel* parallel);

/* Pixel (y, x) of `out` is pixel (min(floor(y * scale_h), in.h - 1), ...) of `in`, in fp32. Any type. */
tq_status tq_image_upsample_nearest(const tq_image* in, float scale_h, float scale_w, const tq_image* out,
                                    const tq_parallel* parallel);

/* out[c] = in[index[c]] for each pixel. Both of one type, TQ_I8 or TQ_F32. index: [out.c] */
tq_status tq_image_channels(const tq_image* in, const int32_t* index, const tq_image* out, const tq_parallel* parallel);

/* `in` from row `top` and column `left` of `out` on, and around it the zero point or 0.0. The image may reach beyond
 * `out`. Both of one type, TQ_I8 or TQ_F32. */
tq_status tq_image_pad(const tq_image* in, int64_t top, int64_t left, int32_t zero_point, const tq_image* out,
                       const tq_parallel* parallel);

/* Channels to pixels as torch's pixel_shuffle: out[n, y * f + i, x * f + j, c] = in[n, y, x, (c * f + i) * f + j], or,
 * inverse, pixels to channels. Both of one type. */
tq_status tq_image_pixel_shuffle(const tq_image* in, int64_t factor, bool inverse, const tq_image* out,
                                 const tq_parallel* parallel);

/* Each image as one row in the order [c, h, w]: int8 [n, c * h * w], out_stride elements from row to row. */
tq_status tq_image_flatten(const tq_image* in, int8_t* out, int64_t out_stride, const tq_parallel* parallel);

/* ---------------------------------------------------------------- activations */

/* out = activation(x), or activation(x) * up. Rows of `length` elements; out is contiguous. */
typedef struct tq_activation_call {
  const void* x;
  const void* up; /* of x_type, as is out then; or null */
  void* out;
  tq_type x_type, out_type; /* float types */
  tq_activation activation;
  int64_t rows, length;
  int64_t x_stride, up_stride; /* elements from row to row; not read where rows = 1 */
} tq_activation_call;

tq_status tq_activate(const tq_activation_call* call, const tq_parallel* parallel);

/* ---------------------------------------------------------------- norms */

/* Rows over their root mean square, or (centered) over their standard deviation about their mean. */
typedef struct tq_norm_call {
  tq_rows rows;         /* floats */
  const void* residual; /* of the rows' type, added to them first; or null */
  int64_t residual_stride;
  const void* weight; /* [k] of weight_type, or null */
  const void* bias;   /* [k] of bias_type, or null; only with a weight */
  tq_type weight_type, bias_type;
  float eps;
  bool centered;
  bool cast_before_weight; /* the quotient is rounded to the rows' type before the weight multiplies */
  void* out;               /* [m, k] of the rows' type, contiguous */
} tq_norm_call;

tq_status tq_normalize(const tq_norm_call* call, const tq_parallel* parallel);

/* ---------------------------------------------------------------- attention */

/* [batch, heads, length, width] in any order of memory whose last dimension is contiguous; strides in elements. */
typedef struct tq_heads {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
} tq_heads;

typedef enum tq_mask_type { TQ_NO_MASK, TQ_BOOL_MASK, TQ_FLOAT_MASK } tq_mask_type;

/* softmax(query key^T * scale + mask) value for each head; key_heads divides heads. */
typedef struct tq_attention_call {
  tq_type type; /* of query, key, value and out; a float type */
  tq_heads query, key, value;
  tq_heads mask;          /* [batch, heads, queries, keys]: bool (false: not attended to), or float32 to be added */
  tq_mask_type mask_type; /* strides of 0 repeat the mask */
  int64_t batch, heads, key_heads, queries, keys;
  int64_t d, dv;              /* width of queries and keys, of values; keys >= 1, d >= 1 */
  float scale_in_powers_of_2; /* scale * log2(e) */
  bool causal;                /* query i attends to the keys 0 .. i */
  void* out;                  /* [batch, queries, heads, dv], contiguous */
} tq_attention_call;

tq_status tq_attention(const tq_attention_call* call, const tq_parallel* parallel);

/* ---------------------------------------------------------------- fake quantization */

/* out = dequantize(quantize(x)), NaN where x is NaN; bits: one bit for each element, bit i % 8 of byte i / 8, set where
 * the rounded value is in [qmin, qmax]. Either result may be null. x and out contiguous. */
tq_status tq_fake_quantize(const void* x, tq_type type, void* out, uint8_t* bits, const tq_spans* spans,
                           const tq_scales* scales, const tq_parallel* parallel);

/* The same for float32 rows that have a scale each. out: float32 [m, k], contiguous. */
tq_status tq_fake_quantize_rows(const tq_rows* rows, const tq_scales* scales, float* out, const tq_parallel* parallel);

/* bits of x > 0; x where its bit is set and +0 elsewhere. */
tq_status tq_positive(const void* x, tq_type type, int64_t elements, uint8_t* bits, const tq_parallel* parallel);
tq_status tq_mask(const void* x, tq_type type, int64_t elements, const uint8_t* bits, void* out,
                  const tq_parallel* parallel);

/* With a learned scale and a learned offset (null: no offset): zero_point = clamp(rint(-offset / scale), qmin, qmax).
 * Scales below 2^-126 are used as 2^-126. scales.zero_point and scales.real_zero are not read. */
tq_status tq_fake_quantize_learned(const void* x, tq_type type, void* out, const tq_spans* spans,
                                   const tq_scales* scales, const float* offset, const tq_parallel* parallel);

/* The gradients of x, and, summed, of scale and offset [scales.count], without the factor of the learned step. */
typedef struct tq_learned_backward_call {
  const void* grad;
  const void* x;
  void* grad_x;
  tq_type type; /* of the three */
  float* grad_scale;
  float* grad_offset;
} tq_learned_backward_call;

tq_status tq_fake_quantize_learned_backward(const tq_learned_backward_call* call, const tq_spans* spans,
                                            const tq_scales* scales, const tq_parallel* parallel);

/* The least and the greatest finite element for each of `scales` scales (infinity and -infinity where there is no such
 * element), and how many elements are not finite. */
tq_status tq_minmax(const void* x, tq_type type, const tq_spans* spans, int64_t scales, float* least, float* greatest,
                    int64_t* nonfinite, const tq_parallel* parallel);

/* ---------------------------------------------------------------- training of linear layers */

/* A float weight [n, k] to the packed layout, one scale for each output channel. TQ_STATIC: `scale` holds them, zero
 * points are 0. `scale` and `zero_point` [n] are written: a row with NaN gets scale NaN and integers of 0. */
tq_status tq_quantize_pack(const tq_rows* weight, tq_row_mode mode, int32_t qmin, int32_t qmax, int8_t* packed,
                           float* scale, int32_t* zero_point, const tq_parallel* parallel);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif
