// What the steps on images share: pixels as few long runs, divided among threads, and the parameters of a result.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "core/convert.h"
#include "core/threads.h"
#include "core/torchquant_core.h"
#include "formats/int8_tiles.h"

namespace torchquant {

inline constexpr int64_t kImageElements = 16384;  // elements that a thread should have at least

inline bool is_empty(const tq_image& image) { return image.n == 0 || image.h == 0 || image.w == 0 || image.c == 0; }

inline char* pixel_at(const tq_image& image, int64_t n, int64_t y, int64_t x) {
  const int64_t at = n * image.image_stride + y * image.row_stride + x * image.pixel_stride;
  return element_at(image.data, image.type, at);
}

// A loop over [n, h, w, c] on K operands at once, with as few dimensions as their strides allow: adjacent dimensions
// that every operand steps through without a gap are one. What is left is `length` elements that the kernel takes,
// `rows` such runs at fixed strides, and what is around them.
template <size_t K>
class Runs {
 public:
  using Offsets = std::array<int64_t, K>;  // elements

  // sizes from the outermost dimension to the innermost; strides[d][k] is that of dimension d and operand k.
  Runs(const std::array<int64_t, 4>& sizes, const std::array<Offsets, 4>& strides) {
    for (size_t d = 0; d < 4; ++d) {
      if (sizes[d] == 1 && d < 3) continue;  // the innermost stays: its stride is the run's
      if (dims_ > 0 && joins(strides[d], sizes[d])) {
        size_[dims_ - 1] *= sizes[d];
        stride_[dims_ - 1] = strides[d];
      } else {
        size_[dims_] = sizes[d];
        stride_[dims_++] = strides[d];
      }
    }
    length_ = size_[dims_ - 1];
    innermost_ = stride_[dims_ - 1];
    for (int d = 0; d < dims_ - 1; ++d) outer_ *= size_[d];
    rows_ = dims_ > 1 ? size_[dims_ - 2] : 1;
  }

  int64_t length() const { return length_; }
  const Offsets& row_stride() const { return dims_ > 1 ? stride_[dims_ - 2] : none_; }
  const Offsets& element_stride() const { return innermost_; }

  // run(offsets of the first element, rows, length) for parts that together are everything.
  template <class Run>
  void run(const tq_parallel* parallel, const Run& run) const {
    if (outer_ == 1) {  // one run: threads share it in whole cache lines
      parallel_for(parallel, 0, ceil_div(length_, kLine), kImageElements / kLine, [&](int64_t first, int64_t last) {
        Offsets at;
        for (size_t k = 0; k < K; ++k) at[k] = first * kLine * innermost_[k];
        run(at, int64_t{1}, std::min(length_, last * kLine) - first * kLine);
      });
      return;
    }
    parallel_for(parallel, 0, outer_, std::max<int64_t>(1, kImageElements / length_), [&](int64_t first, int64_t last) {
      while (first < last) {
        const int64_t rows = std::min(rows_ - first % rows_, last - first);
        run(offsets_of(first), rows, length_);
        first += rows;
      }
    });
  }

 private:
  static constexpr int64_t kLine = 64;

  bool joins(const Offsets& inner, int64_t size) const {
    for (size_t k = 0; k < K; ++k)
      if (stride_[dims_ - 1][k] != inner[k] * size) return false;
    return true;
  }
  Offsets offsets_of(int64_t index) const {
    Offsets at{};
    for (int d = dims_ - 2; d >= 0; --d) {
      const int64_t i = index % size_[d];
      index /= size_[d];
      for (size_t k = 0; k < K; ++k) at[k] += i * stride_[d][k];
    }
    return at;
  }

  int dims_ = 0;
  std::array<int64_t, 4> size_{};
  std::array<Offsets, 4> stride_{};
  Offsets none_{}, innermost_{};
  int64_t length_ = 0, rows_ = 1, outer_ = 1;
};

template <size_t K>
Runs<K> runs_of(const tq_image& shape, const std::array<const tq_image*, K>& images) {
  std::array<std::array<int64_t, K>, 4> strides;
  for (size_t k = 0; k < K; ++k) {
    strides[0][k] = images[k]->image_stride;
    strides[1][k] = images[k]->row_stride;
    strides[2][k] = images[k]->pixel_stride;
    strides[3][k] = 1;
  }
  return Runs<K>({shape.n, shape.h, shape.w, shape.c}, strides);
}

// tq_image_quantize, which also tells whether the image holds NaN or infinities. (image_convert.cpp)
void quantize_image(const tq_image_float& x, tq_qparams qparams, const tq_image& q, std::atomic<bool>& has_nonfinite,
                    const tq_parallel* parallel);

// The result's type and parameters; an activation that only cuts the range of an int8 result becomes part of it.
inline ResultArgs result_args(const tq_image& out, tq_qparams q, tq_activation* activation) {
  ResultArgs r{};
  r.type = out_type(out.type);
  if (out.type != TQ_I8) return r;
  r.inv = 1.0f / q.scale;
  r.lo = static_cast<float>(q.qmin - q.zero_point);
  r.hi = static_cast<float>(q.qmax - q.zero_point);
  r.zero = q.zero_point;
  // Multiplying and rounding keep the order of numbers: a clamp may come after them, with its ends multiplied and
  // rounded too.
  if (activation && (*activation == TQ_RELU || *activation == TQ_RELU6)) {
    r.lo = std::max(r.lo, 0.0f);
    if (*activation == TQ_RELU6) r.hi = std::min(r.hi, std::nearbyint(6.0f * r.inv));
    *activation = TQ_NONE;
  }
  return r;
}

}  // namespace torchquant
