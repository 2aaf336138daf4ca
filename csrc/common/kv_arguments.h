// The arguments of the operators on key/value caches: checked, and the shapes that follow from them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/attention_arguments.h"
#include "common/checks.h"
#include "common/tensors.h"
#include "formats/kv_rows.h"

namespace torchquant {

inline KvShape kv_shape(const char* op, const char* what, int64_t d, int64_t bits, OptInt group_size) {
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, op, ": bits must be 4 or 8, got ", bits);
  TORCH_CHECK_VALUE(d >= 1 && d <= kKvMostHeadDim, op, ": ", what, " must be between 1 and ", kKvMostHeadDim, ", got ",
                    d);
  TORCH_CHECK_VALUE(bits == 8 || d % 2 == 0, op, ": ", what, " must be even for bits = 4, got ", d, "; use bits = 8");
  TORCH_CHECK_VALUE(!group_size || (*group_size >= 16 && *group_size % 16 == 0 && *group_size <= kKvMostChannels), op,
                    ": group_size must be None (one scale per row) or a multiple of 16 up to ", kKvMostChannels,
                    ", got ", group_size.value_or(0));
  const int64_t group = std::min(group_size.value_or(d), d);
  TORCH_CHECK_VALUE(group <= kKvMostChannels, op, ": ", what, " must be at most ", kKvMostChannels,
                    " for one scale per row, got ", d, "; pass a group_size");
  return {d, bits, group};
}

// rows: uint8 [..., bytes]
inline void check_kv_rows(const char* op, const char* name, const at::Tensor& rows, const KvShape& shape) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kByte, op, ": ", name, " must be the uint8 result of quantize_kv, got ",
                   describe(rows));
  TORCH_CHECK_VALUE(rows.dim() >= 1 && rows.size(-1) == shape.row_bytes(), op, ": ", name, " must have rows of ",
                    shape.row_bytes(), " bytes for ", shape.d, " channels, bits = ", shape.bits,
                    " and group_size = ", shape.group, ", got ", describe(rows));
}

// One of the two parts of a cache (recent: the second one, in 8 bits).
struct CachedPart {
  KvShape key, value;
  int64_t keys;
};

struct CachedShape {
  CachedPart parts[2];
  int64_t batch, heads, queries, key_heads, dv;
  double factor;  // of the scores, in powers of 2

  int64_t keys() const { return parts[0].keys + parts[1].keys; }
};

inline OptInt recent_group_size(int64_t channels) {
  return channels <= kKvMostChannels ? OptInt() : OptInt(kKvMostChannels);
}

inline CachedPart check_cached_part(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                    const KvShape& key_shape, const KvShape& value_shape, bool recent) {
  const char* op = "attention_cached";
  const char* name = recent ? "recent_key" : "key";
  const char* value_name = recent ? "recent_value" : "value";
  check_kv_rows(op, name, key, key_shape);
  check_kv_rows(op, value_name, value, value_shape);
  const int64_t batch = query.size(0), heads = query.size(1);
  TORCH_CHECK_VALUE(key.dim() == 4 && key.size(0) == batch, op, ": ", name,
                    " must be [batch, key heads, keys, bytes] with batch = ", batch, ", got ", describe(key));
  TORCH_CHECK_VALUE(key.size(1) >= 1 ? heads % key.size(1) == 0 : heads == 0, op,
                    ": key heads must divide the query's ", heads, " heads, got ", key.size(1));
  TORCH_CHECK_VALUE(
      value.dim() == 4 && value.size(0) == batch && value.size(1) == key.size(1) && value.size(2) == key.size(2), op,
      ": ", value_name, " must be [", batch, ", ", key.size(1), ", ", key.size(2), ", bytes], as ", name, " is, got ",
      describe(value));
  return {key_shape, value_shape, key.size(2)};
}

inline CachedShape check_cached(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t bits,
                                OptInt group_size, OptInt value_dim, const OptTensor& recent_key,
                                const OptTensor& recent_value, std::optional<double> scale) {
  const char* op = "attention_cached";
  check_float(op, "query", query);
  TORCH_CHECK_VALUE(query.dim() == 4 && query.size(3) >= 1, op,
                    ": query must be [batch, heads, queries, d] with d at least 1, got ", describe(query));
  TORCH_CHECK_VALUE(present(recent_key) == present(recent_value), op,
                    ": recent_key and recent_value must be given together, or neither");
  const int64_t d = query.size(3), dv = value_dim.value_or(d);
  CachedShape s{};
  s.batch = query.size(0);
  s.heads = query.size(1);
  s.queries = query.size(2);
  s.dv = dv;
  s.parts[0] = check_cached_part(query, key, value, kv_shape(op, "d", d, bits, group_size),
                                 kv_shape(op, "value_dim", dv, bits, group_size), false);
  s.key_heads = key.size(1);
  const KvShape recent_keys = kv_shape(op, "d", d, 8, recent_group_size(d));
  const KvShape recent_values = kv_shape(op, "value_dim", dv, 8, recent_group_size(dv));
  s.parts[1] = {recent_keys, recent_values, 0};
  if (present(recent_key)) {
    s.parts[1] = check_cached_part(query, *recent_key, *recent_value, recent_keys, recent_values, true);
    TORCH_CHECK_VALUE(recent_key->size(1) == s.key_heads, op, ": recent_key must have key's ", s.key_heads,
                      " heads, got ", recent_key->size(1));
  }
  TORCH_CHECK_VALUE(s.queries <= kMaxAttentionLength && s.keys() <= kMaxAttentionLength, op, ": at most ",
                    kMaxAttentionLength, " queries and keys, got ", s.queries, " and ", s.keys());
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(d)));
  TORCH_CHECK_VALUE(std::abs(factor) <= 0x1p126, op, ": scale must be finite, got ", factor);
  s.factor = factor * 0x1.71547652b82fep+0;
  return s;
}

}  // namespace torchquant
