// activation, gated_activation. One line is one operation with one rounding, as in torchquant/functional/activations.py,
// where the derivation and the error bounds are.
#include "aten/activations.h"

#include <array>
#include <optional>
#include <string_view>

#include "common/checks.h"
#include "common/arithmetic.h"
#include "aten/blocks.h"
#include "common/device.h"
#include "aten/register.h"

namespace torchquant {
namespace {

at::Tensor max_of(double limit, const at::Tensor& x) {  // x for NaN and for a zero of either sign
  return at::where(x < limit, constant_like(x, limit), x);
}
at::Tensor min_of(double limit, const at::Tensor& x) { return at::where(x > limit, constant_like(x, limit), x); }

template <size_t N>
at::Tensor horner(const double (&coefficients)[N], const at::Tensor& x) {
  at::Tensor p = fmaf(x, coefficients[0], coefficients[1]);
  for (size_t i = 2; i < N; ++i) p = fmaf(p, x, coefficients[i]);
  return p;
}

// exp(r) = 1 + r + r^2 * (...) on [-ln2/2, ln2/2]
constexpr double kExp[] = {0x1.6a23d0p-10, 0x1.123a20p-7, 0x1.5558f2p-5, 0x1.555492p-3, 0x1.fffffcp-2, 1.0, 1.0};
constexpr double kExpWithoutOnes[] = {kExp[0], kExp[1], kExp[2], kExp[3], kExp[4]};

struct Reduced {  // x = n ln 2 + r with |r| <= ln(2) / 2; power = 2^n
  at::Tensor r, power;
};

Reduced reduce_exp(const at::Tensor& x) {  // |x| <= 88 (or NaN)
  constexpr double kMagic = 0x1.8p+23;
  const at::Tensor z = fmaf(x, 0x1.715476p+0, kMagic);  // n = rint(x log2 e) in its low bits
  const at::Tensor n = z - kMagic;
  at::Tensor r = fmaf(n, -0x1.62e430p-1, x);
  r = fmaf(n, 0x1.05c610p-29, r);
  const at::Tensor bits = z.view(at::kInt).bitwise_left_shift(23) + 0x3f800000;  // the magic number's leave at the top
  return {r, bits.view(at::kFloat)};
}

at::Tensor exp_of(const Reduced& x) {
  const at::Tensor p = horner(kExp, x.r);
  return p * x.power;
}

at::Tensor silu_of(const at::Tensor& x) {
  const at::Tensor a = max_of(-87.0, x);
  const at::Tensor g = min_of(87.0, a);
  const at::Tensor e = exp_of(reduce_exp(-g));
  return a / (e + 1.0);
}

at::Tensor gelu_tanh_of(const at::Tensor& x) {
  const at::Tensor a = max_of(-10.0, x);
  const at::Tensor b = min_of(10.0, a);
  const at::Tensor s = b * b;
  const at::Tensor w = fmaf(s, 0x1.2444f2p-4, 0x1.988454p+0);
  const at::Tensor g = b * w;
  const at::Tensor e = exp_of(reduce_exp(-g));
  return a / (e + 1.0);
}

// (1 + slope * a) * Phi(-a) * exp(a^2 / 2) in t = 1 / (1 + slope * a)
constexpr double kGeluSlope = 0x1.60902ep-2;
constexpr double kGelu[] = {-0x1.d00b5cp-6, 0x1.2a5afcp-3, -0x1.1860a4p-2, 0x1.88bb80p-3, -0x1.48dc74p-5,
                            0x1.ce7566p-4,  0x1.de775cp-4, 0x1.1a2804p-3,  0x1.1944eep-3};

at::Tensor gelu_of(const at::Tensor& x) {
  const at::Tensor a = min_of(13.0, x.abs());
  const at::Tensor h = a * a;
  const at::Tensor low = fmaf(a, a, -h);
  Reduced y = reduce_exp(h * -0.5);
  y.r = y.r + low * -0.5;
  const at::Tensor e = exp_of(y);
  const at::Tensor d = fmaf(a, kGeluSlope, 1.0);
  const at::Tensor v = a / d;
  const at::Tensor t = fmaf(v, -kGeluSlope, 1.0);
  const at::Tensor p = horner(kGelu, t);
  at::Tensor q = v * p;
  q = q * e;
  return max_of(0.0, x) - q;
}

at::Tensor tanh_of(const at::Tensor& x) {
  const at::Tensor a = min_of(10.0, x.abs());
  const auto [r, power] = reduce_exp(a + a);
  const at::Tensor h = r * r;
  const at::Tensor p = horner(kExpWithoutOnes, r);
  const at::Tensor q = fmaf(h, p, r);
  const at::Tensor t = fmaf(power, q, power - 1.0);
  const at::Tensor m = t / (t + 2.0);
  return at::copysign(m, x);
}

at::Tensor sigmoid_of(const at::Tensor& x) {
  const at::Tensor a = max_of(-87.0, x);
  const at::Tensor g = min_of(87.0, a);
  const at::Tensor e = exp_of(reduce_exp(-g));
  return torchquant::reciprocal(e + 1.0);
}

at::Tensor hardsigmoid_times_6(const at::Tensor& x) {
  const at::Tensor a = x + 3.0;
  const at::Tensor b = max_of(0.0, a);
  return min_of(6.0, b);
}

at::Tensor leaky_relu_of(const at::Tensor& x) {
  const at::Tensor a = x * constant_like(x, 0x1.47ae14p-7);
  return at::where(a >= x, a, x);
}

at::Tensor activated(const at::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kRelu: return max_of(0.0, x);
    case Activation::kGelu: return gelu_of(x);
    case Activation::kGeluTanh: return gelu_tanh_of(x);
    case Activation::kSilu: return silu_of(x);
    case Activation::kTanh: return tanh_of(x);
    case Activation::kSigmoid: return sigmoid_of(x);
    case Activation::kRelu6: return min_of(6.0, max_of(0.0, x));
    case Activation::kHardswish: return torchquant::divide(x * hardsigmoid_times_6(x), 6.0);
    case Activation::kHardsigmoid: return torchquant::divide(hardsigmoid_times_6(x), 6.0);
    case Activation::kLeakyRelu: return leaky_relu_of(x);
  }
  return x;
}

at::Tensor activation(const at::Tensor& input, std::string_view activation, std::optional<at::ScalarType> dtype) {
  const char* op = "activation";
  check_float(op, "input", input);
  const at::ScalarType out_dtype = dtype.value_or(input.scalar_type());
  TORCH_CHECK_TYPE(is_float_input(out_dtype), op, ": dtype must be float32, bfloat16 or float16, got ",
                   dtype_name(out_dtype));
  const at::Tensor out = apply_activation(input.to(at::kFloat), activation_from(op, activation)).to(out_dtype);
  return out.is_same(input) ? at::clone(input) : out;  // "none": the result of an operator is its own
}

at::Tensor gated_activation(const at::Tensor& gate, const at::Tensor& up, std::string_view activation) {
  const char* op = "gated_activation";
  check_float(op, "gate", gate);
  check_device(op, "up", up, gate, "gate");
  check_dtype(op, "up", up, gate.scalar_type());
  TORCH_CHECK_VALUE(gate.sizes() == up.sizes(), op, ": up must have gate's shape ", gate.sizes(), ", got ",
                    describe(up));
  const at::Tensor y = apply_activation(gate.to(at::kFloat), activation_from(op, activation));
  return (y * up.to(at::kFloat)).to(gate.scalar_type());
}

TORCHQUANT_ATEN_KERNELS(m) {
  m.impl<ops::activation>(&activation);
  m.impl<ops::gated_activation>(&gated_activation);
}

}  // namespace

at::Tensor apply_activation(const at::Tensor& x, Activation activation) {
  if (x.numel() <= kBlockElements || activation == Activation::kNone) return activated(x, activation);
  const at::Tensor out = at::empty_like(x);
  in_blocks<2>({x, out}, [&](const std::array<at::Tensor, 2>& part) { part[1].copy_(activated(part[0], activation)); });
  return out;
}

}  // namespace torchquant
