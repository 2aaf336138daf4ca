// quantize_kv, dequantize_kv, attention_cached: torchquant/functional/kv_cache.py in ATen. Sums of products of integers
// are matrix products in float64, which are exact here: a sum is below 2^31.
#include <ATen/ATen.h>

#include <limits>
#include <optional>
#include <vector>

#include "aten/lanes.h"
#include "aten/power_of_two.h"
#include "aten/register.h"
#include "common/arithmetic.h"
#include "common/device.h"
#include "common/kv_arguments.h"

namespace torchquant::kv_cache {
namespace {

constexpr double kMostWeight = 32767.0, kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// To a bfloat16 that is not less (up) or not greater, and finite; as float32.
at::Tensor towards(const at::Tensor& x, bool up) {
  at::Tensor bits = x.contiguous().view(at::kInt);
  const at::Tensor away = bits.bitwise_and(0xffff).ne(0).logical_and(up ? bits.ge(0) : bits.lt(0));
  bits = at::where(away, bits + 0x10000, bits);
  bits = at::where(bits.bitwise_and(0x7f800000).eq(0x7f800000), bits - 0x10000, bits);
  return bits.bitwise_and(-0x10000).view(at::kFloat);
}

at::Tensor quantize_kv(const at::Tensor& input, int64_t bits, OptInt group_size) {
  const char* op = "quantize_kv";
  check_float(op, "input", input);
  check_dim(op, "input", input, 1);
  const KvShape s = kv_shape(op, "head_dim", input.size(-1), bits, group_size);
  std::vector<at::Tensor> codes, parts(1);
  for (const at::Tensor& x : input.to(at::kFloat).split(s.group, -1)) {
    const at::Tensor finite = x.isfinite().all(-1, true), numbers = x.masked_fill(finite.logical_not(), 0.0);
    const at::Tensor zero = towards(numbers.amin(-1, true) + constant_like(x, 0.0), false);
    const at::Tensor half = constant_like(x, 0.5);
    const at::Tensor range = numbers.amax(-1, true) * half - zero * half;
    const at::Tensor step = divide(range, 0.5 * s.most());
    const at::Tensor scale =
        at::where(step < static_cast<double>(kLeastScale), constant_like(x, 1.0), towards(step, true));
    const at::Tensor q = at::round((numbers - zero) * torchquant::reciprocal(scale)).clamp(0.0, s.most());
    codes.push_back(q.masked_fill(finite.logical_not(), 0.0).to(at::kByte));
    for (const at::Tensor& parameter : {scale, zero})
      parts.push_back(
          parameter.to(at::kBFloat16).view(at::kShort).masked_fill(finite.logical_not(), 0x7fc0).view(at::kByte));
  }
  at::Tensor row = at::cat(codes, -1);
  if (bits == 4) {
    const int64_t half = s.d / 2;
    row = row.narrow(-1, 0, half).bitwise_or(row.narrow(-1, half, half).bitwise_left_shift(4));
  }
  parts[0] = row;
  return at::cat(parts, -1);
}

struct Rows {
  std::vector<at::Tensor> codes;  // of each group, uint8 [..., channels]
  at::Tensor scale, zero;         // float32 [..., groups]
};

Rows rows_of(const at::Tensor& rows, const KvShape& s) {
  at::Tensor codes = rows.narrow(-1, 0, s.code_bytes());
  if (s.bits == 4) codes = at::cat({codes.bitwise_and(15), codes.bitwise_right_shift(4)}, -1);
  const at::Tensor values =
      rows.narrow(-1, s.code_bytes(), 4 * s.groups()).contiguous().view(at::kBFloat16).to(at::kFloat);
  const at::Tensor pairs = values.unflatten(-1, {s.groups(), 2});
  return {codes.split(s.group, -1), pairs.select(-1, 0), pairs.select(-1, 1)};
}

at::Tensor dequantize_kv(const at::Tensor& rows, int64_t head_dim, int64_t bits, OptInt group_size,
                         at::ScalarType dtype) {
  const char* op = "dequantize_kv";
  const KvShape s = kv_shape(op, "head_dim", head_dim, bits, group_size);
  check_kv_rows(op, "rows", rows, s);
  check_float_type(op, "dtype", dtype);
  const Rows r = rows_of(rows, s);
  std::vector<at::Tensor> parts;
  for (int64_t g = 0; g < s.groups(); ++g)
    parts.push_back(fmaf(r.codes[g].to(at::kFloat), r.scale.narrow(-1, g, 1), r.zero.narrow(-1, g, 1)));
  return at::cat(parts, -1).to(dtype);
}

// The step of 16-bit integers: 1 for zeros, at least 2^-126; NaN and infinity stay.
at::Tensor step_of(const at::Tensor& greatest) {
  const at::Tensor step = divide(greatest, kMostWeight);
  const double least = kLeastScale;
  return at::where(step < least, constant_like(step, least), step).masked_fill(greatest == 0.0, 1.0);
}

// [B, H, Q, keys of all parts], in powers of 2.
at::Tensor scores_of(const at::Tensor& query, const std::vector<Rows>& keys, double factor) {
  const at::Tensor step = step_of(query.abs().amax(-1, true));
  const at::Tensor q = at::round(query * torchquant::reciprocal(step)).clamp(-kMostWeight, kMostWeight).nan_to_num(0.0);
  std::vector<at::Tensor> scores;
  for (const Rows& key : keys) {
    at::Tensor t = at::zeros({}, query.options());
    int64_t first = 0;
    for (size_t g = 0; g < key.codes.size(); ++g) {
      const int64_t width = key.codes[g].size(-1), group = static_cast<int64_t>(g);
      const at::Tensor part = q.narrow(-1, first, width).to(at::kDouble);
      const at::Tensor acc = at::matmul(part, key.codes[g].to(at::kDouble).transpose(2, 3)).to(at::kFloat);
      t = fmaf(acc, key.scale.select(-1, group).unsqueeze(2), t);
      t = fmaf(part.sum(-1, true).to(at::kFloat), key.zero.select(-1, group).unsqueeze(2), t);
      first += width;
    }
    scores.push_back(t);
  }
  return at::cat(scores, -1) * (step * constant_like(step, factor)).masked_fill(step.isfinite().logical_not(), kNan);
}

// The sums over the last dimension of a * b, in lanes.
at::Tensor sum_of_products(const at::Tensor& a, const at::Tensor& b) {
  constexpr int64_t kLanes = 16;
  const int64_t missing = (kLanes - a.size(-1) % kLanes) % kLanes;
  const at::Tensor x = at::constant_pad_nd(a, {0, missing}), y = at::constant_pad_nd(b.expand_as(a), {0, missing});
  at::Tensor lanes = at::zeros_like(x.narrow(-1, 0, kLanes));
  for (int64_t i = 0; i < x.size(-1); i += kLanes)
    lanes = fmaf(x.narrow(-1, i, kLanes), y.narrow(-1, i, kLanes), lanes);
  return sum_in_lanes(lanes, false);
}

at::Tensor weighted_sum(const at::Tensor& weights, const std::vector<Rows>& values, int64_t dv) {
  at::Tensor total = at::zeros_like(weights.narrow(-1, 0, 1));
  at::Tensor y = at::zeros({weights.size(0), weights.size(1), weights.size(2), dv}, weights.options()), zeros = y;
  int64_t start = 0;
  for (const Rows& value : values) {
    const int64_t keys = value.scale.size(2);
    for (int64_t first = 0; first < keys; first += kKvBlock) {
      const int64_t count = std::min(kKvBlock, keys - first);
      const at::Tensor part = weights.narrow(-1, start + first, count);
      total = total + sum_in_lanes(part, false);
      std::vector<at::Tensor> acc, steps, offsets;
      for (size_t g = 0; g < value.codes.size(); ++g) {
        const auto of_keys = [&](const at::Tensor& t) {
          return t.select(-1, static_cast<int64_t>(g)).unsqueeze(2).narrow(-1, first, count);
        };
        const at::Tensor a = part * of_keys(value.scale), step = step_of(a.nan_to_num(0.0).amax(-1, true));
        const at::Tensor w = at::round(a * torchquant::reciprocal(step)).clamp(0.0, kMostWeight).nan_to_num(0.0);
        acc.push_back(at::matmul(w.to(at::kDouble), value.codes[g].narrow(2, first, count).to(at::kDouble)));
        steps.push_back(step.expand_as(acc.back()));
        offsets.push_back(sum_of_products(part, of_keys(value.zero)).expand_as(acc.back()));
      }
      y = fmaf(at::cat(acc, -1).to(at::kFloat), at::cat(steps, -1), y);
      zeros = zeros + at::cat(offsets, -1);
    }
    start += keys;
  }
  return (y + zeros) * torchquant::reciprocal(total).masked_fill(total == 0.0, 0.0);
}

at::Tensor attention_cached(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t bits,
                            OptInt group_size, OptInt value_dim, const OptTensor& recent_key,
                            const OptTensor& recent_value, const OptTensor& mask, std::optional<double> scale) {
  const char* op = "attention_cached";
  for (const auto& [name, tensor] : {std::pair("key", OptTensor(key)),
                                     {"value", OptTensor(value)},
                                     {"recent_key", recent_key},
                                     {"recent_value", recent_value},
                                     {"mask", mask}})
    check_device(op, name, tensor, query, "query");
  const CachedShape s = check_cached(query, key, value, bits, group_size, value_dim, recent_key, recent_value, scale);
  at::Tensor m;
  if (present(mask)) m = expanded_mask(*mask, {s.batch, s.heads, s.queries, s.keys()}, op);
  const at::Tensor out = at::empty({s.batch, s.queries, s.heads, s.dv}, query.options()).transpose(1, 2);
  if (out.numel() == 0) return out;
  if (s.keys() == 0) return out.zero_();
  const int64_t group = s.heads / s.key_heads;
  std::vector<Rows> keys{rows_of(key.repeat_interleave(group, 1), s.parts[0].key)};
  std::vector<Rows> values{rows_of(value.repeat_interleave(group, 1), s.parts[0].value)};
  if (present(recent_key)) {
    keys.push_back(rows_of(recent_key->repeat_interleave(group, 1), s.parts[1].key));
    values.push_back(rows_of(recent_value->repeat_interleave(group, 1), s.parts[1].value));
  }
  at::Tensor scores = scores_of(query.to(at::kFloat), keys, s.factor);
  if (m.defined() && m.scalar_type() == at::kBool) scores = scores.masked_fill(m.logical_not(), -kInfinity);
  else if (m.defined()) scores = scores + m * constant_like(m, 0x1.71547652b82fep+0);
  at::Tensor greatest = scores.nan_to_num(-kInfinity, kInfinity, -kInfinity).amax(-1, true);
  greatest = greatest.masked_fill(greatest == -kInfinity, 0.0);
  return out.copy_(weighted_sum(power_of_two(scores - greatest), values, s.dv));
}

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::quantize_kv>(&quantize_kv);
  m.impl<ops::dequantize_kv>(&dequantize_kv);
  m.impl<ops::attention_cached>(&attention_cached);
}

}  // namespace
}  // namespace torchquant::kv_cache
