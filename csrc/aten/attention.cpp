// attention, in the specification's order (torchquant/functional/attention.py): of each 32 products those of even and
// those of odd index are summed apart, one fused multiply-add after the other from zero, and the 32 before are added.
//
// A product of two bfloat16 numbers has 16 bits. Added to an fp32 number in float64 it gives a sum that is exact, or so
// far from the smaller term that fp32 rounds to the larger one, which float64 has kept: two roundings equal one.
// ATen's addcmul in float64 is therefore exact enough, contracted or not, and all sums of 16 products advance together.
//
// The sums of one block of queries are in memory at a time. A block is as large as fits: whole entries of the batch, heads
// of one entry, or queries of one head.
#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "common/attention_arguments.h"
#include "common/arithmetic.h"
#include "aten/blocks.h"
#include "common/device.h"
#include "aten/lanes.h"
#include "aten/power_of_two.h"
#include "aten/register.h"
#include "common/tensors.h"

namespace torchquant {
namespace {

constexpr int64_t kStep = 32;  // products that are summed before they are added
constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor rounded(const at::Tensor& x) { return x.to(at::kBFloat16); }

// [..., M, L] @ [..., L, N] of bfloat16, fp32 [..., M, N], for four dimensions.
at::Tensor bf16_product(const at::Tensor& a, const at::Tensor& b) {
  const int64_t length = a.size(3), steps = ceil_div(length, kStep), missing = steps * kStep - length;
  const int64_t batch = a.size(0), heads = a.size(1), m = a.size(2), n = b.size(3);
  const at::Tensor left = (missing ? at::constant_pad_nd(a, {0, missing}) : a)
                              .reshape({batch, heads, m, steps, kStep / 2, 2, 1})
                              .permute({4, 0, 1, 3, 5, 2, 6});  // [16, batch, heads, steps, 2, M, 1]
  const at::Tensor right = (missing ? at::constant_pad_nd(b, {0, 0, 0, missing}) : b)
                               .reshape({batch, heads, steps, kStep / 2, 2, 1, n})
                               .permute({3, 0, 1, 2, 4, 5, 6});  // [16, batch, heads, steps, 2, 1, N]
  const int64_t at_once = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, 2 * batch * heads * m * n));
  at::Tensor total = at::zeros({batch, heads, m, n}, a.options().dtype(at::kFloat));
  for (int64_t first = 0; first < steps; first += at_once) {
    const int64_t count = std::min(at_once, steps - first);
    const at::Tensor l = left.narrow(3, first, count).to(at::kDouble),
                     r = right.narrow(3, first, count).to(at::kDouble);
    at::Tensor sums = at::zeros({batch, heads, count, 2, m, n}, l.options()), once;
    for (int64_t i = 0; i < kStep / 2; ++i) {
      once = sums.addcmul_(l.select(0, i), r.select(0, i)).to(at::kFloat);
      if (i + 1 < kStep / 2) sums.copy_(once);
    }
    const at::Tensor both = once.select(3, 0) + once.select(3, 1);
    for (int64_t i = 0; i < count; ++i) total = total + both.select(2, i);
  }
  return total;
}

// Of some queries: query [b, h, q, d], key [b, h, d, keys], value [b, h, keys, e], mask [b, h, q, keys].
at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& mask,
                  double factor, bool causal, int64_t first_query) {
  at::Tensor scores = bf16_product(query, key);
  scores = scores * constant_like(scores, factor);
  if (mask.defined() && mask.scalar_type() == at::kBool) {
    scores = scores.masked_fill(mask.logical_not(), -kInfinity);
  } else if (mask.defined()) {
    scores = scores + mask * constant_like(mask, 0x1.71547652b82fep+0);
  }
  at::Tensor allowed;
  if (causal) {
    const auto numbers = query.options().dtype(at::kLong);
    const at::Tensor rows = at::arange(first_query, first_query + query.size(2), numbers);
    allowed = at::arange(key.size(3), numbers) <= rows.unsqueeze(1);
    scores = scores.masked_fill(allowed.logical_not(), -kInfinity);
  }
  at::Tensor greatest = scores.nan_to_num(-kInfinity, kInfinity, -kInfinity).amax(-1, true);
  greatest = greatest.masked_fill(greatest == -kInfinity, 0.0);
  at::Tensor weights = power_of_two(scores - greatest);
  scores.reset();
  if (causal) weights = weights.masked_fill(allowed.logical_not(), 0.0);
  const at::Tensor sum = sum_in_lanes(weights, false);
  const at::Tensor inverse = torchquant::reciprocal(sum).masked_fill(sum == 0.0, 0.0);
  return bf16_product(rounded(weights), value) * inverse;
}

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptTensor& mask,
                     std::optional<double> scale, bool causal) {
  for (const auto& [name, tensor] : {std::pair("key", OptTensor(key)), {"value", OptTensor(value)}, {"mask", mask}})
    check_device("attention", name, tensor, query, "query");
  const AttentionShape s = check_attention(query, key, value, scale);
  at::Tensor masks;
  if (mask && mask->defined()) masks = expanded_mask(*mask, {s.batch, s.heads, s.queries, s.keys});
  const at::Tensor out = at::empty({s.batch, s.queries, s.heads, s.dv}, query.options()).transpose(1, 2);
  if (out.numel() == 0) return out;
  if (s.keys == 0) return out.zero_();
  const int64_t group = s.heads / s.key_heads;
  const at::Tensor q = rounded(query), k = rounded(key).repeat_interleave(group, 1).transpose(2, 3),
                   v = rounded(value).repeat_interleave(group, 1);
  const int64_t sums = s.keys * std::max<int64_t>(1, ceil_div(s.d, kStep) * 2);
  const int64_t rows = std::max<int64_t>(1, kBlockElements / sums);  // that a block may have
  const int64_t queries = std::min(s.queries, rows), heads = std::clamp<int64_t>(rows / s.queries, 1, s.heads),
                batch = std::clamp<int64_t>(rows / (s.queries * s.heads), 1, s.batch);
  for (int64_t b = 0; b < s.batch; b += batch) {
    for (int64_t h = 0; h < s.heads; h += heads) {
      const auto of_heads = [&](const at::Tensor& t) {
        return t.narrow(0, b, std::min(batch, s.batch - b)).narrow(1, h, std::min(heads, s.heads - h));
      };
      for (int64_t i = 0; i < s.queries; i += queries) {
        const auto part = [&](const at::Tensor& t) {
          return of_heads(t).narrow(2, i, std::min(queries, s.queries - i));
        };
        part(out).copy_(
            attend(part(q), of_heads(k), of_heads(v), masks.defined() ? part(masks) : masks, s.factor, causal, i));
      }
    }
  }
  return out;
}

TORCHQUANT_ATEN_KERNELS(m) { m.impl<ops::attention>(&attention); }

}  // namespace
}  // namespace torchquant
