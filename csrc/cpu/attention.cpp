// attention: queries, keys and values are read as they lie (a view [B, S, H, D] of a projection's output, transposed),
// and the result lies as the output projection reads it. A thread takes blocks of queries and packs the keys and values
// of the head it is at for itself: results do not depend on threads or on the other entries of a batch.
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "cpu/output.h"
#include "cpu/workspace.h"
#include "kernels/attention.h"

namespace torchquant {
namespace {

constexpr const char* kOp = "attention";
constexpr int64_t kThreadedProducts = 1 << 19;  // a thread should have at least so many
constexpr int64_t kMaxLength = int64_t{1} << 20;
using OptTensor = std::optional<at::Tensor>;

void check_shapes(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  check_float(kOp, "query", query);
  check_dtype(kOp, "key", key, query.scalar_type());
  check_dtype(kOp, "value", value, query.scalar_type());
  TORCH_CHECK_VALUE(query.dim() == 4, kOp, ": query must be [batch, heads, queries, d], got ", describe(query));
  const int64_t batch = query.size(0), heads = query.size(1), d = query.size(3);
  TORCH_CHECK_VALUE(d >= 1, kOp, ": query must be [batch, heads, queries, d] with d at least 1, got ", describe(query));
  TORCH_CHECK_VALUE(key.dim() == 4 && key.size(0) == batch && key.size(3) == d, kOp,
                    ": key must be [batch, key heads, keys, d] with batch = ", batch, " and d = ", d, ", got ",
                    describe(key));
  TORCH_CHECK_VALUE(key.size(1) >= 1 ? heads % key.size(1) == 0 : heads == 0, kOp,
                    ": key heads must divide the query's ", heads, " heads, got ", key.size(1));
  TORCH_CHECK_VALUE(
      value.dim() == 4 && value.size(0) == batch && value.size(1) == key.size(1) && value.size(2) == key.size(2), kOp,
      ": value must be [", batch, ", ", key.size(1), ", ", key.size(2), ", e], as key is, got ", describe(value));
  TORCH_CHECK_VALUE(query.size(2) <= kMaxLength && key.size(2) <= kMaxLength, kOp, ": at most ", kMaxLength,
                    " queries and keys, got ", describe(query), " and ", describe(key));
}

// bool or fp32, expanded to [B, H, Q, K], keys next to each other.
at::Tensor expanded_mask(const at::Tensor& mask, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool || is_float_input(mask.scalar_type()), kOp,
                   ": mask must be bool, float32, bfloat16 or float16, got ", describe(mask));
  const bool fits = mask.dim() <= 4 && at::is_expandable_to(mask.sizes(), shape);
  TORCH_CHECK_VALUE(fits, kOp, ": mask must broadcast to [batch, heads, queries, keys] = ", shape, ", got ",
                    describe(mask));
  at::Tensor m = mask.scalar_type() == at::kBool ? mask : mask.to(at::kFloat);
  if (m.dim() == 0) m = m.reshape({1});
  if (m.size(-1) != shape[3]) {  // one value for all keys
    std::vector<int64_t> sizes(m.sizes().begin(), m.sizes().end());
    sizes.back() = shape[3];
    m = m.expand(sizes);
  }
  if (m.size(-1) != 1 && m.stride(-1) != 1) m = m.contiguous();
  return m.expand(shape);
}

at::Tensor readable(const at::Tensor& t) { return t.size(3) == 1 || t.stride(3) == 1 ? t : t.contiguous(); }

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptTensor& mask,
                     std::optional<double> scale, bool causal) {
  check_shapes(query, key, value);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), d = query.size(3);
  const int64_t key_heads = key.size(1), keys = key.size(2), dv = value.size(3);
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(d)));
  TORCH_CHECK_VALUE(std::abs(factor) <= 0x1p126, kOp, ": scale must be finite, got ", factor);
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
  args.scale = static_cast<float>(factor * 0x1.71547652b82fep+0);
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
