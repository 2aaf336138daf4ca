// What the files of the decoder share: its scratch memory, and shares of work.
#pragma once

#include "core/decoder.h"
#include "core/threads.h"
#include "formats/int8_tiles.h"

namespace torchquant::decoder {

// Pieces of an arena, aligned to 64 bytes. Without a base, only the size is counted.
class Pieces {
 public:
  explicit Pieces(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    uint8_t* const piece = base_ ? base_ + bytes_ : nullptr;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* base_;
  int64_t bytes_ = 0;
};

// One of `count` shares of work, which threads take as they come: a share that no thread has taken is done by another.
struct Share {
  int64_t index, count;

  int64_t begin(int64_t units) const { return units * index / count; }
  int64_t end(int64_t units) const { return units * (index + 1) / count; }
};

template <class Body>
void for_shares(int64_t shares, const tq_parallel* parallel, const Body& body) {
  parallel_for(parallel, 0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(Share{i, shares});
  });
}

struct Work {  // of one call
  const Sizes& sizes;
  const Call& call;
  const KernelTable& table;
  int64_t threads;
  const tq_parallel* parallel;

  // Float buffers [tokens, ...].
  float* normed;     // [hidden]
  float* query;      // [heads, head_dim]
  float* key;        // [kv_heads, head_dim]
  float* value;      // [kv_heads, head_dim]
  float* mixed;      // [heads, head_dim]: the output of attention
  float* projected;  // [hidden]: of o and of down
  float* gate;       // [intermediate]
  float* up;         // [intermediate]
  uint8_t* inputs;   // of one token: the prepared inputs of a group
  uint8_t* attention;
};

// decoder_products.cpp: outs[i] = layers[i](x) for all tokens, each [tokens, n]. A thread that is done with its share for
// one token fetches the first weights of its share of `next`, which would be far away when they are needed.
int64_t input_bytes(const KernelTable& table, const Group& group);
tq_status multiply(const Work& work, const Group& group, const float* x, float* const* outs, const Group* next);
// The same for gate and up, and then gate = activation(gate) * up.
tq_status multiply_gated(const Work& work, const Group& group, const float* x, float* gate, float* up,
                         const Group& next);

// decoder_attention.cpp: the new tokens' rows to the cache of a block, then `mixed` of all queries.
int64_t attention_bytes(const Sizes& sizes, const Call& call, int64_t threads);
tq_status attend(const Work& work, const Cache& cache);

}  // namespace torchquant::decoder
