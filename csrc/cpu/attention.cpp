// attention: queries, keys and values are read as they lie (a view [B, S, H, D] of a projection's output, transposed),
// and the result lies as the output projection reads it. A thread takes blocks of queries and packs the keys and values
// of the head it is at for itself: results do not depend on threads or on the other entries of a batch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/attention_arguments.h"
#include "isa.h"
#include "cpu/output.h"
#include "cpu/workspace.h"
#include "kernels/attention.h"
#include "common/tensors.h"

namespace torchquant {
namespace {

constexpr int64_t kThreadedProducts = 1 << 19;  // a thread should have at least so many

at::Tensor readable(const at::Tensor& t) { return t.size(3) == 1 || t.stride(3) == 1 ? t : t.contiguous(); }

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptTensor& mask,
                     std::optional<double> scale, bool causal) {
  const AttentionShape shape = check_attention(query, key, value, scale);
  const int64_t batch = shape.batch, heads = shape.heads, queries = shape.queries, d = shape.d;
  const int64_t key_heads = shape.key_heads, keys = shape.keys, dv = shape.dv;
  at::Tensor m;
  if (mask && mask->defined()) m = expanded_mask(*mask, {batch, heads, queries, keys});
  at::Tensor memory = empty_output({batch, queries, heads, dv}, query.options());
  at::Tensor out = memory.transpose(1, 2);
  if (out.numel() == 0) return out;
  if (keys == 0) return out.zero_();

  const at::Tensor q = readable(query), k = readable(key), v = readable(value);
  AttentionArgs args{};
  args.q_stride = q.stride(2);
  args.k_stride = k.stride(2);
  args.v_stride = v.stride(2);
  args.out_stride = heads * dv;
  args.queries = queries;
  args.keys = keys;
  args.d = d;
  args.dv = dv;
  args.type = float_type(q.scalar_type());
  args.scale = static_cast<float>(shape.factor);
  args.causal = causal;
  if (m.defined()) {
    args.mask_type = m.scalar_type() == at::kBool ? MaskType::kBool : MaskType::kFloat;
    args.mask_stride = m.stride(2);
  }
  const char *q_data = static_cast<const char*>(q.const_data_ptr()),
             *k_data = static_cast<const char*>(k.const_data_ptr()),
             *v_data = static_cast<const char*>(v.const_data_ptr()),
             *m_data = m.defined() ? static_cast<const char*>(m.const_data_ptr()) : nullptr;
  char* out_data = static_cast<char*>(memory.mutable_data_ptr());
  const int64_t bytes = q.element_size(), group = heads / key_heads, blocks = ceil_div(queries, kQueryBlock);
  const int64_t work = kQueryBlock * keys * (d + dv);
  const KernelTable& table = kernels();
  at::parallel_for(0, batch * heads * blocks, std::max<int64_t>(1, kThreadedProducts / work),
                   [&](int64_t first, int64_t last) {
                     AttentionArgs a = args;
                     a.memory = Workspace::of_this_thread().get(AttentionMemory(nullptr, keys, d, dv).bytes);
                     int64_t packed = -1;
                     for (int64_t unit = first; unit < last; ++unit) {
                       const int64_t block = unit % blocks, h = unit / blocks % heads, b = unit / blocks / heads;
                       const int64_t key_head = h / group;
                       a.q = q_data + (b * q.stride(0) + h * q.stride(1)) * bytes;
                       a.k = k_data + (b * k.stride(0) + key_head * k.stride(1)) * bytes;
                       a.v = v_data + (b * v.stride(0) + key_head * v.stride(1)) * bytes;
                       a.out = out_data + (b * queries * heads + h) * dv * bytes;
                       if (m_data) a.mask = m_data + (b * m.stride(0) + h * m.stride(1)) * m.element_size();
                       if (packed != b * key_heads + key_head) table.pack_attention(a);
                       packed = b * key_heads + key_head;
                       table.attend(a, block * kQueryBlock, std::min(queries, (block + 1) * kQueryBlock));
                     }
                   });
  return out;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("attention", &attention); }

}  // namespace
}  // namespace torchquant
