// Fake quantization for training: values, one-bit masks, a learned step's gradients, ranges; at every granularity.
//
// Elements are shared out to threads in units of 64, whatever the spans: no two threads write to one byte of a mask, and
// few long spans or many short ones are equally well divided. Sums are taken over fixed blocks, so that no bit of them
// depends on the threads: of a run up to 4096 elements in fp32 (16 lanes of 256), of columns 64 rows; the blocks' sums
// are added in float64, in order.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/reused_output.h"
#include "isa.h"
#include "cpu/spans.h"
#include "common/tensors.h"

namespace torchquant {
namespace {

constexpr int64_t kUnit = 64;            // elements in which threads share
constexpr int64_t kBlock = 4096;         // elements of a run that one fp32 sum takes
constexpr int64_t kBlockRows = 64;       // the same for sums of columns
constexpr int64_t kBlockColumns = 1024;  // their parameters and sums fit the nearest cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();

at::Tensor empty_bits(const at::Tensor& x) { return at::empty({ceil_div(x.numel(), 8)}, x.options().dtype(at::kByte)); }

void* at_element(const at::Tensor& t, int64_t i) {
  return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + i * t.element_size();
}

template <class Run>
void parallel_units(int64_t numel, Run run) {  // run(first element, end)
  at::parallel_for(0, ceil_div(numel, kUnit), kGrain / kUnit,
                   [&](int64_t first, int64_t last) { run(first * kUnit, std::min(last * kUnit, numel)); });
}

// out and bits: what is wanted of them, allocated.
void fake_quantize_into(const at::Tensor& x, const Spans& spans, const Params& p, const at::Tensor& out,
                        const at::Tensor& bits) {
  FakeQuantizeArgs base{};
  base.type = float_type(x.scalar_type());
  base.by_element = spans.by_element;
  uint8_t* const bytes = bits.defined() ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  const float *scale = p.scale.const_data_ptr<float>(), *inverse = p.inverse.data(), *real_zero = p.real_zero.data(),
              *lo = p.lo.data(), *hi = p.hi.data();
  const KernelTable& table = kernels();
  parallel_units(x.numel(), [&](int64_t first, int64_t last) {
    for_segments(spans, p.scale.numel(), first, last, [&](int64_t i, int64_t n, int64_t index) {
      FakeQuantizeArgs args = base;
      args.x = at_element(x, i);
      args.out = out.defined() ? at_element(out, i) : nullptr;
      args.bits = bytes ? bytes + i / 8 : nullptr;
      args.bit = i % 8;
      args.n = n;
      args.scale = scale + index;
      args.inverse = inverse + index;
      args.real_zero = real_zero + index;
      args.lo = lo + index;
      args.hi = hi + index;
      table.fake_quantize_span(args);
    });
  });
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_of(const char* op, const at::Tensor& input, const at::Tensor& scale,
                                                    const OptTensor& zero_point, int64_t qmin, int64_t qmax,
                                                    OptInt axis, OptInt group_size, bool want_out, bool want_bits) {
  check_float(op, "input", input);
  check_fake_range(op, qmin, qmax);
  const Spans spans = make_spans(op, input, scale, axis, group_size);
  const Params p = make_params(op, scale, zero_point, qmin, qmax, true);
  const at::Tensor x = input.contiguous();
  at::Tensor out, bits;
  if (want_out) out = reused_output(x.sizes(), x.options());
  if (want_bits) bits = empty_bits(x);
  fake_quantize_into(x, spans, p, out, bits);
  return {out, bits};
}

at::Tensor fake_quantize(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
                         int64_t qmax, OptInt axis, OptInt group_size) {
  return std::get<0>(
      fake_quantize_of("fake_quantize", input, scale, zero_point, qmin, qmax, axis, group_size, true, false));
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& input, const at::Tensor& scale,
                                                      const OptTensor& zero_point, int64_t qmin, int64_t qmax,
                                                      OptInt axis, OptInt group_size) {
  return fake_quantize_of("fake_quantize_mask", input, scale, zero_point, qmin, qmax, axis, group_size, true, true);
}

at::Tensor in_range(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
                    int64_t qmax, OptInt axis, OptInt group_size) {
  return std::get<1>(fake_quantize_of("in_range", input, scale, zero_point, qmin, qmax, axis, group_size, false, true));
}

at::Tensor positive(const at::Tensor& input) {
  check_float("positive", "input", input);
  const at::Tensor x = input.contiguous(), bits = empty_bits(x);
  uint8_t* const bytes = bits.mutable_data_ptr<uint8_t>();
  const KernelTable& table = kernels();
  parallel_units(x.numel(), [&](int64_t first, int64_t last) {
    table.positive_span({at_element(x, first), nullptr, bytes + first / 8, last - first, float_type(x.scalar_type())});
  });
  return bits;
}

at::Tensor mask_gradient(const at::Tensor& grad, const at::Tensor& bits) {
  const char* op = "mask_gradient";
  check_float(op, "grad", grad);
  check_dtype(op, "bits", bits, at::kByte);
  const int64_t bytes = ceil_div(grad.numel(), 8);
  TORCH_CHECK_VALUE(bits.dim() == 1 && bits.numel() == bytes, op, ": bits must be uint8 [", bytes,
                    "], one bit per element of grad, got ", describe(bits));
  const at::Tensor x = grad.contiguous(), mask = bits.contiguous();
  at::Tensor out = reused_output(x.sizes(), x.options());
  const KernelTable& table = kernels();
  parallel_units(x.numel(), [&](int64_t first, int64_t last) {
    table.mask_span({at_element(x, first), at_element(out, first), static_cast<uint8_t*>(at_element(mask, first / 8)),
                     last - first, float_type(x.scalar_type())});
  });
  return out;
}

// What a learned step is used as: at least 2^-126, never refused inside a training step. NaN stays and shows.
Params learned_params(const char* op, const at::Tensor& scale, int64_t qmin, int64_t qmax) {
  check_dtype(op, "scale", scale, at::kFloat);
  Params p;
  const size_t n = static_cast<size_t>(scale.numel());
  p.scale = at::empty(scale.sizes(), scale.options());
  p.inverse.resize(n);
  p.zero.assign(n, 0);
  p.real_zero.assign(n, 0.0f);
  p.lo.assign(n, static_cast<float>(qmin));
  p.hi.assign(n, static_cast<float>(qmax));
  const at::Tensor given = scale.contiguous();
  const float* s = given.const_data_ptr<float>();
  float* used = p.scale.mutable_data_ptr<float>();
  for (size_t i = 0; i < n; ++i) {
    used[i] = s[i] < kLeastScale ? kLeastScale : s[i];
    p.inverse[i] = 1.0f / used[i];
  }
  return p;
}

void set_zero(Params& p, size_t i, int32_t zero, int64_t qmin, int64_t qmax) {
  p.zero[i] = zero;
  p.lo[i] = static_cast<float>(qmin - zero);
  p.hi[i] = static_cast<float>(qmax - zero);
}

at::Tensor fake_quantize_learned(const at::Tensor& input, const at::Tensor& scale, const OptTensor& offset,
                                 int64_t qmin, int64_t qmax, double /*grad_factor*/, OptInt axis, OptInt group_size) {
  const char* op = "fake_quantize_learned";
  check_float(op, "input", input);
  check_fake_range(op, qmin, qmax);
  const Spans spans = make_spans(op, input, scale, axis, group_size);
  Params p = learned_params(op, scale, qmin, qmax);
  if (offset && offset->defined()) {
    check_dtype(op, "offset", *offset, at::kFloat);
    TORCH_CHECK_VALUE(offset->sizes() == scale.sizes(), op, ": offset must have scale's shape ", scale.sizes(),
                      ", got ", describe(*offset));
    const at::Tensor given = offset->contiguous();
    const float* beta = given.const_data_ptr<float>();
    float* s = p.scale.mutable_data_ptr<float>();
    for (size_t i = 0; i < p.zero.size(); ++i) {
      const float zero = std::nearbyint(-beta[i] / s[i]);
      if (zero != zero) s[i] = zero;  // an integer cannot hold it: the values show it
      else
        set_zero(p, i, static_cast<int32_t>(std::clamp(zero, static_cast<float>(qmin), static_cast<float>(qmax))), qmin,
                 qmax);
    }
  }
  const at::Tensor x = input.contiguous();
  at::Tensor out = reused_output(x.sizes(), x.options());
  fake_quantize_into(x, spans, p, out, {});
  return out;
}

// Blocks of elements that share a scale, each visited once by some thread: run(block, first element, n, scale's index).
struct Blocks {
  int64_t per_span, count;
};

Blocks blocks_of(const Spans& s) {
  const int64_t per_span = ceil_div(s.length, kBlock);
  return {per_span, s.count * per_span};
}

template <class Run>
void parallel_blocks(const Spans& s, const Blocks& blocks, int64_t scales, Run run) {
  const int64_t elements = std::max<int64_t>(1, std::min(s.length, kBlock));
  at::parallel_for(0, blocks.count, std::max<int64_t>(1, kGrain / elements), [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t span = block / blocks.per_span, from = block % blocks.per_span * kBlock;
      const int64_t row = span / s.per_row, at = span % s.per_row * s.length;
      const int64_t n = std::min(std::min(s.length, s.row - at) - from, kBlock);
      if (n > 0) run(block, row * s.row + at + from, n, scale_index(s, span, scales));
    }
  });
}

// Blocks of columns: run(block of rows, first column, columns, first row, end row).
template <class Run>
void parallel_columns(const Spans& s, Run run) {
  const int64_t down = ceil_div(s.count, kBlockRows), across = ceil_div(s.length, kBlockColumns);
  at::parallel_for(0, down * across, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t rows = block / across, column = block % across * kBlockColumns;
      run(rows, column, std::min(kBlockColumns, s.length - column), rows * kBlockRows,
          std::min(s.count, (rows + 1) * kBlockRows));
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_learned_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
    int64_t qmax, OptInt axis, OptInt group_size) {
  const char* op = "fake_quantize_learned_backward";
  check_float(op, "input", input);
  check_dtype(op, "grad", grad, input.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == input.sizes(), op, ": grad must have input's shape ", input.sizes(), ", got ",
                    describe(grad));
  check_fake_range(op, qmin, qmax);
  const Spans spans = make_spans(op, input, scale, axis, group_size);
  Params p = learned_params(op, scale, qmin, qmax);
  const int64_t scales = scale.numel();
  if (zero_point && zero_point->defined()) {
    check_dtype(op, "zero_point", *zero_point, at::kInt);
    TORCH_CHECK_VALUE(zero_point->sizes() == scale.sizes(), op, ": zero_point must have scale's shape ", scale.sizes(),
                      ", got ", describe(*zero_point));
    const at::Tensor given = zero_point->contiguous();
    const int32_t* zero = given.const_data_ptr<int32_t>();
    if (scales > 0) check_zero_points(op, "zero_point", zero, scales, qmin, qmax);
    for (size_t i = 0; i < p.zero.size(); ++i) set_zero(p, i, zero[i], qmin, qmax);
  }
  const at::Tensor x = input.contiguous(), g = grad.contiguous();
  const std::vector<float> zero(p.zero.begin(), p.zero.end());
  at::Tensor grad_input = reused_output(x.sizes(), x.options());
  at::Tensor grad_scale = at::empty(scale.sizes(), p.scale.options());
  at::Tensor grad_offset = at::empty(scale.sizes(), p.scale.options());
  std::vector<double> totals(static_cast<size_t>(2 * scales), 0.0);
  double *scale_totals = totals.data(), *offset_totals = scale_totals + scales;
  const KernelTable& table = kernels();
  const auto args_at = [&](int64_t i, int64_t n, int64_t index) {
    LearnedBackwardArgs args{};
    args.grad = at_element(g, i);
    args.x = at_element(x, i);
    args.grad_x = at_element(grad_input, i);
    args.n = n;
    args.type = float_type(x.scalar_type());
    args.by_element = spans.by_element;
    args.scale = p.scale.const_data_ptr<float>() + index;
    args.inverse = p.inverse.data() + index;
    args.zero = zero.data() + index;
    args.lo = p.lo.data() + index;
    args.hi = p.hi.data() + index;
    return args;
  };
  if (x.numel() == 0) {
  } else if (spans.by_element) {
    const int64_t columns = spans.length, down = ceil_div(spans.count, kBlockRows);
    std::vector<float> sums(static_cast<size_t>(2 * down * columns), 0.0f);
    parallel_columns(spans, [&](int64_t rows, int64_t column, int64_t n, int64_t first, int64_t last) {
      float* const scale_sum = sums.data() + 2 * rows * columns + column;
      for (int64_t row = first; row < last; ++row) {
        LearnedBackwardArgs args = args_at(row * columns + column, n, column);
        args.scale_sum = scale_sum;
        args.offset_sum = scale_sum + columns;
        table.learned_backward_span(args);
      }
    });
    for (int64_t rows = 0; rows < down; ++rows)
      for (int64_t i = 0; i < 2 * columns; ++i)
        totals[static_cast<size_t>(i)] += sums[static_cast<size_t>(2 * rows * columns + i)];
  } else {
    const Blocks blocks = blocks_of(spans);
    std::vector<float> sums(static_cast<size_t>(2 * blocks.count), 0.0f);
    parallel_blocks(spans, blocks, scales, [&](int64_t block, int64_t i, int64_t n, int64_t index) {
      LearnedBackwardArgs args = args_at(i, n, index);
      args.scale_sum = sums.data() + 2 * block;
      args.offset_sum = args.scale_sum + 1;
      table.learned_backward_span(args);
    });
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t index = scale_index(spans, block / blocks.per_span, scales);
      scale_totals[index] += sums[static_cast<size_t>(2 * block)];
      offset_totals[index] += sums[static_cast<size_t>(2 * block + 1)];
    }
  }
  for (int64_t i = 0; i < scales; ++i) {
    grad_scale.mutable_data_ptr<float>()[i] = static_cast<float>(scale_totals[i]);
    grad_offset.mutable_data_ptr<float>()[i] = static_cast<float>(offset_totals[i]);
  }
  return {grad_input, grad_scale, grad_offset};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> minmax(const at::Tensor& input, OptInt axis, OptInt group_size) {
  const char* op = "minmax";
  check_float(op, "input", input);
  const auto floats = input.options().dtype(at::kFloat);
  at::Tensor least = at::full(scale_sizes(input, axis, group_size), kInfinity, floats);
  const Spans spans = make_spans(op, input, least, axis, group_size);
  at::Tensor greatest = at::full(least.sizes(), -kInfinity, floats);
  at::Tensor nonfinite = at::zeros({1}, floats.dtype(at::kLong));
  const at::Tensor x = input.contiguous();
  if (x.numel() == 0) return {least, greatest, nonfinite};
  const int64_t scales = least.numel();
  float *low = least.mutable_data_ptr<float>(), *high = greatest.mutable_data_ptr<float>();
  int64_t& missing = *nonfinite.mutable_data_ptr<int64_t>();
  const FloatType type = float_type(x.scalar_type());
  const KernelTable& table = kernels();
  if (spans.by_element) {
    const int64_t columns = spans.length, down = ceil_div(spans.count, kBlockRows),
                  across = ceil_div(columns, kBlockColumns);
    std::vector<float> ends(static_cast<size_t>(2 * down * columns));
    std::vector<int64_t> counts(static_cast<size_t>(down * across), 0);
    parallel_columns(spans, [&](int64_t rows, int64_t column, int64_t n, int64_t first, int64_t last) {
      float *const lows = ends.data() + 2 * rows * columns + column, *const highs = lows + columns;
      std::fill_n(lows, n, kInfinity);
      std::fill_n(highs, n, -kInfinity);
      int64_t& count = counts[static_cast<size_t>(rows * across + column / kBlockColumns)];
      for (int64_t row = first; row < last; ++row)
        table.minmax_span({at_element(x, row * columns + column), n, type, true, lows, highs, &count});
    });
    for (int64_t rows = 0; rows < down; ++rows) {
      const float *lows = ends.data() + 2 * rows * columns, *highs = lows + columns;
      for (int64_t i = 0; i < columns; ++i) {
        low[i] = std::min(low[i], lows[i]);
        high[i] = std::max(high[i], highs[i]);
      }
    }
    for (int64_t count : counts) missing += count;
  } else {
    const Blocks blocks = blocks_of(spans);
    std::vector<float> ends(static_cast<size_t>(2 * blocks.count), kInfinity);
    std::vector<int64_t> counts(static_cast<size_t>(blocks.count), 0);
    for (int64_t block = 0; block < blocks.count; ++block) ends[static_cast<size_t>(2 * block + 1)] = -kInfinity;
    parallel_blocks(spans, blocks, scales, [&](int64_t block, int64_t i, int64_t n, int64_t) {
      float* const both = ends.data() + 2 * block;
      table.minmax_span({at_element(x, i), n, type, false, both, both + 1, &counts[static_cast<size_t>(block)]});
    });
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t index = scale_index(spans, block / blocks.per_span, scales);
      low[index] = std::min(low[index], ends[static_cast<size_t>(2 * block)]);
      high[index] = std::max(high[index], ends[static_cast<size_t>(2 * block + 1)]);
      missing += counts[static_cast<size_t>(block)];
    }
  }
  for (int64_t i = 0; i < scales; ++i) {  // of -0 and +0 either might be the least: always +0
    low[i] += 0.0f;
    high[i] += 0.0f;
  }
  return {least, greatest, nonfinite};
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("fake_quantize", &fake_quantize);
  m.impl("fake_quantize_mask", &fake_quantize_mask);
  m.impl("in_range", &in_range);
  m.impl("positive", &positive);
  m.impl("mask_gradient", &mask_gradient);
  m.impl("fake_quantize_learned", &fake_quantize_learned);
  m.impl("fake_quantize_learned_backward", &fake_quantize_learned_backward);
  m.impl("minmax", &minmax);
}

}  // namespace
}  // namespace torchquant
