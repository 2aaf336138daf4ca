"""Tests on a GPU: arguments of every operator, a layer to call, fixtures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from support import (
    ACTIVATIONS,
    FLOATS,
    NOT_FINITE,
    SPECIAL,
    floats,
    gpu_conv,
    gpu_intx,
    integers,
    positive,
    sprinkle,
)
from support.aten import KERNELS, packed
from torchquant import cuda

CUDA = "cuda"


def on_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    return pytest.mark.cuda(needed(test))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No measuring, which would compile every configuration for every shape; another folder."""
    monkeypatch.setenv("TORCHQUANT_AUTOTUNE", "0")
    monkeypatch.setenv("TORCHQUANT_CACHE_DIR", str(tmp_path))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a process before its first call: no device or operator has been checked."""
    dispatcher = cuda.paths._dispatcher
    for name in ("_sound", "_device_reasons", "_operator_reasons", "_said"):
        monkeypatch.setattr(dispatcher, name, type(getattr(dispatcher, name))())
    dispatcher.set_path(dispatcher.path)
    yield
    monkeypatch.undo()
    dispatcher.set_path(dispatcher.path)


SIZES = st.one_of(
    st.just(1),
    st.integers(1, 40),
    st.sampled_from([63, 64, 65, 100, 127, 128, 129, 255, 257, 333, 1000]),
)


class Case:
    """Draws the arguments of a call."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.m, self.n, self.k = (data.draw(SIZES, label=name) for name in "MNK")
        self.seed = data.draw(st.integers(0, 10**6), label="seed")

    def pick(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    def x(self, *shape: int, dtype: torch.dtype | None = None, finite: bool = False) -> Tensor:
        values = floats(*shape, seed=self.seed)
        if not finite:
            spice = self.pick((), SPECIAL, NOT_FINITE)
            values = sprinkle(values, spice, self.seed)
        return values.to(dtype or self.pick(*FLOATS))

    def input(self, **how: Any) -> Tensor:
        lead = self.pick((self.m,), (1, self.m), (2, 3)) if self.m == 6 else (self.m,)
        return self.x(*lead, self.k, **how)

    def zero_points(self, *shape: int, low: int = -128, high: int = 127) -> Tensor | None:
        values = integers(*shape, seed=self.seed).to(torch.int32)
        return self.pick(None, values.add(128 + low).clamp(low, high))

    def granularity(self) -> tuple[tuple[int, ...], int | None, int | None]:
        """Scale's shape, axis, group_size."""
        group = self.pick(1, 8, 32, 100)
        return self.pick(
            ((1,), None, None),
            ((self.m,), 0, None),
            ((self.k,), 1, None),
            ((self.m, -(-self.k // group)), None, group),
            ((self.m, 1), None, self.k),
        )

    def bits(self, real: bool = True) -> tuple[Tensor, Tensor | None, int, int]:
        """Scale, zero point, qmin, qmax; and the layout's arguments follow."""
        shape, axis, group = self.granularity()
        zero = self.pick("none", "integer", "real") if real else self.pick("none", "integer")
        zeros = {
            "none": None,
            "integer": integers(*shape, seed=self.seed).to(torch.int32),
            "real": floats(*shape, seed=self.seed),
        }[zero]
        qmin, qmax = self.pick((-128, 127), (-8, 7), (0, 255), (-127, 127))
        return positive(*shape, seed=self.seed), zeros, qmin, qmax, axis, group

    def weight(self) -> tuple[Any, Tensor, Tensor | None]:
        scales = self.pick(1, self.n)
        weight = packed(integers(self.n, self.k, seed=self.seed))
        return weight, positive(scales, seed=self.seed), self.zero_points(scales)

    def bias(self) -> Tensor | None:
        return self.pick(None, floats(self.n, seed=self.seed + 1))


def _quantize(c: Case) -> tuple[Any, ...]:
    scale, zero, qmin, qmax, axis, group = c.bits()
    dtype = torch.uint8 if qmax == 255 else torch.int8
    return (c.x(c.m, c.k), scale, zero, qmin, qmax, axis, group, dtype)


def _dequantize(c: Case) -> tuple[Any, ...]:
    scale, zero, _, _, axis, group = c.bits()
    q = integers(c.m, c.k, seed=c.seed, dtype=c.pick(torch.int8, torch.uint8))
    return (q, scale, zero, axis, group, c.pick(*FLOATS))


def _rows(c: Case) -> tuple[Any, ...]:
    given = c.pick(True, False)
    qmin, qmax = c.pick((-128, 127), (-8, 7))
    scale = positive(1, seed=c.seed) if given else None
    zero = c.zero_points(1, low=qmin, high=qmax) if given else None
    return (c.input(), scale, zero, qmin, qmax, c.pick(True, False))


def _pack(c: Case) -> tuple[Any, ...]:
    scale = c.pick(None, positive(1, seed=c.seed), positive(c.n, seed=c.seed))
    return (c.x(c.n, c.k), scale, *c.pick((-127, 127), (-8, 7)), c.pick(True, False))


def _int8_mm(c: Case) -> tuple[Any, ...]:
    dtype = c.pick(torch.int8, torch.uint8)
    weight = packed(integers(c.n, c.k, seed=c.seed))
    return (integers(c.m, c.k, seed=c.seed, dtype=dtype), weight, c.n)


def _dynamic(c: Case) -> tuple[Any, ...]:
    rest = (c.pick(True, False), c.pick(*ACTIVATIONS), c.pick(None, *FLOATS), c.pick(8, 8, 4))
    return (c.input(), *c.weight(), c.bias(), c.n, *rest)


def _split(c: Case) -> tuple[Any, ...]:
    sizes = [c.n, 7, 16]
    weights = packed(*(integers(n, c.k, seed=c.seed + n) for n in sizes))
    scale = positive(sum(sizes), seed=c.seed)
    names = c.pick([], ["gelu", "none", "relu"])
    zero = c.zero_points(sum(sizes))
    bias = c.pick(None, floats(sum(sizes), seed=c.seed))
    return (c.input(), weights, scale, zero, bias, sizes, c.pick(True, False), names)


def _static(c: Case) -> tuple[Any, ...]:
    kind = c.pick("float", "int8", "uint8")
    if kind == "float":
        x = c.input()
    else:
        x = integers(c.m, c.k, seed=c.seed, dtype=getattr(torch, kind))
    rows = 1 if kind == "float" else c.pick(1, c.m)
    shape = (1,) if rows == 1 else (rows, 1)
    weight, scale, zero = c.weight()
    bias = c.bias() if kind == "float" else c.pick(c.bias(), integers(c.n).to(torch.int32))
    zero_x = c.zero_points(*shape, low=0, high=255) if kind == "uint8" else c.zero_points(*shape)
    given = (x, positive(*shape, seed=c.seed), zero_x, weight, scale, zero, bias)
    if c.pick(True, False):
        return (*given, c.n, c.pick(*ACTIVATIONS), c.pick(*FLOATS))
    return (*given, c.n, c.pick(*ACTIVATIONS), torch.int8, positive(1, seed=c.seed), 3)


def _norm_of(c: Case) -> tuple[Tensor, Tensor | None]:
    x = c.input()
    return x, c.pick(None, floats(c.k, seed=c.seed).to(c.pick(torch.float32, x.dtype)))


def _rms_norm(c: Case) -> tuple[Any, ...]:
    return (*_norm_of(c), 1e-6, c.pick(True, False))


def _layer_norm(c: Case) -> tuple[Any, ...]:
    x, weight = _norm_of(c)
    bias = None if weight is None else c.pick(None, weight.flip(0))
    return (x, weight, bias, 1e-5, c.pick(None, x.flip(0)))


def _attention(c: Case) -> tuple[Any, ...]:
    heads, depth = c.pick((2, 2), (4, 1)), c.pick(8, 32, 33)
    queries, keys = min(c.m, 70), min(c.n, 70)
    dtype = c.pick(*FLOATS)
    q = c.x(2, heads[0], queries, depth, dtype=dtype, finite=True)
    k, v = (c.x(2, heads[1], keys, d, dtype=dtype, finite=True) for d in (depth, 16))
    return (q, k, v, None, None, c.pick(True, False))


def _fake(c: Case) -> tuple[Any, ...]:
    return (c.x(c.m, c.k), *c.bits())


def _learned(c: Case) -> tuple[Any, ...]:
    scale, _, qmin, qmax, axis, group = c.bits()
    offset = c.pick(None, floats(*scale.shape, seed=c.seed))
    return (c.x(c.m, c.k), scale, offset, qmin, qmax, 0.25, axis, group)


def _minmax(c: Case) -> tuple[Any, ...]:
    _, axis, group = c.granularity()
    return (c.x(c.m, c.k), axis, group)


def _gated(c: Case) -> tuple[Any, ...]:
    dtype = c.pick(*FLOATS)
    return (c.input(dtype=dtype), c.input(dtype=dtype), c.pick(*ACTIVATIONS))


def _mask_gradient(c: Case) -> tuple[Any, ...]:
    grad = c.x(c.m, c.k)
    return (grad, integers(-(-grad.numel() // 8), seed=c.seed, dtype=torch.uint8))


CASES: dict[str, Callable[[Case], tuple[Any, ...]]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "quantize_per_token": lambda c: (c.input(), c.pick(True, False)),
    "pack_weight": lambda c: (integers(c.n, c.k, seed=c.seed),),
    "unpack_weight": lambda c: (packed(integers(c.n, c.k, seed=c.seed)), c.n, c.k),
    "int8_mm": _int8_mm,
    "linear_dynamic": _dynamic,
    "linear_dynamic_split": _split,
    "linear_static": _static,
    "pack_intx_weight": gpu_intx.pack,
    "unpack_intx_weight": gpu_intx.unpack,
    "linear_dynamic_intx": gpu_intx.dynamic,
    "linear_static_intx": gpu_intx.static,
    "linear_intx": gpu_intx.floats_stay,
    "pack_conv_weight": gpu_conv.pack,
    "unpack_conv_weight": gpu_conv.unpack,
    "conv_static": gpu_conv.static,
    "conv_dynamic": gpu_conv.dynamic,
    "activation": lambda c: (c.input(), c.pick(*ACTIVATIONS), c.pick(None, *FLOATS)),
    "gated_activation": _gated,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "attention": _attention,
    "fake_quantize": _fake,
    "fake_quantize_mask": _fake,
    "in_range": _fake,
    "positive": lambda c: (c.x(c.m, c.k),),
    "mask_gradient": _mask_gradient,
    "fake_quantize_learned": _learned,
    "minmax": _minmax,
    "quantize_rows": _rows,
    "quantize_pack": _pack,
    "quantize_pack_intx": gpu_intx.quantize_pack,
}


def layer(
    rows: int = 5, outputs: int = 96, inputs: int = 160, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A linear operator on the GPU, an input there, and the CPU's result."""
    weight, scale, bias = integers(outputs, inputs), positive(outputs), floats(outputs)
    x = floats(rows, inputs, dtype=dtype)
    rest = (None, bias, outputs, True, "gelu")
    expected = KERNELS.linear_dynamic(x, KERNELS.pack_weight(weight), scale, *rest)
    there = KERNELS.pack_weight(weight.cuda())
    s, b = scale.cuda(), bias.cuda()

    def call(x: Tensor) -> Tensor:
        return KERNELS.linear_dynamic(x, there, s, None, b, outputs, True, "gelu")

    return call, x.cuda(), expected
