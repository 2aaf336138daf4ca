#include "cpu/decoder.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <utility>

#include "common/kv_arguments.h"
#include "cpu/core_call.h"
#include "cpu/team.h"
#include "isa.h"

namespace torchquant::decoder {
namespace {

constexpr const char* kRun = "Decoder.run";
constexpr int64_t kMostTokens = 512;  // that go through the blocks together: what they need stays in the cache

void check_float32(const char* name, const at::Tensor& t, int64_t rows, int64_t columns, const char* shape) {
  TORCH_CHECK_TYPE(t.is_cpu() && t.scalar_type() == at::kFloat && t.layout() == at::kStrided, kRun, ": ", name,
                   " must be float32 on the CPU, got ", describe(t), " on ", t.device());
  TORCH_CHECK_VALUE(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns), kRun,
                    ": ", name, " must be ", shape, ", got ", describe(t));
}

struct CacheFormat {
  at::ScalarType type;
  int64_t heads, row;  // elements of a row
  const char* rows;    // in words
};

// The tensors of all blocks, of which each has room for `tokens`.
void check_side(const char* name, const std::vector<at::Tensor>& side, size_t blocks, const CacheFormat& format,
                int64_t tokens) {
  TORCH_CHECK_VALUE(side.size() == blocks, kRun, ": ", name, " must be a list of ", blocks,
                    " tensors, one for each block, got ", side.size());
  for (const at::Tensor& t : side) {
    TORCH_CHECK_TYPE(t.is_cpu() && t.scalar_type() == format.type && t.layout() == at::kStrided, kRun, ": ", name,
                     " must be ", dtype_name(format.type), " on the CPU for these bits, got ", describe(t), " on ",
                     t.device());
    TORCH_CHECK_VALUE(t.dim() == 3 && t.size(0) == format.heads && t.size(2) == format.row, kRun, ": ", name,
                      " must be [", format.heads, ", capacity, ", format.row, "] (key heads, tokens, ", format.rows,
                      "), got ", describe(t));
    TORCH_CHECK_VALUE(t.size(1) >= tokens, kRun, ": ", name, " must have room for ", tokens, " tokens, got ",
                      describe(t), "; pass a longer buffer");
    TORCH_CHECK_VALUE(t.stride(2) == 1 || t.size(2) == 1, kRun, ": ", name, " must have rows without gaps, got stride ",
                      t.stride(2));
    TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, kRun, ": ", name,
                      " must have memory for each element, got an expanded tensor; clone it");
  }
}

Rows rows_of_cache(const at::Tensor& t) {
  const int64_t bytes = t.element_size();
  return {static_cast<uint8_t*>(t.mutable_data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes};
}

tq_kv_shape core_kv_shape(const KvShape& s) { return {s.d, s.bits, s.group}; }

}  // namespace

TensorDecoder::TensorDecoder(std::vector<Block> blocks, const Sizes& sizes, const std::vector<at::Tensor>& held)
    : blocks_(std::move(blocks)), sizes_(sizes), held_(held) {}

std::vector<Cache> TensorDecoder::checked_cache(const CacheTensors& cache, int64_t tokens, Call& call) const {
  TORCH_CHECK_VALUE(cache.bits == 32 || cache.bits == 8 || cache.bits == 4, kRun,
                    ": bits must be 32 (float32), 8 or 4, got ", cache.bits);
  TORCH_CHECK_VALUE(cache.position >= 0 && cache.recent >= 0, kRun, ": position and recent must not be negative, got ",
                    cache.position, " and ", cache.recent);
  TORCH_CHECK_VALUE(cache.recent_keys.has_value() == cache.recent_values.has_value(), kRun,
                    ": recent_keys and recent_values must be given together, or neither");
  call.is_float = cache.bits == 32;
  call.has_recent = cache.recent_keys.has_value();
  TORCH_CHECK_VALUE(!call.has_recent || !call.is_float, kRun,
                    ": recent_keys must be None for bits = 32; only quantized caches have recent tokens");
  TORCH_CHECK_VALUE(call.has_recent || cache.recent == 0, kRun, ": recent must be 0 without recent_keys, got ",
                    cache.recent);
  TORCH_CHECK_VALUE(!cache.group_size || !call.is_float, kRun, ": group_size must be None for bits = 32, got ",
                    cache.group_size.value_or(0));
  call.position = cache.position;
  call.recent = cache.recent;
  const int64_t limit = kMaxAttentionLength - tokens;
  TORCH_CHECK_VALUE(cache.position <= limit && cache.recent <= limit - cache.position, kRun, ": at most ",
                    kMaxAttentionLength, " tokens, got ", cache.position, " + ", cache.recent, " + ", tokens);
  CacheFormat format{at::kFloat, sizes_.kv_heads, sizes_.head_dim, "channels"};
  CacheFormat recent = format;
  if (!call.is_float) {
    const KvShape shape = kv_shape(kRun, "head_dim", sizes_.head_dim, cache.bits, cache.group_size);
    const KvShape recent_shape = kv_shape(kRun, "head_dim", sizes_.head_dim, 8, recent_group_size(sizes_.head_dim));
    call.shape = core_kv_shape(shape);
    call.recent_shape = core_kv_shape(recent_shape);
    format = {at::kByte, sizes_.kv_heads, shape.row_bytes(), "bytes"};
    recent = {at::kByte, sizes_.kv_heads, recent_shape.row_bytes(), "bytes"};
  }
  const int64_t old = cache.position + (call.has_recent ? 0 : tokens);
  check_side("keys", cache.keys, blocks_.size(), format, old);
  check_side("values", cache.values, blocks_.size(), format, old);
  if (call.has_recent) {
    check_side("recent_keys", *cache.recent_keys, blocks_.size(), recent, cache.recent + tokens);
    check_side("recent_values", *cache.recent_values, blocks_.size(), recent, cache.recent + tokens);
  }
  std::vector<Cache> caches(blocks_.size());
  for (size_t i = 0; i < caches.size(); ++i) {
    caches[i].key = rows_of_cache(cache.keys[i]);
    caches[i].value = rows_of_cache(cache.values[i]);
    if (!call.has_recent) continue;
    caches[i].recent_key = rows_of_cache((*cache.recent_keys)[i]);
    caches[i].recent_value = rows_of_cache((*cache.recent_values)[i]);
  }
  return caches;
}

at::Tensor TensorDecoder::run(const at::Tensor& hidden, const at::Tensor& cos, const at::Tensor& sin,
                              const CacheTensors& cache) {
  TORCH_CHECK_VALUE(held_.unchanged(), kRun,
                    ": the tensors of the layers must keep their memory, but that of one was replaced; make the "
                    "decoder again");
  check_float32("hidden", hidden, -1, sizes_.hidden, "[tokens, hidden size]");
  TORCH_CHECK_VALUE(!(hidden.requires_grad() && at::GradMode::is_enabled()), kRun,
                    ": hidden must not require gradients, which a decoder does not compute; call it under "
                    "torch.no_grad()");
  const int64_t tokens = hidden.size(0);
  check_float32("cos", cos, tokens, -1, "[tokens, rotated channels]");
  check_float32("sin", sin, tokens, cos.size(1), "[tokens, rotated channels], as cos is");
  TORCH_CHECK_VALUE(cos.size(1) % 2 == 0 && cos.size(1) <= sizes_.head_dim, kRun,
                    ": cos must have an even number of channels up to head_dim = ", sizes_.head_dim, ", got ",
                    describe(cos));
  Call call{};
  const std::vector<Cache> caches = checked_cache(cache, tokens, call);
  const at::Tensor cosines = cos.contiguous(), sines = sin.contiguous();
  at::Tensor out = hidden.detach().clone(at::MemoryFormat::Contiguous);
  call.turned = cosines.size(1);
  call.caches = caches.data();
  with_team([&](const tq_parallel* parallel) {
    const KernelTable& table = kernels();
    const int64_t threads = parallel ? std::max<int64_t>(1, parallel->threads(parallel->context)) : 1;
    for (int64_t first = 0; first < tokens; first += kMostTokens) {
      Call part = call;
      part.tokens = std::min(kMostTokens, tokens - first);
      part.hidden = out.mutable_data_ptr<float>() + first * sizes_.hidden;
      part.cos = cosines.const_data_ptr<float>() + first * call.turned;
      part.sin = sines.const_data_ptr<float>() + first * call.turned;
      (call.has_recent ? part.recent : part.position) += first;
      std::unique_ptr<Arena> arena = arenas_.take(decoder::arena_bytes(blocks_, sizes_, part, table, threads));
      check_status(decoder::run(blocks_, sizes_, part, table, arena->data(), threads, parallel));
      arenas_.give_back(std::move(arena));
    }
  });
  return out;
}

}  // namespace torchquant::decoder
