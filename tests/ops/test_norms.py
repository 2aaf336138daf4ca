"""RMSNorm and LayerNorm: specification, error bounds, kernels, gradients, modules."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    EXTREME,
    FLOATS,
    INF,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    sprinkle,
)
from torch import nn
from torch.nn import functional as F

from torchquant import functional, ops
from torchquant.nn import Activation, LayerNorm, RMSNorm

SIZES = (1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 384, 577, 4096)


def rms_norm_true(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def layer_norm_true(x, weight, bias, eps):
    x = x.double()
    centered = x - x.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y + bias.double()


# ---------------------------------------------------------------- specification


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_error_bounds(size, offset):
    """Against float64, with rows of very different magnitude; the docstring states the bound."""
    g = torch.Generator().manual_seed(size)
    x = torch.randn(200, size, generator=g) * torch.exp2(torch.randint(-20, 20, (200, 1)).float())
    x = x + offset * x.abs().amax(-1, keepdim=True)
    weight, bias = torch.randn(size, generator=g), torch.randn(size, generator=g)
    unit = 2.0**-24
    bound = (6 + size / 16) * unit

    y, true = functional.rms_norm(x, weight, 1e-6).double(), rms_norm_true(x, weight, 1e-6)
    assert ((y - true).abs() <= bound * true.abs() + 1e-38).all()

    y, true = functional.layer_norm(x, weight, bias, 1e-5), layer_norm_true(x, weight, bias, 1e-5)
    centered = x.double() - x.double().mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    # The mean's own error counts by how much larger x is than its deviation.
    terms = (centered.abs() + x.double().abs().amax(-1, keepdim=True)) / deviation
    limit = bound * (terms * weight.double().abs() + true.abs() + bias.double().abs())
    assert ((y.double() - true).abs() <= limit).all()


def test_the_order_of_the_sum_is_the_promised_one():
    """One row, written out: element i is added to lane i mod 16, then lanes 8, 4, 2 and 1 apart."""
    x = torch.randn(1, 83, generator=torch.Generator().manual_seed(1))
    lanes = [torch.tensor(0.0)] * 16
    for i, value in enumerate(x[0]):
        lanes[i % 16] = functional.fmaf(value, value, lanes[i % 16])
    for step in (8, 4, 2, 1):
        lanes = [lanes[i] + lanes[i + step] for i in range(step)]
    mean = lanes[0] / torch.tensor(83.0)
    root = torch.tensor(math.sqrt(float(mean + torch.tensor(1e-6))))
    assert_same_bits(functional.rms_norm(x, None, 1e-6), x * (1 / root))


# Computed by a separate C program that follows the same sequence of operations.
FROZEN_RMS = ("-0x1.a4a68cp-1", "-0x1.56c09ap-1", "0x1.f28c8p-3", "0x1.a4a68cp+1")
FROZEN_LAYER = ("-0x1.d252ep+0", "-0x1.1d2716p+0", "0x1.6b0cdcp-2", "0x1.1252ep+2")


def test_bits_are_frozen():
    """A change of any bit here changes what deployed models compute."""
    x = torch.arange(-9, 10).float().reshape(1, 19) / 7
    weight, bias = torch.linspace(0.5, 2, 19), torch.linspace(-1, 1, 19)
    picks = [0, 5, 10, 18]
    rms = functional.rms_norm(x, weight, 1e-6)[0, picks].tolist()
    layer = functional.layer_norm(x + 3, weight, bias, 1e-5)[0, picks].tolist()
    assert rms == [float.fromhex(text) for text in FROZEN_RMS]
    assert layer == [float.fromhex(text) for text in FROZEN_LAYER]


def test_close_to_torch():
    x, weight, bias = floats(40, 384), torch.randn(384), torch.randn(384)
    for dtype in FLOATS:
        y = x.to(dtype)
        expected = F.rms_norm(y.float(), (384,), weight, 1e-6).to(dtype)
        torch.testing.assert_close(ops.rms_norm(y, weight, 1e-6), expected)
        expected = F.layer_norm(y.float(), (384,), weight, bias, 1e-5).to(dtype)
        torch.testing.assert_close(ops.layer_norm(y, weight, bias, 1e-5), expected)


# ---------------------------------------------------------------- kernels


def awkward(*shape, seed=0, dtype=torch.float32, share=0.05):
    return sprinkle(floats(*shape, seed=seed), SPECIAL + EXTREME + NOT_FINITE, seed, share).to(
        dtype
    )


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.integers(1, 90),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_shape_and_layout(sizes, last, dtype, weight_dtype, layout, first, second, seed):
    x = awkward(*sizes, last, seed=seed, dtype=dtype)
    residual = awkward(*sizes, last, seed=seed + 1, dtype=dtype) if second else None
    if x.numel():
        x = in_layout(x, layout)
        residual = in_layout(residual, layout) if second else None
    weight = floats(last, seed=seed + 2).to(weight_dtype) if first or second else None
    bias = floats(last, seed=seed + 3) if first and second else None
    expected = functional.rms_norm(x, weight, 1e-6, second)
    check_everywhere(
        lambda: ops.rms_norm(x, weight, 1e-6, cast_before_weight=second), expected, what=layout
    )
    expected = functional.layer_norm(x, weight, bias, 1e-5, residual)
    check_everywhere(lambda: ops.layer_norm(x, weight, bias, 1e-5, residual), expected, what=layout)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_equal_specification_with_any_number_of_threads(size, dtype):
    rows = max(9, 20_000 // size)
    x, weight = awkward(rows, size, seed=size, dtype=dtype, share=0.01), torch.randn(size)
    expected = functional.rms_norm(x, weight, 1e-6)
    check_everywhere(lambda: ops.rms_norm(x, weight, 1e-6), expected, (1, 2))
    expected = functional.layer_norm(x, weight, weight, 1e-5)
    check_everywhere(lambda: ops.layer_norm(x, weight, weight, 1e-5), expected, (1, 2))


def test_a_row_alone_gives_what_it_gives_in_a_batch():
    x, weight = awkward(23, 200), torch.randn(200)
    for norm in (
        lambda x: ops.rms_norm(x, weight, 1e-6),
        lambda x: ops.layer_norm(x, weight, weight, 1e-5),
    ):
        batch = norm(x)
        for row in range(23):
            assert_same_bits(norm(x[row]), batch[row])


@pytest.mark.parametrize("value", NOT_FINITE)
def test_not_finite_values_stay_in_their_row(value):
    x = torch.randn(9, 100)
    clean_rms, clean_layer = ops.rms_norm(x, None, 1e-6), ops.layer_norm(x, None, None, 1e-5)
    x[4, 50] = value
    rms, layer = ops.rms_norm(x, None, 1e-6), ops.layer_norm(x, None, None, 1e-5)
    others = [row for row in range(9) if row != 4]
    assert_same_bits(rms[others], clean_rms[others])
    assert_same_bits(layer[others], clean_layer[others])
    assert layer[4].isnan().all()
    if math.isnan(value):
        assert rms[4].isnan().all()
    else:
        assert rms[4, 50].isnan() and rms[4].nan_to_num(0).eq(0).all()


def test_rows_of_zeros_and_of_equal_numbers():
    zeros = torch.zeros(3, 40)
    assert_same_bits(ops.rms_norm(zeros, None, 1e-6), zeros)
    equal = ops.layer_norm(torch.full((3, 40), 0.1), None, None, 1e-5)
    assert equal.abs().max() <= 1e-5
    assert ops.rms_norm(zeros, None, 0.0).isnan().all()  # 0 / 0, as the formula says


def test_cast_before_weight_is_llamas_order():
    x, weight = floats(30, 70).bfloat16(), torch.randn(70).bfloat16()
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    theirs = weight * h.to(x.dtype)
    torch.testing.assert_close(
        ops.rms_norm(x, weight, 1e-6, cast_before_weight=True), theirs, rtol=2.0**-8, atol=0
    )
    same = ops.rms_norm(x, weight, 1e-6, cast_before_weight=True) == theirs
    once = ops.rms_norm(x, weight, 1e-6) == theirs
    assert same.float().mean() > 0.995 > once.float().mean()


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("affine", ["none", "weight", "weight and bias"])
def test_gradients_are_torchs(affine):
    x, residual = torch.randn(5, 3, 40, requires_grad=True), torch.randn(5, 3, 40)
    residual.requires_grad_()
    weight = torch.randn(40, requires_grad=True) if affine != "none" else None
    bias = torch.randn(40, requires_grad=True) if affine == "weight and bias" else None
    inputs = [t for t in (x, weight) if t is not None]
    pairs = [(ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (40,), weight, 1e-5), inputs)]
    inputs = [t for t in (x, weight, bias) if t is not None]
    reference = F.layer_norm(x, (40,), weight, bias, 1e-5)
    pairs.append((ops.layer_norm(x, weight, bias, 1e-5), reference, inputs))
    reference = F.layer_norm(x + residual, (40,), weight, bias, 1e-5)
    ours = ops.layer_norm(x, weight, bias, 1e-5, residual)
    pairs.append((ours, reference, [*inputs, residual]))
    for ours, reference, inputs in pairs:
        torch.testing.assert_close(ours, reference)
        factor = torch.randn_like(ours)
        got = torch.autograd.grad((ours * factor).sum(), inputs, create_graph=True)
        expected = torch.autograd.grad((reference * factor).sum(), inputs, create_graph=True)
        torch.testing.assert_close(got, expected)
        seconds = (sum(g.square().sum() for g in grads) for grads in (got, expected))
        allow = {"allow_unused": True}
        got, expected = (torch.autograd.grad(total, inputs, **allow) for total in seconds)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight, bias = torch.randn(4, 20), torch.randn(20), torch.randn(20, requires_grad=True)
    ops.layer_norm(x, weight, bias, 1e-5).sum().backward()
    assert torch.equal(bias.grad, torch.full((20,), 4.0)) and weight.grad is None
    half = torch.randn(20).bfloat16().requires_grad_()
    ops.rms_norm(x, half, 1e-5).sum().backward()
    assert half.grad.dtype == torch.bfloat16 and x.grad is None


def test_forward_mode_raises_instead_of_vanishing():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        for call in (
            lambda: ops.rms_norm(x, None, 1e-6),
            lambda: ops.layer_norm(torch.ones(3), torch.ones(3), x, 1e-6),
        ):
            with pytest.raises(RuntimeError, match="jvp is not implemented"):
                call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: ops.rms_norm(x.double(), None, 1e-6),
            TypeError,
            "rms_norm: input must be float32, bfloat16 or float16, got float64 [2, 3]; "
            "convert it with .to(torch.float32)",
        ),
        (
            lambda x: ops.rms_norm(x[0, 0], None, 1e-6),
            ValueError,
            "rms_norm: input must have at least 1 dimension, got float32 []",
        ),
        (
            lambda x: ops.rms_norm(x, torch.ones(2), 1e-6),
            ValueError,
            "rms_norm: weight must be [3], one value per element of input's last dimension, "
            "got float32 [2]",
        ),
        (
            lambda x: ops.rms_norm(x, None, -1.0),
            ValueError,
            "rms_norm: eps must be finite and not negative, got -1",
        ),
        (
            lambda x: ops.layer_norm(x, None, torch.ones(3), 1e-6),
            ValueError,
            "layer_norm: bias must come with a weight, got bias alone",
        ),
        (
            lambda x: ops.layer_norm(x, None, None, 1e-6, x.half()),
            TypeError,
            "layer_norm: residual must be float32, got float16 [2, 3]; "
            "convert it with .to(torch.float32)",
        ),
        (
            lambda x: ops.layer_norm(x, None, None, 1e-6, x[:1]),
            ValueError,
            "layer_norm: residual must have input's shape [2, 3], got float32 [1, 3]",
        ),
    ],
    ids=["float64", "scalar", "weight's size", "eps", "bias alone", "dtypes", "shapes"],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(torch.ones(2, 3))


@pytest.mark.parametrize("eps", [-1.0, INF, NAN])
def test_the_specification_refuses_the_same(eps):
    x = torch.ones(2, 3)
    for call in (ops.rms_norm, functional.rms_norm):
        with pytest.raises(ValueError, match="rms_norm: eps must be finite and not negative"):
            call(x, None, eps)


# ---------------------------------------------------------------- modules


class LlamaRMSNorm(nn.Module):
    """transformers' RMSNorm of Llama, Qwen, Mistral, SmolLM."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.variance_epsilon = eps

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


class GemmaRMSNorm(LlamaRMSNorm):
    """Gemma's: the weight is an offset from one."""

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (y * (1.0 + self.weight.float())).type_as(x)


class NotRoot(LlamaRMSNorm):
    """Subtracts the mean: LayerNorm without a bias."""

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), None, 1e-6)


def test_drop_ins_share_the_weights_and_their_names():
    torch_rms, layer = nn.RMSNorm(48, eps=1e-5), nn.LayerNorm(48)
    nn.init.normal_(torch_rms.weight), nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = torch.randn(7, 48)
    for norm, drop_in in (
        (torch_rms, RMSNorm.from_float(torch_rms)),
        (nn.RMSNorm(48), RMSNorm.from_float(nn.RMSNorm(48))),
        (nn.RMSNorm(48, elementwise_affine=False), RMSNorm(48, 2.0**-23, False)),
        (layer, LayerNorm.from_float(layer)),
        (nn.LayerNorm(48, bias=False), LayerNorm.from_float(nn.LayerNorm(48, bias=False))),
        (LlamaRMSNorm(48), None),
    ):
        drop_in = RMSNorm.from_float(norm) if drop_in is None else drop_in
        assert list(drop_in.state_dict()) == list(norm.state_dict())
        drop_in.load_state_dict(norm.state_dict())
        torch.testing.assert_close(drop_in(x), norm(x))
    assert RMSNorm.from_float(torch_rms).weight is torch_rms.weight
    assert not RMSNorm.from_float(torch_rms.eval()).training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_rounding_is_found_out(dtype):
    llama, plain = LlamaRMSNorm(64).to(dtype), nn.RMSNorm(64, eps=1e-6)
    nn.init.normal_(plain.weight)
    assert RMSNorm.from_float(llama).cast_before_weight
    assert not RMSNorm.from_float(plain).cast_before_weight


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RMSNorm.from_float(GemmaRMSNorm(32)), ValueError, "gives different values"),
        (lambda: RMSNorm.from_float(NotRoot(32)), ValueError, "gives different values"),
        (lambda: RMSNorm.from_float(nn.Linear(3, 3)), TypeError, "variance_epsilon or eps"),
        (lambda: RMSNorm.from_float(nn.RMSNorm((2, 3))), ValueError, "one dimension"),
        (lambda: RMSNorm.from_float(nn.RMSNorm(3, device="meta")), ValueError, "on the CPU"),
        (lambda: LayerNorm.from_float(nn.LayerNorm((2, 3))), ValueError, "one dimension"),
        (lambda: LayerNorm.from_float(nn.GroupNorm(1, 3)), TypeError, "must be a torch.nn"),
        (lambda: Activation("mish"), ValueError, "Activation: name must be one of none, relu"),
    ],
)
def test_modules_that_compute_something_else_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_modules_call_the_operators_also_compiled():
    x, other = torch.randn(6, 32), torch.randn(6, 32)
    rms, layer, activation = RMSNorm(32), LayerNorm(32), Activation("gelu")
    nn.init.normal_(rms.weight), nn.init.normal_(layer.bias)

    def model(x, other):
        return activation(rms(x)), layer(x, other)

    expected = (
        ops.activation(ops.rms_norm(x, rms.weight, 1e-6), "gelu"),
        ops.layer_norm(x, layer.weight, layer.bias, 1e-5, other),
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for results in (model(x, other), compiled(x, other)):
        for got, want in zip(results, expected, strict=True):
            assert_same_bits(got.detach(), want.detach())
    assert "cast_before_weight" in str(RMSNorm(4, cast_before_weight=True))
    assert str(activation) == "Activation(gelu)" and "bias=True" in str(layer)
