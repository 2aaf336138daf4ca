#include "bench/call_cost.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <vector>

#include "core/torchquant_core.h"
#include "cpu/output.h"
#include "operators.h"

namespace torchquant::bench {
namespace {

template <class Call>
double least_seconds(const Call& call, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int kBatch = 64;
  const auto elapsed = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  double least = std::numeric_limits<double>::infinity();
  const Clock::time_point begin = Clock::now();
  do {
    const Clock::time_point start = Clock::now();
    for (int i = 0; i < kBatch; ++i) call();
    least = std::min(least, elapsed(start) / kBatch);
  } while (elapsed(begin) < seconds);
  return least;
}

// The core's call on one thread. Everything that is the operator's (checks, allocation, threads) is left out.
double kernel_seconds(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                      const at::Tensor& bias, int64_t n, double seconds) {
  const int64_t m = input.size(0), k = input.size(1);
  const at::Tensor out = at::empty({m, n}, at::kFloat);
  tq_linear_input in{};
  in.rows = {input.const_data_ptr(), TQ_F32, m, k, k};
  in.quantization.mode = TQ_SYMMETRIC;
  in.quantization.qmin = -127;
  in.quantization.qmax = 127;
  tq_linear_part part{};
  part.n = n;
  part.packed = packed.const_data_ptr<int8_t>();
  part.weight_scale = weight_scale.const_data_ptr<float>();
  part.bias = bias.const_data_ptr<float>();
  part.out_type = TQ_F32;
  part.out = out.mutable_data_ptr();
  part.out_stride = n;
  return least_seconds([&] { return tq_linear(&in, &part, 1, nullptr); }, seconds);
}

}  // namespace

double part_seconds(const std::string& part, const at::Tensor& input, const at::Tensor& packed,
                    const at::Tensor& weight_scale, const at::Tensor& bias, int64_t out_features, double seconds) {
  TORCH_CHECK_VALUE(input.dim() == 2 && input.is_contiguous() && input.scalar_type() == at::kFloat,
                    "part_seconds: input must be contiguous float32 [M, K]");
  if (part == "kernel") return kernel_seconds(input, packed, weight_scale, bias, out_features, seconds);
  if (part == "allocation")
    return least_seconds([&] { return empty_output({input.size(0), out_features}, input.options()); }, seconds);
  TORCH_CHECK_VALUE(part == "operator", "part_seconds: part must be kernel, allocation or operator, got ", part);
  const std::optional<at::Tensor> with_bias = bias;
  return least_seconds(
      [&] {
        return ops::linear_dynamic::call(input, packed, weight_scale, std::nullopt, with_bias, out_features, true,
                                         "none", std::nullopt, 8);
      },
      seconds);
}

}  // namespace torchquant::bench
