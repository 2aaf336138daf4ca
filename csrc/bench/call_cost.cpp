#include "bench/call_cost.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <vector>

#include "isa.h"
#include "cpu/output.h"
#include "kernels/kernel_table.h"
#include "formats/int8_panel.h"
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

// The operator's two kernels on one thread. Everything that is not theirs (checks, allocation, threads) is left out.
double kernel_seconds(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                      const at::Tensor& bias, int64_t n, double seconds) {
  const KernelTable& table = kernels();
  const int64_t m = input.size(0), k = input.size(1), panel_rows = balanced(m, table.panel_rows);
  const at::Tensor panel = at::empty({panel_bytes(m, k, panel_rows) + 128}, at::kByte);
  const at::Tensor out = at::empty({m, n}, at::kFloat);
  const at::Tensor row_scale = at::empty({m}, at::kFloat), row_zero = at::empty({m}, at::kInt);
  QuantizeRowsArgs rows{};
  rows.x = input.const_data_ptr();
  rows.x_type = FloatType::kF32;
  rows.x_stride = rows.k = k;
  rows.mode = RowMode::kSymmetric;
  rows.offset = table.panel_offset;
  rows.q = panel.mutable_data_ptr<uint8_t>();
  rows.q += (64 - reinterpret_cast<uintptr_t>(rows.q) % 64) % 64;
  rows.panel_rows = panel_rows;
  rows.row_scale = row_scale.mutable_data_ptr<float>();
  rows.row_zero = row_zero.mutable_data_ptr<int32_t>();
  GemmArgs product{};
  product.a = rows.q;
  product.panel_rows = panel_rows;
  product.k = k;
  product.n = n;
  product.packed = packed.const_data_ptr<int8_t>();
  product.row_scale = rows.row_scale;
  product.row_zero = rows.row_zero;
  product.weight_scale = weight_scale.const_data_ptr<float>();
  product.bias = bias.const_data_ptr<float>();
  product.out_type = OutType::kF32;
  product.c = out.mutable_data_ptr();
  product.ldc = n;
  return least_seconds(
      [&] {
        table.quantize_rows(rows, 0, m);
        table.gemm(product, 0, m, 0, num_tiles(n));
      },
      seconds);
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
