"""A new kind of layer, a new configuration and a new weight format, without an edit in the package.

This file defines all three, as another package would: a linear layer with one factor for all its
outputs (``Scaled``), activations that are clipped before each token's range is taken (``Clipped``),
and a weight format of two integers in a byte (``Nibbles``). Every verb, file and report then works
on them.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import assert_same_bits, generator
from torch import Tensor, nn

import torchquant
from torchquant import Dynamic, QuantizationConfig, TrainingConfig, Weights, functional
from torchquant.nn import QuantizedModule, TrainedModule
from torchquant.nn import kinds as table
from torchquant.nn.kinds import Kind, kinds, registered
from torchquant.nn.weight import WeightFormat
from torchquant.training.configuration import training_config

# ---------------------------------------------------------------- a configuration


@dataclass(frozen=True)
class Clipped(Dynamic):
    """Activations per token, clipped to [-bound, bound] before the token's range is taken."""

    bound: float = 4.0


CONFIG = QuantizationConfig(Weights(bits=4), Clipped(bound=2.0))

# ---------------------------------------------------------------- a weight format


class Nibbles(WeightFormat):
    """Integers of 4 bits; the canonical form has two in a byte, the packed form is by columns."""

    name = "nibbles"

    def canonical(self, shape: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.uint8, (shape[0], (shape[1] + 1) // 2)

    def pack(self, qweight: Tensor) -> Tensor:
        return qweight.t().contiguous()

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return packed.t().contiguous()


def to_nibbles(integers: Tensor) -> Tensor:
    even = nn.functional.pad(integers, (0, integers.shape[1] % 2)).to(torch.uint8)
    return even[:, ::2] & 15 | even[:, 1::2] << 4


def from_nibbles(nibbles: Tensor, columns: int) -> Tensor:
    both = torch.stack([nibbles & 15, nibbles >> 4], -1).reshape(nibbles.shape[0], -1)
    signed = torch.where(both > 7, both.to(torch.int8) - 16, both.to(torch.int8))
    return signed[:, :columns]


# ---------------------------------------------------------------- a kind of layer


class Scaled(nn.Module):
    """``factor * (x @ weight.T)``."""

    def __init__(self, inputs: int, outputs: int, factor: float = 1.0) -> None:
        super().__init__()
        self.inputs, self.outputs, self.factor = inputs, outputs, factor
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * (x @ self.weight.T)


def computed(x: Tensor, q: Tensor, scale: Tensor, factor: float, config: Clipped) -> Tensor:
    """The computation of the quantized and of the trained layer."""
    clipped = x.clamp(-config.bound, config.bound)
    return factor * functional.linear_dynamic(clipped, q, scale, symmetric=config.symmetric)


def integers_of(weight: Tensor, part: Weights) -> tuple[Tensor, Tensor]:
    qmin, qmax = part.range
    found = functional.quantize_pack(weight.detach(), qmin=qmin, qmax=qmax)
    return found.q, found.scale


class QuantizedScaled(QuantizedModule):
    weight_format: ClassVar[WeightFormat] = Nibbles()
    stored: ClassVar[tuple[str, ...]] = ("inputs", "outputs", "factor")

    def __init__(
        self, inputs: int, outputs: int, factor: float, config: Any, device: Any = None
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.factor, self.config = inputs, outputs, factor, config
        self.register_weight(self.weight_format.empty(self.weight_shape, device))
        self.register_buffer("qweight_scale", torch.ones(outputs, device=device))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.outputs, self.inputs

    def canonical(self) -> Any:
        qweight = self.weight_format.canonical(self.weight_shape)
        return {"qweight": qweight, "qweight_scale": (torch.float32, (self.outputs,))}

    @classmethod
    def config_refusal(cls, config: QuantizationConfig) -> str | None:
        fits = isinstance(config.activations, Clipped) and config.weights.bits == 4
        return None if fits else "scaled layers need Clipped activations and weights of 4 bits"

    @classmethod
    def from_float(cls, module: Any, config: QuantizationConfig | None = None) -> Any:
        layer = cls(module.inputs, module.outputs, module.factor, config or CONFIG)
        q, layer.qweight_scale = integers_of(module.weight, layer.config.weights)
        layer.packed = cls.weight_format.pack(to_nibbles(q))
        return layer.train(module.training)

    def to_float(self) -> nn.Module:
        module = Scaled(self.inputs, self.outputs, self.factor)
        q = from_nibbles(self.qweight, self.inputs)
        module.weight = nn.Parameter(q * self.weight_scale[:, None])
        return module.train(self.training)

    def probe(self, rows: int, generator: torch.Generator) -> Tensor:
        return torch.randn((rows, self.inputs), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        q = from_nibbles(self.qweight, self.inputs)
        return computed(x, q, self.weight_scale, self.factor, self.config.activations)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor = layer.factor
        q, scale = integers_of(weight, layer.config.weights)
        return computed(x, q, scale, layer.factor, layer.config.activations)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0] * ctx.factor
        return grad @ weight, grad.T @ x, None


class TrainedScaled(TrainedModule):
    @classmethod
    def config_refusal(cls, config: TrainingConfig) -> str | None:
        return QuantizedScaled.config_refusal(config.deployed())

    @classmethod
    def from_float(cls, module: Any, config: Any = None) -> Any:
        layer = cls()
        layer.inputs, layer.outputs, layer.factor = module.inputs, module.outputs, module.factor
        layer.weight = module.weight
        layer.init_training(training_config("x", config or CONFIG), "none", module.weight.device)
        return layer.train(module.training)

    def to_quantized(self) -> QuantizedModule:
        layer: QuantizedModule = QuantizedScaled.from_float(self.to_float(), self.config.deployed())
        return layer

    def to_float(self) -> nn.Module:
        module = Scaled(self.inputs, self.outputs, self.factor)
        module.weight = self.weight
        return module.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self._quantizing:
            result: Tensor = StraightThrough.apply(x, self.weight, self)
            return result
        return self.factor * (x @ self.weight.T)


SCALED = Kind(
    name="scaled",
    float_types=(Scaled,),
    quantized=QuantizedScaled,
    trained=TrainedScaled,
    looks_like=lambda module: isinstance(module, Scaled),
    refusal=lambda module: None if type(module) is Scaled else "a subclass of Scaled",
    value_refusal=lambda module: None if module.weight.isfinite().all() else "NaN",
    too_small=lambda module: module.outputs < 8,
    weight_shape=lambda module: (module.outputs, module.inputs),
)

# ---------------------------------------------------------------- verbs, files, reports


class Model(nn.Module):
    """Layers of both kinds; the last one is too small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Scaled(33, 64, 0.5)
        self.middle = nn.Linear(64, 64)
        self.last = Scaled(64, 16, 2.0)
        self.small = Scaled(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.small(self.last(self.middle(self.first(x)).relu()))
        return result


X = torch.randn(6, 33, generator=generator(5))


@pytest.fixture(autouse=True)
def _kind() -> Iterator[None]:
    with registered(SCALED):
        yield
    assert SCALED not in kinds()


def quantized() -> Model:
    model = Model().eval()
    torchquant.quantize_(model, CONFIG)
    return model


def test_quantize() -> None:
    model = Model().eval()
    report = torchquant.quantize_(model, CONFIG)
    assert [(row.name, row.action, row.reason, row.shape) for row in report.layers] == [
        ("first", "quantized", "", (64, 33)),
        ("middle", "quantized", "", (64, 64)),
        ("last", "quantized", "", (16, 64)),
        ("small", "skipped", "too small to benefit", (4, 16)),
    ]
    assert "64 x 33" in str(report) and report.bytes_after < report.bytes_before
    assert isinstance(model.first, QuantizedScaled)
    assert model.half().first.weight_scale.dtype == torch.float32
    # A configuration that one kind cannot have leaves that kind in float, with the reason.
    other = Model()
    report = torchquant.quantize_(other, filter_fn=lambda *_: True)
    reasons = {row.name: row.reason for row in report.skipped}
    assert set(reasons) == {"first", "last", "small"}
    assert reasons["first"] == "scaled layers need Clipped activations and weights of 4 bits"
    with pytest.raises(ValueError, match="first: scaled layers need Clipped"):
        torchquant.quantize_(Model(), filter_fn=lambda *_: True, strict=True)
    with pytest.raises(ValueError, match=r"a bare Scaled, .*QuantizedScaled.from_float\(scaled, "):
        torchquant.quantize_(Scaled(8, 8), CONFIG)


def test_train_convert_verify() -> None:
    model = Model()
    weight = model.first.weight
    report = torchquant.prepare_qat_(model, CONFIG)
    assert [row.action for row in report.layers] == ["prepared"] * 3 + ["skipped"]
    assert isinstance(model.first, TrainedScaled) and model.first.weight is weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torchquant.qat.observe_(model)
    assert_same_bits(model.first(X).detach(), model.first.to_float()(X).detach())
    torchquant.qat.freeze_(model)
    trained = copy.deepcopy(model.eval())
    report = torchquant.convert_(model)
    assert [row.action for row in report.layers] == ["converted"] * 3 + ["skipped"]
    result = torchquant.verify(trained, model, [X, -X])
    assert result.exact and [row.name for row in result.layers] == ["first", "middle", "last"]
    with torch.no_grad():  # verify detects one changed bit of a weight
        model.last.packed[0, 0] ^= 1
    assert not torchquant.verify(trained, model, [X]).exact


@pytest.mark.parametrize("prepare", [False, True], ids=["quantize", "prepare_qat"])
def test_an_activation_that_a_kind_cannot_compute_stays(prepare: bool) -> None:
    """Layers of the new kind do not apply ``activation``, so no verb may fuse one into them."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(Scaled(33, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()).eval()

    changed, layer = model(), QuantizedScaled.from_float(model()[0])
    verb = torchquant.prepare_qat_ if prepare else torchquant.quantize_
    report = verb(changed, CONFIG)
    assert type(changed[1]) is nn.ReLU and changed[0].activation == "none"
    assert [fusion.layers for fusion in report.fusions if fusion.action == "fused"] == [("2",)]
    assert_same_bits(changed[:2](X).detach(), layer(X).relu())


def test_to_float() -> None:
    model = quantized()
    before = model(X)
    report = torchquant.to_float_(model)
    assert [row.action for row in report.layers] == ["restored"] * 3
    assert type(model.first) is Scaled
    assert (model(X) - before).abs().max() < 0.5 * before.abs().max()
    torchquant.quantize_(model, CONFIG)
    assert_same_bits(model(X), before)


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    torchquant.save(model, folder / "file")
    return torchquant.load(folder / "file", Model().eval())


def through_a_state_dict(model: nn.Module, folder: Path) -> nn.Module:
    other = quantized()
    with torch.no_grad():
        other.first.packed.zero_()
    other.load_state_dict(model.state_dict())
    return other


def through_meta(model: nn.Module, folder: Path) -> nn.Module:
    torchquant.save(model, folder / "file")
    return torchquant.load(folder / "file", Model().eval().to("meta"))


def through_torch_save(model: nn.Module, folder: Path) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded: nn.Module = torch.load(stream, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "save and load": reloaded,
    "load into meta": through_meta,
    "state_dict": through_a_state_dict,
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
    "to": lambda model, folder: copy.deepcopy(model).to("cpu", torch.float32),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies(make: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    model = quantized()
    other = make(model, tmp_path)
    assert_same_bits(other(X), model(X))
    assert other.first.config == CONFIG and other.first.factor == 0.5
    assert repr(other) == repr(model)


def test_the_state_is_canonical() -> None:
    state = quantized().first.state_dict()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "qweight": (torch.uint8, (64, 17)),
        "qweight_scale": (torch.float32, (64,)),
    }


def test_files_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    torchquant.save(quantized(), path)
    model = Model()
    model.first.factor = 3.0
    with pytest.raises(ValueError, match=r"'first' has factor=0\.5 in the file, 3\.0 in the model"):
        torchquant.load(path, model)
    with monkeypatch.context() as patched:
        patched.setattr(table, "_added", [])
        with pytest.raises(ValueError, match="embedding, embedding_bag, got 'scaled'"):
            torchquant.load(path, Model())


def test_a_kind_is_registered_once() -> None:
    with pytest.raises(ValueError, match="the name of a kind must be unique, got 'scaled' twice"):
        torchquant.nn.register(SCALED)
