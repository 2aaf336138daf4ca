"""Calls of every operator: the one list that tests, the fuzzer and device checks take theirs from.

``cases("linear_dynamic")`` are calls with realistic arguments: every optional argument given and
left out, every float type, empty and one-dimensional batches, with gradients and without. They come
in any size. A new operator gets a function here, named as the operator (those of the convolutions
are in tests/support/conv_cases.py, those on weights of few bits in intx_cases.py and
embedding_cases.py); tests/ops/test_cases.py fails for an operator without one, and for an optional
argument that no case gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import support.conv_cases
import support.embedding_cases
import support.intx_cases
import support.kv_cases
import support.qat_intx_cases  # noqa: F401  (those in training)
import torch
from support import Shape, floats, integers, leaf
from support.aten import KERNELS as NAMESPACE
from support.aten import arguments
from support.case_operands import GENERATORS, ONE, ZERO, Operands, Samples, generator, sample

OPERATORS = tuple(
    sorted(
        name.removeprefix("torchquant::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torchquant::")
    )
)


@dataclass(frozen=True, eq=False)
class Case:
    """A call of an operator.

    ``given`` are the arguments by the schema's names, with a :class:`Packed` for packed weights.
    Left out are defaults, and optional tensors that are None. ``gradients`` names the tensors that
    take one.
    """

    operator: str
    name: str
    given: dict[str, Any]
    gradients: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.operator}-{self.name}"

    def arguments(
        self, namespace: Any = NAMESPACE, device: str = "cpu", gradients: bool = True
    ) -> dict[str, Any]:
        """The arguments by name, for ``namespace`` on ``device``; those with gradients are new."""
        _, values = arguments(namespace, device, **self.given)
        for name in self.gradients if gradients else ():
            values[name] = leaf(values[name])
        required = (a.name for a in schema(self.operator) if not a.has_default_value())
        return {name: None for name in required if name not in values} | values

    def call(self, namespace: Any = NAMESPACE, device: str = "cpu", gradients: bool = True) -> Any:
        """The operator's result."""
        operator = getattr(namespace, self.operator).default
        return operator(**self.arguments(namespace, device, gradients))


def schema(operator: str) -> list[Any]:
    """The arguments of an operator's schema."""
    return list(getattr(NAMESPACE, operator).default._schema.arguments)


def cases(
    operator: str, shape: Shape | None = None, dtype: torch.dtype = torch.float32
) -> list[Case]:
    """The calls of an operator with tensors of ``shape``; float inputs have ``dtype`` in most."""
    operands = Operands(dtype=dtype) if shape is None else Operands(shape, dtype)
    return [
        Case(operator, name, {key: value for key, value in given.items() if value is not None}, by)
        for name, given, by in GENERATORS[operator](operands)
    ]


def all_cases() -> list[Case]:
    """The calls of all operators."""
    return [case for operator in GENERATORS for case in cases(operator)]


# ---------------------------------------------------------------- affine


@generator
def quantize(o: Operands) -> Samples:
    byte = {"qmin": -128, "qmax": 127}
    yield sample("one scale", input=o.x, scale=ONE, **byte)
    yield sample(
        "to uint8", input=o.bf16, scale=ONE, zero_point=ZERO, qmin=0, qmax=15, dtype=torch.uint8
    )
    zeros = ZERO.expand(o.shape.rows)
    yield sample("rows", input=o.x, scale=o.rows[:, 0], zero_point=zeros, qmin=-8, qmax=7, axis=0)
    yield sample("columns", input=o.x, scale=o.columns, axis=-1, **byte)
    yield sample(
        "groups", input=o.x, scale=o.groups, zero_point=o.group_zeros, group_size=32, **byte
    )
    yield sample("with a gradient", "input", input=o.x, scale=ONE, **byte)
    yield sample("no rows", input=o.x[:0], scale=ONE, **byte)


@generator
def dequantize(o: Operands) -> Samples:
    zeros = ZERO.expand(o.shape.rows)
    yield sample("one scale", input=o.q, scale=ONE)
    yield sample("to bfloat16", input=o.q, scale=ONE, zero_point=ZERO, dtype=torch.bfloat16)
    yield sample("groups", input=o.q, scale=o.groups, zero_point=o.group_zeros, group_size=32)
    yield sample(
        "rows", input=o.q, scale=o.rows[:, 0], zero_point=zeros, axis=0, dtype=torch.float16
    )


@generator
def quantize_per_token(o: Operands) -> Samples:
    yield sample("symmetric", input=o.x)
    yield sample("bfloat16", input=o.bf16, symmetric=False)
    yield sample("batch", input=o.batch, symmetric=False)
    yield sample("with a gradient", "input", input=o.x)
    yield sample("no rows", input=o.x[:0])


# ---------------------------------------------------------------- linear


@generator
def pack_weight(o: Operands) -> Samples:
    yield sample("contiguous", weight=o.weight)
    yield sample("transposed", weight=o.weight.t())


@generator
def unpack_weight(o: Operands) -> Samples:
    sizes = {"out_features": o.shape.outputs, "in_features": o.shape.inputs}
    yield sample("one weight", packed=o.packed, **sizes)


@generator
def int8_mm(o: Operands) -> Samples:
    side = {"packed": o.packed, "out_features": o.shape.outputs}
    yield sample("int8", input=o.q, **side)
    yield sample("uint8", input=o.q.view(torch.uint8), **side)
    yield sample("batch", input=integers(2, 3, o.shape.inputs), **side)
    yield sample("one dimension", input=o.q[0], **side)


@generator
def linear_dynamic(o: Operands) -> Samples:
    side = {"packed": o.packed, "weight_scale": o.scale, "out_features": o.shape.outputs}
    zero = {"weight_zero_point": o.zero_point}
    yield sample("plain", input=o.x, **side)
    yield sample(
        "everything", input=o.bf16, bias=o.bias, symmetric=False, activation="gelu", **side, **zero
    )
    half = {"activation": "silu", "output_dtype": torch.float16}
    yield sample("batch to float16", input=o.batch, bias=o.bias, **half, **side)
    yield sample("few bits", input=o.x, bias=o.bias, activation_bits=4, **side)
    yield sample("gradient of the input", "input", input=o.x, **side)
    both = {"input": o.x, "bias": o.bias}
    gelu = {"activation": "gelu", **both, **zero}
    yield sample("gradients behind gelu", "input", "bias", **gelu, **side)
    yield sample("gradient of the bias", "bias", symmetric=False, activation="relu", **both, **side)
    tanh = {"bias": o.bias.bfloat16(), "activation": "gelu_tanh"}
    yield sample("bfloat16 gradients", "input", "bias", input=o.bf16, **tanh, **side, **zero)
    yield sample("no rows", input=o.x[:0], **side)
    yield sample("one dimension", input=o.x[0], **{**side, "weight_scale": o.scale[:1]})


@generator
def linear_dynamic_split(o: Operands) -> Samples:
    features, bias = [o.shape.outputs, o.half_outputs], o.twice(o.bias)
    one = {"packed": o.packed, "weight_scale": o.scale, "out_features": [o.shape.outputs]}
    two = {"packed": o.both, "weight_scale": o.twice(o.scale), "out_features": features}
    zero = {"weight_zero_point": o.twice(o.zero_point)}
    plain = {"symmetric": True, "activations": []}
    yield sample("one layer", input=o.x, **one, **plain)
    names = {"symmetric": False, "activations": ["gelu", "none"]}
    yield sample("everything", input=o.bf16, bias=bias, **two, **zero, **names)
    yield sample("batch to float16", input=o.batch, output_dtype=torch.float16, **two, **plain)
    yield sample("gradient of the input", "input", input=o.x, **two, **plain)
    silu = {"symmetric": True, "activations": ["none", "silu"]}
    yield sample("gradients", "input", "bias", input=o.x, bias=bias, **two, **zero, **silu)
    shifted = {"symmetric": False, "activations": []}
    yield sample("bfloat16 bias", "bias", input=o.x, bias=bias.bfloat16(), **two, **shifted)
    yield sample("no rows", input=o.x[:0], bias=bias, **two, **plain)
    yield sample("one dimension", input=o.x[0], **two, **plain)


@generator
def linear_static(o: Operands) -> Samples:
    weight = {"packed": o.packed, "weight_scale": o.scale, "out_features": o.shape.outputs}
    side = {"input_scale": ONE, **weight}
    seven = {"input_zero_point": torch.tensor([-7], dtype=torch.int32)}
    int8 = {"output_dtype": torch.int8, "output_scale": torch.tensor([0.5])}
    uint8 = {**int8, "output_dtype": torch.uint8, "output_qmin": 0, "output_qmax": 255}
    biased = {"bias": o.bias, **side}
    yield sample("integers", input=o.q, **side)
    yield sample(
        "rows of their own",
        input=o.q,
        input_scale=o.rows,
        input_zero_point=o.row_zeros,
        weight_zero_point=o.zero_point,
        bias=integers(o.shape.outputs, seed=5, dtype=torch.int32),
        activation="gelu",
        output_dtype=torch.bfloat16,
        **weight,
    )
    yield sample("to int8", input=o.q, output_zero_point=5, **int8, **biased, **seven)
    yield sample("uint8 to uint8", input=o.q.view(torch.uint8), **uint8, **biased)
    yield sample("floats", input=o.x, activation="silu", **biased, **seven)
    gelu = {"weight_zero_point": o.zero_point, "activation": "gelu", **biased, **seven}
    yield sample("gradients behind gelu", "input", "bias", input=o.x, **gelu)
    yield sample("gradient of the input", "input", input=o.x, input_qmin=-127, **side)
    yield sample("few bits", input=o.bf16, input_qmin=-8, input_qmax=7, **biased)
    yield sample("float16 bias", "bias", input=o.q, **{**biased, "bias": o.bias.half()})
    yield sample("floats to int8", "input", input=o.x, **int8, **side)


# ---------------------------------------------------------------- activations


@generator
def activation(o: Operands) -> Samples:
    yield sample("plain", input=o.x, activation="gelu")
    yield sample("to float32", input=o.bf16.t(), activation="tanh", dtype=torch.float32)
    yield sample("rows apart", input=o.x[:, 3:9], activation="sigmoid", dtype=torch.float16)
    yield sample("expanded", input=o.x[:, :1].expand(-1, 5), activation="relu")
    yield sample("gradient", "input", input=o.x, activation="silu")
    half = {"activation": "gelu_tanh", "dtype": torch.bfloat16}
    yield sample("gradient to bfloat16", "input", input=o.x, **half)
    yield sample("no rows", input=o.x[:0], activation="none")


@generator
def gated_activation(o: Operands) -> Samples:
    gate, up = o.x[:, : o.shape.inputs // 2], o.x[:, -(o.shape.inputs // 2) :]
    yield sample("plain", gate=o.x, up=o.x.flip(0), activation="silu")
    yield sample("halves", gate=gate, up=up[:, : gate.shape[1]], activation="gelu")
    yield sample("transposed", gate=o.bf16.t(), up=o.bf16.t(), activation="gelu_tanh")
    yield sample("gradients", "gate", "up", gate=o.x, up=o.x, activation="sigmoid")
    yield sample("one gradient", "up", gate=o.x, up=o.x, activation="silu")
    yield sample("no rows", gate=o.x[:0], up=o.x[:0], activation="tanh")


# ---------------------------------------------------------------- norms, attention


@generator
def rms_norm(o: Operands) -> Samples:
    yield sample("plain", input=o.x, eps=1e-6)
    cast = {"eps": 1e-6, "cast_before_weight": True}
    yield sample("batch of bfloat16", input=o.batch.bfloat16(), weight=o.columns, **cast)
    yield sample("gradients", "input", "weight", input=o.x, weight=o.columns, eps=1e-6)
    part, weight = o.x[:, 3:40], o.columns[3:40].bfloat16()
    if part.numel():
        yield sample("gradient of the weight", "weight", input=part, weight=weight, eps=0.0)
    yield sample("no rows", input=o.x[:0], eps=1e-6)


@generator
def layer_norm(o: Operands) -> Samples:
    weight = {"weight": o.columns, "eps": 1e-5}
    yield sample("plain", input=o.x, eps=1e-5)
    half = {"bias": o.columns.half(), "residual": o.bf16.flip(0), **weight}
    yield sample("bfloat16", input=o.bf16, **half)
    yield sample("gradients", "input", "weight", "bias", input=o.x, bias=o.columns, **weight)
    yield sample("gradient of the residual", "residual", input=o.x, residual=o.x, eps=1e-5)
    both = {"input": o.x, "bias": o.columns, "residual": o.x, **weight}
    yield sample("gradient of the bias", "bias", **both)
    yield sample("no rows", input=o.x[:0], eps=1e-5)


@generator
def attention(o: Operands) -> Samples:
    query, length = o.query, o.shape.rows
    half = query.bfloat16()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = {"query": query, "key": query, "value": query}
    yield sample("plain", **same)
    yield sample("grouped", query=half, key=half[:, :2], value=half[:, 2:], scale=0.3)
    yield sample("mask and causal", mask=causal, causal=True, **same)
    yield sample("gradients", "query", "key", "value", **same)
    shared = {"query": query, "key": query[:, :1], "value": query[:, :1]}
    mask = floats(3, 4, 1, length, seed=14)
    yield sample("gradient of the mask", "query", "value", "mask", mask=mask, **shared)
    yield sample("no batch", query=query[:0], key=query[:0], value=query[:0])


# ---------------------------------------------------------------- fake_quantize


@generator
def fake_quantize(o: Operands) -> Samples:
    byte, four = {"qmin": -128, "qmax": 127}, {"qmin": -8, "qmax": 7}
    zeros = ZERO.expand(o.shape.rows)
    yield sample("plain", input=o.x, scale=ONE, **byte)
    yield sample("gradient", "input", input=o.x, scale=ONE, zero_point=ZERO, **four)
    rows = {"scale": o.rows[:, 0], "zero_point": zeros, "axis": 0}
    yield sample("rows of bfloat16", "input", input=o.bf16, **rows, **four)
    real = {"zero_point": floats(o.shape.inputs, seed=15), "qmin": 0, "qmax": 15, "axis": 0}
    yield sample("real zero points", "input", input=o.x.t(), scale=o.columns, **real)
    groups = {"scale": o.groups, "zero_point": o.group_zeros, "group_size": 32}
    yield sample("groups", "input", input=o.x, **groups, **byte)
    yield sample("no rows", "input", input=o.x[:0], scale=ONE, **byte)


@generator
def fake_quantize_mask(o: Operands) -> Samples:
    byte, four = {"qmin": -128, "qmax": 127}, {"qmin": -8, "qmax": 7}
    tokens = {"scale": o.rows, "zero_point": o.row_zeros, "group_size": o.shape.inputs}
    yield sample("plain", input=o.x, scale=ONE, **byte)
    yield sample("tokens", "input", input=o.x, **tokens, **byte)
    yield sample("columns", input=o.bf16, scale=o.columns, axis=-1, **four)
    yield sample("no rows", input=o.x[:0], scale=ONE, **byte)


@generator
def in_range(o: Operands) -> Samples:
    four = {"qmin": -8, "qmax": 7}
    groups = {"scale": o.groups, "zero_point": o.group_zeros, "group_size": 32}
    yield sample("plain", input=o.x, scale=ONE, qmin=-128, qmax=127)
    yield sample("columns", input=o.bf16, scale=o.columns, axis=-1, **four)
    yield sample("groups", "input", input=o.x, **groups, **four)


@generator
def positive_(o: Operands) -> Samples:
    yield sample("plain", input=o.x)
    yield sample("transposed", "input", input=o.bf16.t())
    yield sample("no rows", input=o.x[:0])
    yield sample("one number", input=o.x[0, 0])


@generator
def mask_gradient(o: Operands) -> Samples:
    for name, grad in {"plain": o.x, "transposed": o.bf16.t(), "no rows": o.x[:0]}.items():
        yield sample(name, grad=grad, bits=NAMESPACE.positive(grad))
    yield sample("gradient", "grad", grad=o.x, bits=NAMESPACE.positive(o.x))


@generator
def fake_quantize_learned(o: Operands) -> Samples:
    four = {"qmin": -8, "qmax": 7, "grad_factor": 0.1}
    step = {"scale": ONE, "qmin": -8, "qmax": 7}
    yield sample("plain", input=o.x, scale=ONE, qmin=-128, qmax=127, grad_factor=1.0)
    yield sample("gradients", "input", "scale", input=o.x, scale=ONE, **four)
    rows = {"scale": o.rows[:, 0], "offset": floats(o.shape.rows, seed=15), "axis": 0}
    yield sample("rows", "input", "scale", "offset", input=o.bf16, **rows, **four)
    columns = {"scale": o.columns, "offset": floats(o.shape.inputs, seed=16), "axis": -1}
    unsigned = {"qmin": 0, "qmax": 15, "grad_factor": 0.5}
    yield sample("columns", "scale", "offset", input=o.x, **columns, **unsigned)
    two = {"qmin": -2, "qmax": 1, "grad_factor": 1.0, "group_size": 32}
    yield sample("groups", "input", "scale", input=o.x, scale=o.groups, **two)
    yield sample("no rows", "input", "scale", input=o.x[:0], grad_factor=1.0, **step)


@generator
def fake_quantize_learned_backward(o: Operands) -> Samples:
    four = {"qmin": -8, "qmax": 7}
    zeros = ZERO.expand(o.shape.rows)
    yield sample("plain", grad=o.x, input=o.x, scale=ONE, qmin=-128, qmax=127)
    rows = {"scale": o.rows[:, 0], "zero_point": zeros, "axis": 0}
    yield sample("rows", grad=o.bf16, input=o.bf16, **rows, **four)
    yield sample("columns", grad=o.x, input=o.x, scale=o.columns, axis=-1, **four)
    two = {"qmin": -2, "qmax": 1, "group_size": 32}
    yield sample("groups", grad=o.x, input=o.x, scale=o.groups, **two)
    yield sample("no rows", grad=o.x[:0], input=o.x[:0], scale=ONE, **four)


@generator
def minmax(o: Operands) -> Samples:
    yield sample("plain", input=o.x)
    yield sample("columns", input=o.bf16, axis=-1)
    yield sample("groups", "input", input=o.x, group_size=32)
    yield sample("no rows", input=o.x[:0], axis=1)
    yield sample("one group", input=o.x, group_size=1000)


# ---------------------------------------------------------------- qat


@generator
def quantize_rows(o: Operands) -> Samples:
    byte = {"qmin": -128, "qmax": 127}
    yield sample("own ranges", input=o.x, symmetric=False, **byte)
    yield sample("few bits", input=o.bf16, qmin=-8, qmax=7, symmetric=True)
    yield sample("one scale", input=o.x, scale=ONE, zero_point=ZERO, symmetric=False, **byte)
    static = {"scale": ONE, "zero_point": ZERO, "symmetric": False, **byte}
    yield sample("one scale, one row", input=o.x[:1], **static)
    yield sample("one scale, no columns", input=o.x[:, :0], **static)
    yield sample("no rows", input=o.x[:0], symmetric=False, **byte)


@generator
def quantize_pack(o: Operands) -> Samples:
    weight = o.float_weight
    yield sample("own ranges", weight=weight, qmin=-127, qmax=127, symmetric=True)
    yield sample("few bits", weight=weight.bfloat16(), qmin=-8, qmax=7, symmetric=False)
    yield sample("given scales", weight=weight, scale=o.scale, qmin=-128, qmax=127, symmetric=True)


@generator
def mm_fake_quantized(o: Operands) -> Samples:
    grad = floats(o.shape.rows, o.shape.outputs, seed=17)
    side = {"weight": o.float_weight, "scale": o.scale}
    zeros = {"zero_point": ZERO.expand(o.shape.outputs).contiguous()}
    yield sample("plain", grad=grad, qmin=-127, qmax=127, **side)
    yield sample("zero points", grad=grad, qmin=-8, qmax=7, **side, **zeros)
    yield sample("no rows", grad=grad[:0], qmin=-8, qmax=7, **side)


@generator
def qat_linear(o: Operands) -> Samples:
    weight, bias = o.float_weight, o.bias
    own = {"input_qmin": -128, "input_qmax": 127, "input_symmetric": False}
    fixed = {"input_scale": ONE, "input_zero_point": ZERO, **own}
    eight = {"weight_qmin": -127, "weight_qmax": 127, "weight_symmetric": True}
    four = {"weight_qmin": -8, "weight_qmax": 7}
    layer = {"input": o.x, "weight": weight}
    all_three, two = ("input", "weight", "bias"), ("input", "weight")
    yield sample("plain", bias=bias, **layer, **own, **eight)
    shifted = {"weight_symmetric": False, "activation": "relu"}
    yield sample("dynamic", *all_three, bias=bias, **layer, **own, **four, **shifted)
    learned = {"weight_scale": o.scale, "weight_symmetric": True, "weight_grad_factor": 0.1}
    half = {"input": o.bf16, "weight": weight, "output_dtype": torch.float16}
    yield sample("learned weights", *two, "weight_scale", **half, **own, **four, **learned)
    yield sample("static", *two, **layer, **fixed, **eight)
    offset = {"input_scale": ONE, "input_offset": torch.tensor([0.3]), "input_grad_factor": 0.1}
    limits = {"input_qmin": -8, "input_qmax": 7, "input_symmetric": False, "activation": "relu"}
    steps = (*two, "input_scale", "input_offset")
    yield sample("learned activations", *steps, **layer, **offset, **limits, **eight)
    none = {"input": o.x[:0], "weight": weight}
    yield sample("no rows", *two, **none, **own, **eight)
