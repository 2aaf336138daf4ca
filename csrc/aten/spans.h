// Elements that share a scale (csrc/common/spans.h), as a shape in which ATen broadcasts: a tensor in contiguous order is
// [outer, channels, inner] along an axis, [rows, groups, group_size] in groups, and one run otherwise.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <optional>
#include <vector>

#include "common/spans.h"

namespace torchquant {

struct Parts {
  std::vector<int64_t> shape;        // of the elements
  std::vector<int64_t> scale_shape;  // of one value for each scale, broadcastable to it
  std::vector<int64_t> within;       // the dimensions along which elements share a scale
  int64_t group = 0, missing = 0;    // groups: their size, and how many elements the last one of each row lacks

  at::Tensor elements(const at::Tensor& t) const { return t.contiguous().view(shape); }

  // A value for each scale, to be combined with elements(...).
  at::Tensor spread(const at::Tensor& values) const {
    const at::Tensor v = values.reshape(scale_shape);
    if (missing == 0) return v;
    return v.expand({shape[0], scale_shape[1], group}).reshape({shape[0], -1}).narrow(1, 0, shape[1]);
  }

  // Elements in the shape in which those along `within` share a scale; missing ones are `padding`.
  at::Tensor gathered(const at::Tensor& t, double padding) const {
    if (missing == 0) return t;
    return at::constant_pad_nd(t, {0, missing}, padding).view({shape[0], scale_shape[1], group});
  }
};

// Checks what make_spans checks. The result is for tensors with elements.
inline Parts make_parts(const char* op, const at::Tensor& input, const at::Tensor& scale, std::optional<int64_t> axis,
                        std::optional<int64_t> group_size) {
  const tq_spans spans = make_spans(op, input, scale, axis, group_size);
  Parts p;
  const int64_t n = input.numel();
  if (n == 0) return p;
  if (axis && spans.channels > 1) {
    const int64_t inner = spans.by_element ? 1 : spans.length;
    p.shape = {n / inner / spans.channels, spans.channels, inner};
    p.scale_shape = {1, spans.channels, 1};
    p.within = {0, 2};
  } else if (group_size) {
    const int64_t rows = n / spans.row;
    p.group = spans.length;
    p.missing = spans.per_row * spans.length - spans.row;
    p.shape = p.missing ? std::vector<int64_t>{rows, spans.row} : std::vector<int64_t>{rows, spans.per_row, p.group};
    p.scale_shape = {rows, spans.per_row, 1};
    p.within = {2};
  } else {
    p.shape = {n};
    p.scale_shape = {1};
    p.within = {0};
  }
  return p;
}

}  // namespace torchquant
