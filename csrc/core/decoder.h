// The blocks of a decoder (Llama's kind), run one after the other on raw pointers for the new tokens of one sequence:
//
//   n = rms_norm(h)     q, k, v = layers(n)     q, k = rotated(norm(q)), rotated(norm(k))     k, v -> the cache
//   h = h + o(attention(q, the cache))
//   n = rms_norm(h)     h = h + down(activation(gate(n)) * up(n))
//
// Every step has the bits of the operator of its name; attention to a float cache has those of kernels/attention_float.h.
// A token has the bits that it has alone, whatever tokens come with it. Scratch memory is the arena of the call, and for
// many tokens the workspaces of the threads (core/workspace.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/torchquant_intx.h"
#include "core/torchquant_kv.h"
#include "kernels/kernel_table.h"

namespace torchquant::decoder {

struct Norm {
  bool present = false;
  const float* weight = nullptr;  // or null
  float eps = 0.0f;
};

enum class Kind { kInt8, kIntx, kIntxFloats };  // kIntxFloats: the input is not quantized

struct Layer {
  Kind kind = Kind::kInt8;
  tq_intx_shape shape{};      // of kInt8: n and k
  tq_row_quantization how{};  // of the input
  const void* packed = nullptr;
  const float* weight_scale = nullptr;         // kInt8
  const int32_t* weight_zero_point = nullptr;  // kInt8; or null
  const float* bias = nullptr;                 // or null
};

// Layers on the same input. The input is prepared (quantized and arranged) once for the layers that want it so.
struct Group {
  Group() = default;
  Group(std::vector<Layer> layers, bool side_by_side);

  std::vector<Layer> layers;
  bool side_by_side = false;    // a thread computes the same outputs of all layers, which have equally many
  std::vector<size_t> input;    // of each layer: the first layer with the same preparation
  std::vector<size_t> inputs;   // those first layers
  std::vector<bool> want_term;  // of each layer that is one: whether a layer with that input has weight zero points
};

struct Block {
  Norm input_norm, q_norm, k_norm, post_norm;
  Group qkv, o, gate_up, down;
};

struct Sizes {
  int64_t hidden, heads, kv_heads, head_dim, intermediate;
  float scale_in_powers_of_2;  // of the scores: scale * log2(e)
  tq_activation activation;

  int64_t q_width() const { return heads * head_dim; }
  int64_t kv_width() const { return kv_heads * head_dim; }
};

struct Rows {  // of keys or values: [kv_heads, tokens, bytes], strides in bytes
  uint8_t* data = nullptr;
  int64_t head_stride = 0, token_stride = 0;
};

struct Cache {  // of one block; new tokens go to `recent` if the call has such rows
  Rows key, value, recent_key, recent_value;
};

struct Call {
  int64_t tokens;            // new ones
  float* hidden;             // [tokens, hidden], contiguous; replaced by the result
  const float *cos, *sin;    // [tokens, turned], contiguous
  int64_t turned;            // channels of a head that are rotated
  int64_t position, recent;  // tokens in key and value, and in recent_key and recent_value
  bool is_float, has_recent;
  tq_kv_shape shape, recent_shape;  // of quantized rows
  const Cache* caches;              // one for each block

  int64_t keys() const { return position + recent + tokens; }
};

// Bytes of scratch memory, aligned to 64, for a call with these kernels and so many threads.
int64_t arena_bytes(const std::vector<Block>& blocks, const Sizes& sizes, const Call& call, const KernelTable& table,
                    int64_t threads);

tq_status run(const std::vector<Block>& blocks, const Sizes& sizes, const Call& call, const KernelTable& table,
              uint8_t* arena, int64_t threads, const tq_parallel* parallel);

}  // namespace torchquant::decoder
