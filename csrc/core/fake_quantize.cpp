// Fake quantization for training: values, one-bit masks, a learned step's gradients, ranges; at every granularity.
//
// Elements are shared out to threads in units of 64, whatever the spans: no two threads write to one byte of a mask,
// and few long spans or many short ones are equally well divided. Sums are taken over fixed blocks, so that no bit of
// them depends on the threads: of a run up to 4096 elements in fp32 (16 lanes of 256), of columns 64 rows; the blocks'
// sums are added in float64, in order.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/convert.h"
#include "core/spans.h"
#include "core/threads.h"
#include "formats/int8_tiles.h"
#include "isa.h"

namespace torchquant {
namespace {

constexpr int64_t kUnit = 64;            // elements in which threads share
constexpr int64_t kRunBlock = 4096;      // elements of a run that one fp32 sum takes
constexpr int64_t kBlockRows = 64;       // the same for sums of columns
constexpr int64_t kBlockColumns = 1024;  // their parameters and sums fit the nearest cache
constexpr float kSmallestScale = 0x1p-126f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Run>
void parallel_units(const tq_parallel* parallel, int64_t elements, const Run& run) {  // run(first element, end)
  parallel_for(parallel, 0, ceil_div(elements, kUnit), kThreadElements / kUnit,
               [&](int64_t first, int64_t last) { run(first * kUnit, std::min(last * kUnit, elements)); });
}

void fake_quantize(const void* x, tq_type type, void* out, uint8_t* bits, const tq_spans& spans, int64_t scales,
                   const KernelScales& p, const tq_parallel* parallel) {
  const KernelTable& table = kernels();
  parallel_units(parallel, elements_of(spans), [&](int64_t first, int64_t last) {
    for_segments(spans, scales, first, last, [&](int64_t i, int64_t n, int64_t index) {
      FakeQuantizeArgs args{};
      args.x = element_at(x, type, i);
      args.out = out ? element_at(out, type, i) : nullptr;
      args.bits = bits ? bits + i / 8 : nullptr;
      args.bit = i % 8;
      args.n = n;
      args.type = float_type(type);
      args.by_element = spans.by_element;
      args.scale = p.scale + index;
      args.inverse = p.inverse.data() + index;
      args.real_zero = p.real_zero.data() + index;
      args.lo = p.lo.data() + index;
      args.hi = p.hi.data() + index;
      table.fake_quantize_span(args);
    });
  });
}

// The scales that a learned step is used with: at least 2^-126, never refused inside a training step. NaN stays NaN.
std::vector<float> usable_scales(const tq_scales& s) {
  std::vector<float> used(s.scale, s.scale + s.count);
  for (float& scale : used) scale = scale < kSmallestScale ? kSmallestScale : scale;
  return used;
}

tq_scales with_scales(const tq_scales& s, const std::vector<float>& used) {
  tq_scales learned = s;
  learned.scale = used.data();
  learned.real_zero = nullptr;
  return learned;
}

// Blocks of elements that share a scale, each visited once by some thread: run(block, first element, n, scale's index).
struct Blocks {
  int64_t per_span, count;
};

Blocks blocks_of(const tq_spans& s) {
  const int64_t per_span = ceil_div(s.length, kRunBlock);
  return {per_span, s.count * per_span};
}

template <class Run>
void parallel_blocks(const tq_parallel* parallel, const tq_spans& s, const Blocks& blocks, int64_t scales,
                     const Run& run) {
  const int64_t elements = std::max<int64_t>(1, std::min(s.length, kRunBlock));
  parallel_for(parallel, 0, blocks.count, std::max<int64_t>(1, kThreadElements / elements),
               [&](int64_t first, int64_t last) {
                 for (int64_t block = first; block < last; ++block) {
                   const int64_t span = block / blocks.per_span, from = block % blocks.per_span * kRunBlock;
                   const int64_t row = span / s.per_row, at = span % s.per_row * s.length;
                   const int64_t n = std::min(std::min(s.length, s.row - at) - from, kRunBlock);
                   if (n > 0) run(block, row * s.row + at + from, n, scale_index(s, span, scales));
                 }
               });
}

// Blocks of columns: run(block of rows, first column, columns, first row, end row).
template <class Run>
void parallel_columns(const tq_parallel* parallel, const tq_spans& s, const Run& run) {
  const int64_t down = ceil_div(s.count, kBlockRows), across = ceil_div(s.length, kBlockColumns);
  parallel_for(parallel, 0, down * across, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t rows = block / across, column = block % across * kBlockColumns;
      run(rows, column, std::min(kBlockColumns, s.length - column), rows * kBlockRows,
          std::min(s.count, (rows + 1) * kBlockRows));
    }
  });
}

void learned_backward(const tq_learned_backward_call& c, const tq_spans& spans, int64_t scales, const KernelScales& p,
                      const tq_parallel* parallel) {
  const std::vector<float> zero(p.zero.begin(), p.zero.end());
  std::vector<double> totals(static_cast<size_t>(2 * scales), 0.0);
  double *scale_totals = totals.data(), *offset_totals = scale_totals + scales;
  const KernelTable& table = kernels();
  const auto args_at = [&](int64_t i, int64_t n, int64_t index) {
    LearnedBackwardArgs args{};
    args.grad = element_at(c.grad, c.type, i);
    args.x = element_at(c.x, c.type, i);
    args.grad_x = element_at(c.grad_x, c.type, i);
    args.n = n;
    args.type = float_type(c.type);
    args.by_element = spans.by_element;
    args.scale = p.scale + index;
    args.inverse = p.inverse.data() + index;
    args.zero = zero.data() + index;
    args.lo = p.lo.data() + index;
    args.hi = p.hi.data() + index;
    return args;
  };
  if (elements_of(spans) == 0) {
  } else if (spans.by_element) {
    const int64_t columns = spans.length, down = ceil_div(spans.count, kBlockRows);
    std::vector<float> sums(static_cast<size_t>(2 * down * columns), 0.0f);
    parallel_columns(parallel, spans, [&](int64_t rows, int64_t column, int64_t n, int64_t first, int64_t last) {
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
    parallel_blocks(parallel, spans, blocks, scales, [&](int64_t block, int64_t i, int64_t n, int64_t index) {
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
    c.grad_scale[i] = static_cast<float>(scale_totals[i]);
    c.grad_offset[i] = static_cast<float>(offset_totals[i]);
  }
}

void minmax_of_columns(const void* x, tq_type type, const tq_spans& spans, float* least, float* greatest,
                       int64_t* nonfinite, const tq_parallel* parallel) {
  const KernelTable& table = kernels();
  const int64_t columns = spans.length, down = ceil_div(spans.count, kBlockRows),
                across = ceil_div(columns, kBlockColumns);
  std::vector<float> ends(static_cast<size_t>(2 * down * columns));
  std::vector<int64_t> counts(static_cast<size_t>(down * across), 0);
  parallel_columns(parallel, spans, [&](int64_t rows, int64_t column, int64_t n, int64_t first, int64_t last) {
    float *const lows = ends.data() + 2 * rows * columns + column, *const highs = lows + columns;
    std::fill_n(lows, n, kInfinity);
    std::fill_n(highs, n, -kInfinity);
    int64_t& count = counts[static_cast<size_t>(rows * across + column / kBlockColumns)];
    for (int64_t row = first; row < last; ++row) {
      const void* from = element_at(x, type, row * columns + column);
      table.minmax_span({from, n, float_type(type), true, lows, highs, &count});
    }
  });
  for (int64_t rows = 0; rows < down; ++rows) {
    const float *lows = ends.data() + 2 * rows * columns, *highs = lows + columns;
    for (int64_t i = 0; i < columns; ++i) {
      least[i] = std::min(least[i], lows[i]);
      greatest[i] = std::max(greatest[i], highs[i]);
    }
  }
  for (int64_t count : counts) *nonfinite += count;
}

void minmax_of_runs(const void* x, tq_type type, const tq_spans& spans, int64_t scales, float* least, float* greatest,
                    int64_t* nonfinite, const tq_parallel* parallel) {
  const KernelTable& table = kernels();
  const Blocks blocks = blocks_of(spans);
  std::vector<float> ends(static_cast<size_t>(2 * blocks.count), kInfinity);
  std::vector<int64_t> counts(static_cast<size_t>(blocks.count), 0);
  for (int64_t block = 0; block < blocks.count; ++block) ends[static_cast<size_t>(2 * block + 1)] = -kInfinity;
  parallel_blocks(parallel, spans, blocks, scales, [&](int64_t block, int64_t i, int64_t n, int64_t) {
    float* const both = ends.data() + 2 * block;
    int64_t* const count = &counts[static_cast<size_t>(block)];
    table.minmax_span({element_at(x, type, i), n, float_type(type), false, both, both + 1, count});
  });
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t index = scale_index(spans, block / blocks.per_span, scales);
    least[index] = std::min(least[index], ends[static_cast<size_t>(2 * block)]);
    greatest[index] = std::max(greatest[index], ends[static_cast<size_t>(2 * block + 1)]);
    *nonfinite += counts[static_cast<size_t>(block)];
  }
}

}  // namespace
}  // namespace torchquant

using namespace torchquant;

tq_status tq_fake_quantize(const void* x, tq_type type, void* out, uint8_t* bits, const tq_spans* spans,
                           const tq_scales* scales, const tq_parallel* parallel) {
  return status_of([&] {
    const KernelScales p(*scales, true);
    fake_quantize(x, type, out, bits, *spans, scales->count, p, parallel);
  });
}

tq_status tq_fake_quantize_learned(const void* x, tq_type type, void* out, const tq_spans* spans,
                                   const tq_scales* scales, const float* offset, const tq_parallel* parallel) {
  return status_of([&] {
    std::vector<float> used = usable_scales(*scales);
    tq_scales learned = with_scales(*scales, used);
    learned.zero_point = nullptr;
    KernelScales p(learned, true);
    if (offset) {
      const float least = static_cast<float>(scales->qmin), most = static_cast<float>(scales->qmax);
      for (size_t i = 0; i < used.size(); ++i) {
        const float zero = std::nearbyint(-offset[i] / used[i]);
        if (zero != zero) used[i] = zero;  // an integer cannot hold NaN: the values become NaN instead
        else p.set_zero(i, static_cast<int32_t>(std::clamp(zero, least, most)), scales->qmin, scales->qmax);
      }
    }
    fake_quantize(x, type, out, nullptr, *spans, scales->count, p, parallel);
  });
}

tq_status tq_fake_quantize_learned_backward(const tq_learned_backward_call* call, const tq_spans* spans,
                                            const tq_scales* scales, const tq_parallel* parallel) {
  return status_of([&] {
    const std::vector<float> used = usable_scales(*scales);
    const KernelScales p(with_scales(*scales, used), true);
    learned_backward(*call, *spans, scales->count, p, parallel);
  });
}

tq_status tq_positive(const void* x, tq_type type, int64_t elements, uint8_t* bits, const tq_parallel* parallel) {
  const KernelTable& table = kernels();
  parallel_units(parallel, elements, [&](int64_t first, int64_t last) {
    MaskArgs args{};
    args.x = element_at(x, type, first);
    args.bits = bits + first / 8;
    args.n = last - first;
    args.type = float_type(type);
    table.positive_span(args);
  });
  return TQ_OK;
}

tq_status tq_mask(const void* x, tq_type type, int64_t elements, const uint8_t* bits, void* out,
                  const tq_parallel* parallel) {
  const KernelTable& table = kernels();
  parallel_units(parallel, elements, [&](int64_t first, int64_t last) {
    MaskArgs args{};
    args.x = element_at(x, type, first);
    args.out = element_at(out, type, first);
    args.bits = const_cast<uint8_t*>(bits) + first / 8;  // only read
    args.n = last - first;
    args.type = float_type(type);
    table.mask_span(args);
  });
  return TQ_OK;
}

tq_status tq_minmax(const void* x, tq_type type, const tq_spans* spans, int64_t scales, float* least, float* greatest,
                    int64_t* nonfinite, const tq_parallel* parallel) {
  return status_of([&] {
    std::fill_n(least, scales, kInfinity);
    std::fill_n(greatest, scales, -kInfinity);
    *nonfinite = 0;
    if (elements_of(*spans) == 0) return;
    if (spans->by_element) minmax_of_columns(x, type, *spans, least, greatest, nonfinite, parallel);
    else minmax_of_runs(x, type, *spans, scales, least, greatest, nonfinite, parallel);
    for (int64_t i = 0; i < scales; ++i) {  // of -0 and +0 either might be the least: always +0
      least[i] += 0.0f;
      greatest[i] += 0.0f;
    }
  });
}
