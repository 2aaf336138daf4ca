// attention: queries, keys and values are read where they are, in any order of dimensions whose last one is contiguous.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "common/attention_arguments.h"
#include "common/tensors.h"
#include "cpu/core_call.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant {
namespace {

at::Tensor readable(const at::Tensor& t) { return t.size(3) == 1 || t.stride(3) == 1 ? t : t.contiguous(); }

tq_heads heads_of(const at::Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptTensor& mask,
                     std::optional<double> scale, bool causal) {
  const AttentionShape shape = check_attention(query, key, value, scale);
  at::Tensor m;
  if (mask && mask->defined()) m = expanded_mask(*mask, {shape.batch, shape.heads, shape.queries, shape.keys});
  at::Tensor memory = empty_output({shape.batch, shape.queries, shape.heads, shape.dv}, query.options());
  at::Tensor out = memory.transpose(1, 2);
  if (out.numel() == 0) return out;
  if (shape.keys == 0) return out.zero_();

  const at::Tensor q = readable(query), k = readable(key), v = readable(value);
  tq_attention_call call{};
  call.type = type_of(q);
  call.query = heads_of(q);
  call.key = heads_of(k);
  call.value = heads_of(v);
  if (m.defined()) {
    call.mask = heads_of(m);
    call.mask_type = m.scalar_type() == at::kBool ? TQ_BOOL_MASK : TQ_FLOAT_MASK;
  }
  call.batch = shape.batch;
  call.heads = shape.heads;
  call.key_heads = shape.key_heads;
  call.queries = shape.queries;
  call.keys = shape.keys;
  call.d = shape.d;
  call.dv = shape.dv;
  call.scale_in_powers_of_2 = static_cast<float>(shape.factor);
  call.causal = causal;
  call.out = memory.mutable_data_ptr();
  check_status(tq_attention(&call, &kTorchThreads));
  return out;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { ops::attention::implement(m, &attention); }

}  // namespace
}  // namespace torchquant
