"""Layers compute more than their own output where nobody can notice it: a count of the work."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import assert_same_bits
from support.projections import Attention, Calls, GatedMLP, gradients_off, shared
from support.situations import APART, WIDTH, Activated, Projected, X, make
from torch import Tensor, nn

from torchquant import convert_, prepare_qat_, quantize_
from torchquant.nn import linear, linear_layer, projections, qat_linear

__all__ = ["gradients_off", "shared"]


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that layers applied for the activations after them."""
    found: list[str] = []

    def counted(mark: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(output: Tensor, place: Any) -> Tensor:
            found.append(place.function)
            return mark(output, place)

        return wrapper

    for module in (linear_layer, projections, qat_linear):
        monkeypatch.setattr(module, "mark", counted(module.mark))
    return found


@pytest.fixture(params=["grad", "no_grad", "inference_mode"])
def any_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad}
    with modes.get(request.param, torch.inference_mode)():
        yield


class Variable(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        h = self.act(h)
        return h


class OtherVariable(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        y = self.act(h)
        self.seen.append(y)
        return y


class Residual(Activated):
    def forward(self, x: Tensor) -> Any:
        return x + self.act(self.fc(x))


class Normed(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.act(self.fc(self.norm(x)))


class InALoop(Activated):
    def forward(self, x: Tensor) -> Any:
        for _ in range(1):
            x = self.act(self.fc(x))
        return x


class InAContainer(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleDict({"fc": nn.Linear(WIDTH, WIDTH), "act": nn.GELU()})

    def forward(self, x: Tensor) -> Any:
        return self.items["act"](self.items["fc"](x))


class InASequential(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self._modules.pop("fc"), self._modules.pop("act"))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class OtherMethod(Activated):
    def forward(self, x: Tensor) -> Any:
        return self.work(x)

    @torch.no_grad()
    def work(self, x: Tensor) -> Any:
        return self.act(self.fc(x))


class AfterSuper(Activated):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class InBranches(Activated):
    def forward(self, x: Tensor, pre: bool = False) -> Any:
        if pre:
            return self.fc(x)
        return self.act(self.fc(x))


class InPlace(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU(inplace=True)


class Generated(Activated):
    def parts(self, x: Tensor) -> Iterator[Tensor]:
        yield self.act(self.fc(x))

    def forward(self, x: Tensor) -> Any:
        return next(self.parts(x))


APPLIED = [
    *(Activated, Variable, OtherVariable, Residual, Normed, InALoop, InAContainer),
    *(InASequential, OtherMethod, AfterSuper, InBranches, Generated),
]


@pytest.mark.parametrize("kind", APPLIED)
def test_a_layer_applies_the_activation(
    kind: type[Activated], marks: list[str], any_mode: None
) -> None:
    model, apart = make(kind), make(kind)
    quantize_(model)
    quantize_(apart, fusion=APART)
    assert torch.allclose(model(X), apart(X), rtol=1e-5, atol=1e-5)
    assert marks == ["gelu"]


@pytest.mark.parametrize("kind", APPLIED)
def test_a_trained_layer_applies_the_relu(kind: type[Activated], marks: list[str]) -> None:
    model = make(kind, relu=True).train()
    prepare_qat_(model)
    model(X)
    assert marks == ["relu"]
    convert_(model)
    with torch.no_grad():
        model(X)
    assert marks == ["relu"] * 2


def test_the_second_call_is_the_first_one_again(marks: list[str]) -> None:
    model = make(Variable)
    quantize_(model)
    outputs = [model(X) for _ in range(5)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert marks == ["gelu"] * 5


def test_hooks_stop_it_and_their_removal_permits_it_again(marks: list[str]) -> None:
    model = make(Activated)
    quantize_(model)
    for module in (model.fc, model.act):
        handle = module.register_forward_hook(lambda *args: None)
        model(X)
        assert marks == []
        handle.remove()
    model(X)
    assert marks == ["gelu"]


def test_the_activation_that_the_layer_applied_does_not_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchquant.nn import replaced_activation

    calls: list[str] = []

    def counted(input: Tensor, function: str) -> Tensor:
        calls.append(function)
        return torch.zeros_like(input)

    model = make(Activated)
    quantize_(model)
    expected = model(X)
    monkeypatch.setattr(replaced_activation, "_fast_activation", counted)
    assert_same_bits(model(X), expected)
    assert calls == []
    assert not model.act(X).any()
    assert calls == ["gelu"]


@pytest.mark.parametrize("kind", [Activated, Variable, Residual, InASequential])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tensor_carries_no_mark_afterwards(kind: type[Activated], dtype: torch.dtype) -> None:
    model = make(kind).to(dtype)
    quantize_(model)
    assert not getattr(model(X.to(dtype)), "__dict__", None)


class ThreeWithViews(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(WIDTH, WIDTH)
        self.scale, self.heads = 0.5, 4

    def forward(self, x: Tensor) -> Any:
        shape = (*x.shape[:-1], -1, 16)
        q = self.q(x).view(shape).transpose(-3, -2) * self.scale
        k = self.k(x).reshape(4, self.heads, -1).contiguous()
        v = self.v(x).view(shape).transpose(1, 2)
        return q, k, v


class WithNorms(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.q(x)), self.norm(self.k(x))


class Packed(Projected):
    def forward(self, x: Tensor) -> Any:
        return [self.q(x), self.k(x)]


@pytest.mark.parametrize(
    ("kind", "products"), [(Projected, [2]), (ThreeWithViews, [3]), (WithNorms, [2]), (Packed, [2])]
)
def test_layers_are_computed_together(
    kind: type[Projected],
    products: list[int],
    shared: Calls,
    gradients_off: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, apart = make(kind), make(kind)
    quantize_(model)
    quantize_(apart, fusion=APART)
    expected = apart(X)

    def alone(*args: Any) -> Tensor:
        raise AssertionError("a member computes its output a second time")

    monkeypatch.setattr(linear, "_fast_linear_dynamic", alone)
    for _ in range(5):
        for got, one in zip(model(X), expected, strict=True):
            assert_same_bits(got, one)
    assert shared == products * 5


def test_attention_and_gated_layers(shared: Calls, marks: list[str], gradients_off: None) -> None:
    x = torch.randn(2, 5, 64)
    for model in (Attention(), GatedMLP()):
        model.eval()
        quantize_(model)
        for _ in range(4):
            model(x)
    assert shared == [3] * 4 + [2] * 4
    assert marks == ["silu"] * 4


def test_gradients_keep_layers_apart(shared: Calls) -> None:
    model = make(Projected)
    quantize_(model)
    model(X)
    assert shared == []


@pytest.mark.parametrize("kind", [Activated, InASequential, Projected, Normed])
def test_a_compiled_model_is_one_graph(kind: type[nn.Module]) -> None:
    model = make(kind)
    quantize_(model)
    with torch.no_grad():
        expected = model(X)
        got = torch.compile(model, fullgraph=True, backend="eager")(X)
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for mine, eager in pairs:
        assert torch.allclose(mine, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make_activation", [nn.GELU, nn.SiLU, nn.ReLU])
def test_a_hook_changes_no_bit(
    dtype: torch.dtype, autocast: bool, make_activation: Callable[[], nn.Module], marks: list[str]
) -> None:
    """The bits do not depend on whether the layer or the module applies the activation."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), make_activation(), nn.Linear(WIDTH, WIDTH))
    model = model.to(dtype).eval()
    quantize_(model)
    x = X.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        expected = model(x)
        exact = make_activation is nn.ReLU or (dtype == torch.float32 and not autocast)
        assert bool(marks) == exact
        handle = model[0].register_forward_hook(lambda *args: None)
        del marks[:]
        assert_same_bits(model(x), expected)
        assert marks == []
        handle.remove()


@pytest.mark.few_rows
@pytest.mark.parametrize(("rows", "together"), [(1, False), (63, False), (64, True), (200, True)])
def test_few_rows_are_computed_apart(shared: Calls, rows: int, together: bool) -> None:
    model = Attention().eval()
    quantize_(model)
    with torch.no_grad():
        model(torch.randn(1, rows, 64))
    assert shared == ([3] if together else [])
