"""Random forwards, as source, and the same forwards with the rounding of a plan written into them.

Each line of a forward is one step of an author: ``x3 = F.relu(x2)``. A line of the reference does
the same with plain torch, and rounds its result where the plan of the region says so. So the
reference is the original forward, run by Python line by line; no record takes part in it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchquant import functional
from torchquant.chains.operations import AdaptiveAvgPool, AvgPool
from torchquant.chains.region import RegionForward
from torchquant.functional import ACTIVATIONS

CHANNELS = 8
# A line: what the author writes, what the reference runs (None: the same), and how many calls of
# the record it is. {x} and {y} are values, {new} is the new one, {m} a layer of this line only.
Line = tuple[str, str | None, int]


def _function(source: str, name: str) -> Line:
    return f"{{new}} = {source}", f"{{new}} = R.activation('{name}', {{x}})", 1


def _same(source: str, calls: int = 1) -> Line:
    return f"{{new}} = {source}", None, calls


def _pool(source: str) -> Line:
    return f"{{new}} = {source}", f"{{new}} = R.average({{k}}, {{x}}, lambda: {source})", 1


POINTWISE: tuple[Line, ...] = (
    _function("F.relu({x})", "relu"),
    _function("torch.relu({x})", "relu"),
    _function("s.relu({x})", "relu"),
    _function("{x}.relu()", "relu"),
    _function("F.relu6({x})", "relu6"),
    _function("{x}.clamp(0, 6)", "relu6"),
    _function("F.hardtanh({x}, 0.0, 6.0)", "relu6"),
    _function("torch.clamp({x}, min=0)", "relu"),
    _function("F.silu({x})", "silu"),
    _function("F.gelu({x})", "gelu"),
    _function("F.gelu({x}, approximate='tanh')", "gelu_tanh"),
    _function("F.hardswish({x})", "hardswish"),
    _function("F.hardsigmoid({x})", "hardsigmoid"),
    _function("F.leaky_relu({x})", "leaky_relu"),
    _function("torch.tanh({x})", "tanh"),
    _function("{x}.sigmoid()", "sigmoid"),
    _same("F.leaky_relu({x}, 0.3)"),
    _same("F.mish({x})"),
    _same("F.softplus({x})"),
    _same("-{x}"),
    _same("{x} * 0.5"),
    _same("1 + {x}"),
    _same("{x}.clamp(-1, 2)"),
    _same("{x} + s.gain", 2),
    _same("{x}.contiguous()"),
    _same("s.same({x})"),
    _same("s.drop({x})"),
    _same("F.dropout({x}, 0.5, s.training)"),
    _same("{x}.detach()"),
    _same("{x}.float()"),
    _same("torch.where({x} > 0, {x}, 0.1)", 2),
    _same("{x}.view({x}.shape)", 2),
    _same("torch.cat([{x}], 1)"),
)
LAYERS: tuple[Line, ...] = (_same("s.{m}({x})"), _same("s.{m}({x})"), _same("s.shared({x})"))
IMAGES: tuple[Line, ...] = (
    _same("F.max_pool2d({x}, 3, 1, 1)"),
    _same("s.pool({x})"),
    _pool("F.avg_pool2d({x}, 3, 1, 1)"),
    _pool("F.avg_pool2d({x}, 3, stride=1, padding=1, count_include_pad=False)"),
    _same("torch.flip({x}, (3,))"),
    _same("{x}.transpose(2, 3).transpose(-1, -2)", 2),
    _same("{x}.reshape({x}.size(0), 8, {x}.size(2), -1)", 3),
    _same("{x}.flatten(2).view({x}.shape)", 3),
    _same("F.pad({x}, (1, 0, 0, 1))[:, :, 1:, :-1]", 2),
    _same("torch.cat({x}.chunk(2, 1)[::-1], 1)", 3),
    _same("s.norm({x})"),
)
SMALLER: tuple[Line, ...] = (
    _same("F.max_pool2d({x}, 2)"),
    _pool("F.avg_pool2d({x}, 2)"),
    _same("{x}[:, :, ::2, 1::2]"),
)
LARGER: tuple[Line, ...] = (
    _same("F.interpolate({x}, scale_factor=2)"),
    _same("F.interpolate({x}, scale_factor=2, mode='bilinear')"),
)
VECTORS: tuple[Line, ...] = (
    _pool("{x}.mean((2, 3))"),
    _same("{x}.amax((-1, -2))"),
)
POOLED: tuple[tuple[Line, ...], ...] = (
    (_pool("F.adaptive_avg_pool2d({x}, 1)"), _same("{x}.flatten(1)")),
    (_pool("s.mean({x})"), _same("{x}.view({x}.size(0), -1)", 2)),
    (_same("F.adaptive_max_pool2d({x}, 1)"), _same("s.flat({x})")),
    (_pool("F.adaptive_avg_pool2d({x}, (1, 1))"), _same("{x}.squeeze()")),
    (_pool("F.adaptive_avg_pool2d({x}, 1)"), _same("{x}.view(-1, 8)")),
)
GATES: tuple[Line, ...] = (
    _pool("F.adaptive_avg_pool2d({x}, 1)"),
    _pool("{x}.mean((2, 3), keepdim=True)"),
)
TWO: tuple[Line, ...] = (
    _same("{x} + {y}"),
    _same("torch.add({x}, {y})"),
    _same("{x} * {y}"),
    _same("torch.mul({x}, {y})"),
    _same("{x} - {y}"),
    _same("torch.add({x}, {y}, alpha=2)"),
    _same("torch.maximum({x}, {y})"),
)
# These change {x}; the reference rounds it in place.
IN_PLACE: tuple[Line, ...] = (
    ("{x}.mul_(0.7)", None, 1),
    ("{x}.add_(0.5)", None, 1),
    ("{new} = {x}.neg_()", "{new} = {x}; {x}.neg_()", 1),
    ("F.relu({x}, True)", "{x}.copy_(R.activation('relu', {x}))", 1),
    ("s.relu_({x})", "{x}.copy_(R.activation('relu', {x}))", 1),
    ("torch.relu_({x})", "{x}.copy_(R.activation('relu', {x}))", 1),
    ("F.silu({x}, inplace=True)", "{x}.copy_(R.activation('silu', {x}))", 1),
    ("F.elu({x}, inplace=True)", None, 1),
    ("{x} += 1", None, 1),
    ("{x} *= 0.5", None, 1),
)
IN_PLACE_TWO: tuple[Line, ...] = (
    ("{x} += {y}", None, 1),
    ("{x} *= {y}", None, 1),
    ("{x}.add_({y})", None, 1),
)


@dataclass
class Writer:
    """Writes a forward and its reference, line by line."""

    chance: random.Random
    lines: list[str] = field(default_factory=list)
    reference: list[str] = field(default_factory=list)
    # How often an image was made smaller; None: vectors [n, c]; -1: for the next line only.
    kinds: dict[str, int | None] = field(default_factory=dict)
    layers: list[tuple[str, str]] = field(default_factory=list)  # their names and kinds
    calls: int = 1  # the input is the first

    def write(self, line: Line, kind: int | None, x: str, y: str = "", layer: str = "conv") -> str:
        """Write a line; the new value has a kind. Returns its name."""
        source, reference, calls = line
        names = {"x": x, "y": y, "new": f"x{len(self.kinds)}"}
        for key in ("m", "w"):
            if f"{{{key}}}" in source:
                names[key] = f"layer{len(self.layers)}"
                self.layers.append((names[key], layer if key == "m" else f"wide {layer}"))
        known = any("s.gain" in line for line in self.lines)  # a parameter is recorded once
        self.calls += calls - ("s.gain" in source and known)
        last = self.calls - 1
        plain = source if reference is None else reference
        self.lines.append(source.format(**names))
        self.reference.append(plain.format(**names, k=last))
        changes = "{new}" not in plain or plain.startswith("{new} = {x};")
        if changes:
            self.reference.append(f"R.round_in_place({last}, {x})")
        else:
            self.reference.append("{0} = R.round({1}, {0})".format(names["new"], last))
        if "{new}" not in source:
            return x
        self.kinds[names["new"]] = kind
        return names["new"]

    def usual(self) -> list[int | None]:
        """The kinds of the values that any line may read."""
        return [kind for kind in self.kinds.values() if kind != -1]

    def some(self, kind: int | None, late: bool = False) -> str:
        """The name of a value of a kind; one of the last three if ``late``."""
        names = [name for name, own in self.kinds.items() if own == kind]
        return self.chance.choice(names[-3:] if late else names)


@dataclass(frozen=True)
class Written:
    """A forward: its source, the reference, and the layers that it calls, by name and kind."""

    source: str
    reference: str
    layers: tuple[tuple[str, str], ...]
    calls: int


def written(seed: int) -> Written:
    """A random forward."""
    chance = random.Random(seed)
    writer = Writer(chance)
    writer.kinds["x"] = 0
    if chance.random() < 0.8:
        writer.write(LAYERS[0], 0, "x")
    in_place = chance.random() < 0.4
    for _ in range(chance.randint(3, 10)):
        _write_one(writer, in_place)
    kind = writer.usual()[-1]
    last = writer.some(kind, late=True)
    layer = "linear" if kind is None else "conv"
    result = writer.write(LAYERS[0], kind, last, layer=layer)
    others = [name for name in writer.kinds if name not in ("x", result)]
    if others and chance.random() < 0.4:
        result = f"{result}, {chance.choice(others)}"
    names = ("def forward(s, x):", "def reference(s, x, R):\n    x = R.round(0, x)")
    bodies = ("\n    ".join(lines) for lines in (writer.lines, writer.reference))
    sources = [
        f"{name}\n    {body}\n    return {result}\n"
        for name, body in zip(names, bodies, strict=True)
    ]
    return Written(sources[0], sources[1], tuple(writer.layers), writer.calls)


def _write_one(writer: Writer, in_place: bool) -> None:
    chance = writer.chance
    kind = chance.choice(writer.usual()[-3:])
    layer = "linear" if kind is None else "conv"
    x, y = writer.some(kind, late=True), writer.some(kind)
    part = chance.random()
    layers = LAYERS[:2] if kind is None else LAYERS
    if in_place and part < 0.25 and x != "x":
        table, two = (IN_PLACE_TWO, True) if chance.random() < 0.4 else (IN_PLACE, False)
        if not two or x != y:
            writer.write(chance.choice(table), kind, x, y)
            return
    if part < 0.08:
        joined = writer.write(_same("torch.cat([{x}, {y}], 1)"), -1, x, y)
        writer.write(_same("s.{w}({x})"), kind, joined, layer=layer)
    elif part < 0.35:
        writer.write(chance.choice(TWO), kind, x, y, layer=layer)
    elif part < 0.6:
        writer.write(chance.choice(layers), kind, x, layer=layer)
    elif part < 0.8 or kind is None:
        lines = [line for line in POINTWISE if kind is not None or "gain" not in line[0]]
        writer.write(chance.choice(lines), kind, x)
    elif part < 0.9:
        writer.write(chance.choice(IMAGES), kind, x)
    elif part < 0.94:
        gate = writer.write(chance.choice(GATES), -1, x)
        gate = writer.write(POINTWISE[15], -1, gate)
        writer.write(chance.choice(TWO[2:4]), kind, *chance.sample([x, gate], 2))
    elif part < 0.97:
        if kind < 2:
            writer.write(chance.choice(SMALLER), kind + 1, x)
        else:
            writer.write(chance.choice(LARGER), kind - 1, x)
    elif chance.random() < 0.4:
        writer.write(chance.choice(VECTORS), None, x)
    else:
        first, second = chance.choice(POOLED)
        pooled = writer.write(first, -1, x)
        writer.write(second, None, pooled)


class Holder(nn.Module):
    """The layers of a random forward."""

    def __init__(self, layers: tuple[tuple[str, str], ...]) -> None:
        super().__init__()
        c = CHANNELS
        self.shared = nn.Conv2d(c, c, 1)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.same, self.drop = nn.Identity(), nn.Dropout(0.3)
        self.pool, self.mean = nn.MaxPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(1)
        self.flat, self.norm = nn.Flatten(), nn.GroupNorm(2, c)
        self.gain = nn.Parameter(torch.rand(1, c, 1, 1))
        for place, (name, kind) in enumerate(layers):
            inputs = 2 * c if "wide" in kind else c
            if "linear" in kind:
                setattr(self, name, nn.Linear(inputs, c))
                continue
            groups = c if place % 3 == 1 and inputs == c else 1
            setattr(self, name, nn.Conv2d(inputs, c, 3, padding=1, groups=groups))


def module_of(seed: int) -> tuple[nn.Module, Callable[..., Any], Written]:
    """A module with a random forward, and the reference of this forward."""
    made = written(seed)
    variables: dict[str, Any] = {"F": F, "torch": torch, "__name__": "random_forward"}
    exec(made.source + made.reference, variables)
    torch.manual_seed(seed)
    cls = type("Random", (Holder,), {"forward": variables["forward"], "__module__": __name__})
    return cls(made.layers).eval(), variables["reference"], made


class Rounding:
    """What a reference does besides the lines of the author; ``R`` in its source."""

    def __init__(self, region: RegionForward) -> None:
        assert region.plan is not None and region.facts is not None
        self.region, self.plan = region, region.plan
        self.ranks = [None if shape is None else len(shape) for shape in region.facts.shapes]

    def round(self, call: int, value: Any) -> Any:
        """The value, or a rounded one if it is int8 and does not only move integers."""
        if call not in self.plan.points:
            return value
        edge = self.plan.edge_of[call]
        scale, zero_point = self.region.edge_qparams(edge)
        qmin, qmax = self.plan.edges[edge].range
        integers = torch.round(value * (1 / scale)).clamp(qmin - zero_point, qmax - zero_point)
        y = integers * scale
        # Sums of float values depend on the memory format, which has to be that of the operator.
        last = y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)
        return y if last else y.contiguous()

    def round_in_place(self, call: int, value: Tensor) -> None:
        """Round a value that was changed in place."""
        if call in self.plan.points:
            value.copy_(self.round(call, value))

    def activation(self, name: str, value: Tensor) -> Tensor:
        """An activation with the bits that the package promises."""
        return functional.activation(value, name) if name in ACTIVATIONS else NotImplemented

    def average(self, call: int, value: Tensor, real: Callable[[], Tensor]) -> Tensor:
        """Averages of integers and, in a fixed order, of floats, where a step computes them."""
        operation = self.plan.operations[call]
        group = next((g for g in self.plan.groups.values() if call in g.calls), None)
        if group is None or not isinstance(operation, (AvgPool, AdaptiveAvgPool)):
            return real()
        operand = group.operands[0]
        if value.dim() != self.ranks[operand]:
            return real()
        flat = getattr(operation, "flat", False)
        if operand not in self.plan.edge_of:
            if isinstance(operation, AvgPool):
                y = functional.float_avg_pool(value, *vars(operation).values())
            else:
                y = functional.float_adaptive_avg_pool(value, operation.size)
            return y.flatten(1) if flat else y
        scale, zero_point = self.region.edge_qparams(self.plan.edge_of[operand])
        integers = (torch.round(value / scale) + zero_point).to(torch.int8)
        if isinstance(operation, AvgPool):
            y = functional.int8_avg_pool(integers, scale, zero_point, *vars(operation).values())
        else:
            y = functional.int8_adaptive_avg_pool(integers, scale, zero_point, operation.size)
        return y.flatten(1) if flat else y


__all__ = ["CHANNELS", "Rounding", "Written", "module_of", "written"]
