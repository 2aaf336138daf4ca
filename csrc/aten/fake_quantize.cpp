// Fake quantization for training, in ATen: the operations of csrc/kernels/fake_quantize.inc one by one. A learned step's
// sums are taken in float64 by ATen's reductions, whose order is fixed.
#include <ATen/ATen.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/arithmetic.h"
#include "aten/blocks.h"
#include "common/device.h"
#include "aten/register.h"
#include "aten/spans.h"
#include "common/tensors.h"

namespace torchquant {
namespace {

at::Tensor bit_numbers(const at::Tensor& like) { return at::arange(8, like.options().dtype(at::kByte)); }

at::Tensor packed_bits(const at::Tensor& truth) {  // of a bool tensor, in contiguous order
  const int64_t n = truth.numel(), bytes = ceil_div(n, 8);
  at::Tensor bits = truth.reshape({n}).to(at::kByte);
  if (8 * bytes != n) bits = at::constant_pad_nd(bits, {0, 8 * bytes - n});
  return bits.view({bytes, 8}).bitwise_left_shift(bit_numbers(bits)).sum(1, false, at::kByte);
}

at::Tensor unpacked_bits(const at::Tensor& bits, at::IntArrayRef shape) {
  const at::Tensor all = bits.unsqueeze(1).bitwise_right_shift(bit_numbers(bits)).bitwise_and(1).to(at::kBool);
  return all.view({-1}).narrow(0, 0, c10::multiply_integers(shape)).view(shape);
}

// One value for each scale; real_zero: where there is one.
struct FakeParams {
  at::Tensor scale, inverse, lo, hi, real_zero;
};

FakeParams make_fake_params(const char* op, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
                            int64_t qmax) {
  check_dtype(op, "scale", scale, at::kFloat);
  FakeParams p;
  p.scale = scale.contiguous();
  p.inverse = torchquant::reciprocal(p.scale);
  p.lo = at::full_like(p.scale, static_cast<double>(qmin));
  p.hi = at::full_like(p.scale, static_cast<double>(qmax));
  if (!present(zero_point)) return p;
  const bool is_real = check_zero_point(op, *zero_point, scale);
  const bool one = zero_point->numel() == 1 && zero_point->dim() <= 1;
  const at::Tensor z = (one ? zero_point->reshape({}) : *zero_point).expand(scale.sizes());
  if (is_real) {
    p.real_zero = z;
  } else {
    p.lo = at::rsub(z, qmin).to(at::kFloat);
    p.hi = at::rsub(z, qmax).to(at::kFloat);
  }
  return p;
}

struct FakeQuantized {
  at::Tensor values, inside;  // of input's type; bool
};

// NaN stays: clamp passes it on.
FakeQuantized fake_quantized(const at::Tensor& input, const Parts& parts, const FakeParams& p, bool want_values,
                             bool want_inside) {
  FakeQuantized result;
  if (want_values) result.values = at::empty(input.sizes(), input.options());
  if (want_inside) result.inside = at::empty(input.sizes(), input.options().dtype(at::kBool));
  if (input.numel() == 0) return result;
  const auto elements = [&](const at::Tensor& t) { return t.defined() ? parts.elements(t) : t; };
  const auto spread = [&](const at::Tensor& t) { return t.defined() ? parts.spread(t) : t; };
  in_blocks<8>({parts.elements(input), elements(result.values), elements(result.inside), spread(p.scale),
                spread(p.inverse), spread(p.lo), spread(p.hi), spread(p.real_zero)},
               [](const std::array<at::Tensor, 8>& part) {
                 const auto& [x, values, inside, scale, inverse, lo, hi, real_zero] = part;
                 at::Tensor steps = x.to(at::kFloat);
                 steps = (real_zero.defined() ? steps - real_zero : steps) * inverse;
                 steps.round_();
                 if (inside.defined()) inside.copy_((steps >= lo).logical_and_(steps <= hi));
                 if (!values.defined()) return;
                 at::clamp_out(steps, steps, lo, hi);
                 steps.add_(0.0).mul_(scale);  // the integers have no negative zero
                 if (real_zero.defined()) steps.add_(real_zero);
                 values.copy_(steps);
               });
  return result;
}

FakeQuantized fake_quantize_of(const char* op, const at::Tensor& input, const at::Tensor& scale,
                               const OptTensor& zero_point, int64_t qmin, int64_t qmax, OptInt axis, OptInt group_size,
                               bool want_values, bool want_inside) {
  check_float(op, "input", input);
  check_device(op, "scale", scale, input);
  check_device(op, "zero_point", zero_point, input);
  check_fake_range(op, qmin, qmax);
  const Parts parts = make_parts(op, input, scale, axis, group_size);
  const FakeParams p = make_fake_params(op, scale, zero_point, qmin, qmax);
  return fake_quantized(input, parts, p, want_values, want_inside);
}

at::Tensor fake_quantize(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
                         int64_t qmax, OptInt axis, OptInt group_size) {
  return fake_quantize_of("fake_quantize", input, scale, zero_point, qmin, qmax, axis, group_size, true, false).values;
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& input, const at::Tensor& scale,
                                                      const OptTensor& zero_point, int64_t qmin, int64_t qmax,
                                                      OptInt axis, OptInt group_size) {
  const FakeQuantized result =
      fake_quantize_of("fake_quantize_mask", input, scale, zero_point, qmin, qmax, axis, group_size, true, true);
  return {result.values, packed_bits(result.inside)};
}

at::Tensor in_range(const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
                    int64_t qmax, OptInt axis, OptInt group_size) {
  return packed_bits(
      fake_quantize_of("in_range", input, scale, zero_point, qmin, qmax, axis, group_size, false, true).inside);
}

at::Tensor positive(const at::Tensor& input) {
  check_float("positive", "input", input);
  return packed_bits(input > 0);
}

at::Tensor mask_gradient(const at::Tensor& grad, const at::Tensor& bits) {
  const char* op = "mask_gradient";
  check_float(op, "grad", grad);
  check_device(op, "bits", bits, grad, "grad");
  check_dtype(op, "bits", bits, at::kByte);
  const int64_t bytes = ceil_div(grad.numel(), 8);
  TORCH_CHECK_VALUE(bits.dim() == 1 && bits.numel() == bytes, op, ": bits must be uint8 [", bytes,
                    "], one bit per element of grad, got ", describe(bits));
  const at::Tensor x = grad.contiguous();
  return at::where(unpacked_bits(bits, x.sizes()), x, at::zeros({}, x.options()));
}

// What a learned step is used as: at least 2^-126; NaN stays.
at::Tensor learned_scale(const at::Tensor& scale) {
  return at::where(scale < kLeastScale, constant_like(scale, kLeastScale), scale);
}

at::Tensor fake_quantize_learned(const at::Tensor& input, const at::Tensor& scale, const OptTensor& offset,
                                 int64_t qmin, int64_t qmax, double /*grad_factor*/, OptInt axis, OptInt group_size) {
  const char* op = "fake_quantize_learned";
  check_float(op, "input", input);
  check_device(op, "scale", scale, input);
  check_device(op, "offset", offset, input);
  check_fake_range(op, qmin, qmax);
  const Parts parts = make_parts(op, input, scale, axis, group_size);
  check_dtype(op, "scale", scale, at::kFloat);
  FakeParams p;
  p.scale = learned_scale(scale);
  at::Tensor zero = at::zeros_like(p.scale);
  if (present(offset)) {
    check_dtype(op, "offset", *offset, at::kFloat);
    TORCH_CHECK_VALUE(offset->sizes() == scale.sizes(), op, ": offset must have scale's shape ", scale.sizes(),
                      ", got ", describe(*offset));
    zero = (offset->neg() / p.scale).round();
    const at::Tensor none = zero.isnan();  // an integer cannot hold it: the values show it
    p.scale = at::where(none, zero, p.scale);
    zero = at::where(none, at::zeros_like(zero), zero.clamp(qmin, qmax));
  }
  p.inverse = torchquant::reciprocal(p.scale);
  p.lo = at::rsub(zero, qmin);
  p.hi = at::rsub(zero, qmax);
  return fake_quantized(input, parts, p, true, false).values;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_learned_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& scale, const OptTensor& zero_point, int64_t qmin,
    int64_t qmax, OptInt axis, OptInt group_size) {
  const char* op = "fake_quantize_learned_backward";
  check_float(op, "input", input);
  check_device(op, "grad", grad, input);
  check_device(op, "scale", scale, input);
  check_device(op, "zero_point", zero_point, input);
  check_dtype(op, "grad", grad, input.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == input.sizes(), op, ": grad must have input's shape ", input.sizes(), ", got ",
                    describe(grad));
  check_fake_range(op, qmin, qmax);
  const Parts parts = make_parts(op, input, scale, axis, group_size);
  check_dtype(op, "scale", scale, at::kFloat);
  at::Tensor zero = at::zeros(scale.sizes(), scale.options().dtype(at::kInt));
  if (present(zero_point)) {
    check_dtype(op, "zero_point", *zero_point, at::kInt);
    TORCH_CHECK_VALUE(zero_point->sizes() == scale.sizes(), op, ": zero_point must have scale's shape ", scale.sizes(),
                      ", got ", describe(*zero_point));
    zero = *zero_point;
  }
  if (input.numel() == 0)
    return {at::empty(input.sizes(), input.options()), at::zeros(scale.sizes(), scale.options()),
            at::zeros(scale.sizes(), scale.options())};
  const at::Tensor used = learned_scale(scale), inverse = torchquant::reciprocal(used);
  const at::Tensor lo = at::rsub(zero, qmin).to(at::kFloat), hi = at::rsub(zero, qmax).to(at::kFloat);
  const at::Tensor grad_input = at::empty(input.sizes(), input.options()), x = parts.elements(input);
  const at::Tensor to_scale = at::empty(x.sizes(), x.options().dtype(at::kFloat)), to_offset = at::empty_like(to_scale);
  in_blocks<10>({x, parts.elements(grad), parts.elements(grad_input), to_scale, to_offset, parts.spread(used),
                 parts.spread(inverse), parts.spread(lo), parts.spread(hi), parts.spread(zero.to(at::kFloat))},
                [](const std::array<at::Tensor, 10>& part) {
                  const auto& [x, grad, grad_x, to_scale, to_offset, s, inverse, lo, hi, zero] = part;
                  const at::Tensor v = x.to(at::kFloat) * inverse, g = grad.to(at::kFloat);
                  const at::Tensor inside = (lo < v).logical_and_(v < hi), steps = at::clamp(v.round(), lo, hi);
                  const at::Tensor none = at::zeros({}, v.options());
                  grad_x.copy_(at::where(inside, g, none));
                  to_offset.copy_(at::where(inside, none, g));
                  // rint(v) - v from the residual steps * s - x, which keeps all its bits where v has rounded them away
                  const at::Tensor residual = steps.to(at::kDouble).mul_(s).sub_(x).to(at::kFloat);
                  to_scale.copy_(at::where(inside, residual * inverse, steps + zero).mul_(g));
                });
  const auto sums = [&](const at::Tensor& terms) {
    return parts.gathered(terms, 0.0).sum(parts.within, false, at::kDouble).to(at::kFloat).view(scale.sizes());
  };
  return {grad_input, sums(to_scale), sums(to_offset)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> minmax(const at::Tensor& input, OptInt axis, OptInt group_size) {
  const char* op = "minmax";
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  check_float(op, "input", input);
  const auto floats = input.options().dtype(at::kFloat);
  const at::Tensor none = at::full(scale_sizes(input, axis, group_size), kInfinity, floats);
  const Parts parts = make_parts(op, input, none, axis, group_size);
  if (input.numel() == 0) return {none, none.neg(), at::zeros({1}, floats.dtype(at::kLong))};
  const at::Tensor x = parts.elements(input), finite = x.isfinite();
  const auto end = [&](double neutral, bool least) {
    const at::Tensor there = parts.gathered(at::where(finite, x, at::full({}, neutral, x.options())), neutral);
    const at::Tensor ends = least ? at::amin(there, parts.within) : at::amax(there, parts.within);
    return ends.to(at::kFloat).view(none.sizes()) + 0.0;  // of -0 and +0 either might be the least: always +0
  };
  return {end(kInfinity, true), end(-kInfinity, false), finite.logical_not().sum(at::kLong).view({1})};
}

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::fake_quantize>(&fake_quantize);
  m.impl<ops::fake_quantize_mask>(&fake_quantize_mask);
  m.impl<ops::in_range>(&in_range);
  m.impl<ops::positive>(&positive);
  m.impl<ops::mask_gradient>(&mask_gradient);
  m.impl<ops::fake_quantize_learned>(&fake_quantize_learned);
  m.impl<ops::fake_quantize_learned_backward>(&fake_quantize_learned_backward);
  m.impl<ops::minmax>(&minmax);
}

}  // namespace
}  // namespace torchquant
