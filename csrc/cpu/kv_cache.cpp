// quantize_kv, dequantize_kv, attention_cached. A cache is read where it is, in any order of dimensions whose last one
// is contiguous.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "common/kv_arguments.h"
#include "core/torchquant_kv.h"
#include "cpu/core_call.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant::kv_cache {
namespace {

tq_kv_shape core_shape(const KvShape& s) { return {s.d, s.bits, s.group}; }

// The dimensions before the last one, as two: all but the last of them, and the last.
struct Rows {
  int64_t outer = 1, inner = 1, outer_stride = 0, inner_stride = 0;
};

std::optional<Rows> rows_in_place(const at::Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) != 1 && t.stride(last) != 1) return std::nullopt;
  Rows r;
  if (last == 0) return r;
  r.inner = t.size(last - 1);
  r.inner_stride = t.stride(last - 1);
  for (int64_t i = last - 2; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (r.outer == 1) r.outer_stride = t.stride(i);
    else if (t.stride(i) != r.outer_stride * r.outer) return std::nullopt;
    r.outer *= t.size(i);
  }
  return r;
}

struct Readable {
  at::Tensor tensor;
  Rows rows;
};

Readable readable(const at::Tensor& t) {
  if (const auto rows = rows_in_place(t)) return {t, *rows};
  const at::Tensor copy = t.contiguous();
  return {copy, *rows_in_place(copy)};
}

std::vector<int64_t> with_last(const at::Tensor& t, int64_t size) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = size;
  return sizes;
}

at::Tensor quantize_kv(const at::Tensor& input, int64_t bits, OptInt group_size) {
  const char* op = "quantize_kv";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  const KvShape shape = kv_shape(op, "head_dim", input.size(-1), bits, group_size);
  at::Tensor rows = at::empty(with_last(input, shape.row_bytes()), input.options().dtype(at::kByte));
  if (rows.numel() == 0) return rows;
  const auto [x, from] = readable(input);
  tq_kv_rows_call call{};
  call.x = const_cast<void*>(x.const_data_ptr());
  call.type = type_of(x);
  call.outer = from.outer;
  call.inner = from.inner;
  call.outer_stride = from.outer_stride;
  call.inner_stride = from.inner_stride;
  call.rows = rows.mutable_data_ptr<uint8_t>();
  call.rows_inner_stride = shape.row_bytes();
  call.rows_outer_stride = from.inner * shape.row_bytes();
  call.shape = core_shape(shape);
  check_status(tq_quantize_kv(&call, &kTorchThreads));
  return rows;
}

at::Tensor dequantize_kv(const at::Tensor& rows, int64_t head_dim, int64_t bits, OptInt group_size,
                         at::ScalarType dtype) {
  const char* op = "dequantize_kv";
  const KvShape shape = kv_shape(op, "head_dim", head_dim, bits, group_size);
  check_kv_rows(op, "rows", rows, shape);
  check_float_type(op, "dtype", dtype);
  at::Tensor x = empty_output(with_last(rows, head_dim), rows.options().dtype(dtype));
  if (x.numel() == 0) return x;
  const auto [source, from] = readable(rows);
  tq_kv_rows_call call{};
  call.x = x.mutable_data_ptr();
  call.type = type_of(x);
  call.outer = from.outer;
  call.inner = from.inner;
  call.inner_stride = head_dim;
  call.outer_stride = from.inner * head_dim;
  call.rows = const_cast<uint8_t*>(source.const_data_ptr<uint8_t>());
  call.rows_outer_stride = from.outer_stride;
  call.rows_inner_stride = from.inner_stride;
  call.shape = core_shape(shape);
  check_status(tq_dequantize_kv(&call, &kTorchThreads));
  return x;
}

at::Tensor last_contiguous(const at::Tensor& t) { return t.size(3) == 1 || t.stride(3) == 1 ? t : t.contiguous(); }

tq_heads heads_of(const at::Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

tq_kv_part part_of(const CachedPart& shape, const at::Tensor& key, const at::Tensor& value) {
  return {heads_of(key), heads_of(value), shape.keys, core_shape(shape.key), core_shape(shape.value)};
}

at::Tensor attention_cached(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t bits,
                            OptInt group_size, OptInt value_dim, const OptTensor& recent_key,
                            const OptTensor& recent_value, const OptTensor& mask, std::optional<double> scale) {
  const CachedShape s = check_cached(query, key, value, bits, group_size, value_dim, recent_key, recent_value, scale);
  at::Tensor m;
  if (present(mask)) m = expanded_mask(*mask, {s.batch, s.heads, s.queries, s.keys()}, "attention_cached");
  at::Tensor memory = empty_output({s.batch, s.queries, s.heads, s.dv}, query.options());
  at::Tensor out = memory.transpose(1, 2);
  if (out.numel() == 0) return out;
  if (s.keys() == 0) return out.zero_();
  const at::Tensor q = last_contiguous(query), k = last_contiguous(key), v = last_contiguous(value);
  tq_cached_attention_call call{};
  call.type = type_of(q);
  call.query = heads_of(q);
  if (m.defined()) {
    call.mask = heads_of(m);
    call.mask_type = m.scalar_type() == at::kBool ? TQ_BOOL_MASK : TQ_FLOAT_MASK;
  }
  call.batch = s.batch;
  call.heads = s.heads;
  call.key_heads = s.key_heads;
  call.queries = s.queries;
  call.parts[0] = part_of(s.parts[0], k, v);
  call.parts[1] = {{}, {}, 0, core_shape(s.parts[1].key), core_shape(s.parts[1].value)};
  at::Tensor recent_k, recent_v;  // live as long as the call
  if (present(recent_key)) {
    recent_k = last_contiguous(*recent_key);
    recent_v = last_contiguous(*recent_value);
    call.parts[1] = part_of(s.parts[1], recent_k, recent_v);
  }
  call.scale_in_powers_of_2 = static_cast<float>(s.factor);
  call.out = memory.mutable_data_ptr();
  check_status(tq_cached_attention(&call, &kTorchThreads));
  return out;
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  ops::quantize_kv::implement(m, &quantize_kv);
  ops::dequantize_kv::implement(m, &dequantize_kv);
  ops::attention_cached::implement(m, &attention_cached);
}

}  // namespace
}  // namespace torchquant::kv_cache
