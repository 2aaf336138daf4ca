// A decoder (core/decoder.h) on tensors: it holds the weights, checks the caches and the tokens of a call, and divides
// the work among threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/decoder.h"
#include "cpu/arenas.h"
#include "cpu/held.h"

namespace torchquant::decoder {

struct CacheTensors {  // tensors of all blocks; see decoder_binding.cpp
  std::vector<at::Tensor> keys, values;
  int64_t position;
  int64_t bits;  // 32: float32
  std::optional<int64_t> group_size;
  std::optional<std::vector<at::Tensor>> recent_keys, recent_values;
  int64_t recent;
};

class TensorDecoder {
 public:
  // `held`: the tensors whose memory the blocks point to.
  TensorDecoder(std::vector<Block> blocks, const Sizes& sizes, const std::vector<at::Tensor>& held);

  // The hidden states behind the last block; the new tokens are appended to the cache. Threads may call it at the same
  // time, with caches of their own. Raises before anything is written where the arguments do not fit, or a held tensor
  // has other memory than when the decoder was made.
  at::Tensor run(const at::Tensor& hidden, const at::Tensor& cos, const at::Tensor& sin, const CacheTensors& cache);

 private:
  std::vector<Cache> checked_cache(const CacheTensors& cache, int64_t tokens, Call& call) const;

  const std::vector<Block> blocks_;
  const Sizes sizes_;
  const HeldTensors held_;
  Arenas arenas_{int64_t{64} << 20};  // long sequences need more, which nothing should hold between calls
};

}  // namespace torchquant::decoder
