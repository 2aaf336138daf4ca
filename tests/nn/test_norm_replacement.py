"""Replaced norms: the same results, the same module, and the way through every part of torch."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from support.norms import (
    ChannelsFirstLayerNorm,
    CohereLayerNorm,
    DebertaLayerNorm,
    GatedRMSNorm,
    GemmaRMSNorm,
    LlamaRMSNorm,
    NemotronLayerNorm,
    OlmoLayerNorm,
    T5LayerNorm,
    TimmLayerNorm,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import torchquant
from torchquant.graph.purity import is_pure
from torchquant.nn import ReplacedNorm, norm_replacement
from torchquant.nn.norm_replacement import recipe_of

NORMS: list[Callable[[], nn.Module]] = [
    lambda: nn.LayerNorm(64),
    lambda: nn.LayerNorm(64, bias=False),
    lambda: nn.LayerNorm(64, elementwise_affine=False),
    lambda: nn.RMSNorm(64, eps=1e-5),
    lambda: TimmLayerNorm(64),
    lambda: NemotronLayerNorm(64),
    *[
        lambda cls=cls: cls(64)  # type: ignore[misc]
        for cls in (
            LlamaRMSNorm,
            T5LayerNorm,
            GemmaRMSNorm,
            CohereLayerNorm,
            OlmoLayerNorm,
            DebertaLayerNorm,
            GatedRMSNorm,
        )
    ],
]
INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that replaced norms have run."""
    found: list[str] = []
    for name in ("_fast_rms_norm", "_fast_layer_norm"):
        operator = getattr(norm_replacement, name)

        def counted(*arguments: Any, name: str = name, operator: Any = operator) -> Any:
            result = operator(*arguments)
            found.append(name)
            return result

        monkeypatch.setattr(norm_replacement, name, counted)
    return found


def random_norm(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    norm = make()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.7, 0.4)
    return norm


def replaced(norm: nn.Module) -> Any:
    report = torchquant.replace_norms_(norm)
    assert report.norms[0].action == "replaced", str(report)
    return norm


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", NORMS, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("of_norm", [torch.float32, torch.bfloat16, torch.float64])
def test_results_and_errors(
    make: Callable[[], nn.Module], of_norm: torch.dtype, training: bool
) -> None:
    norm = random_norm(make).to(of_norm).train(training)
    sizes = torch.logspace(-2, 2, 4)[:, None]
    new = copy.deepcopy(norm)
    torchquant.replace_norms_(new)  # most of the time of this test: once for all inputs
    shapes = ((64,), (4, 64), (2, 4, 64), (1, 2, 4, 64), (1, 1, 2, 4, 64), (0, 64), (4, 8))
    for of_input, shape in itertools.product(INPUT_TYPES, shapes):
        x = torch.randn(shape)
        x = (x * sizes if len(shape) > 1 and shape[0] else x).to(of_input)
        try:
            expected = norm(x)
        except Exception as error:  # the same error, from the norm's own forward
            with pytest.raises(type(error)):
                new(x)
            continue
        unit = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(new(x), expected, rtol=4 * unit, atol=4 * unit)


@pytest.mark.parametrize("make", NORMS, ids=lambda make: type(make()).__name__)
def test_one_operator_is_run(make: Callable[[], nn.Module], calls: list[str]) -> None:
    norm = replaced(random_norm(make))
    argument = next(iter(inspect.signature(norm.forward).parameters))
    x = torch.randn(3, 64)
    assert torch.equal(norm(x), norm(**{argument: x}))
    assert len(calls) == 2
    norm.double()(x.double())
    assert len(calls) == 2


@pytest.mark.parametrize("make", NORMS, ids=lambda make: type(make()).__name__)
def test_gradients(make: Callable[[], nn.Module], calls: list[str]) -> None:
    norm, x = random_norm(make), torch.randn(5, 64)
    new = replaced(copy.deepcopy(norm))
    gradients = []
    for module in (norm, new):
        y = x.clone().requires_grad_()
        (module(y) * x).sum().backward()
        gradients.append([y.grad, *(p.grad for p in module.parameters())])
    assert len(calls) == 1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_the_dtype_of_the_output_stays() -> None:
    """Llama's norm with a float32 weight gives float32, whatever comes in."""
    norm = replaced(LlamaRMSNorm(64))
    x = torch.randn(2, 64)
    assert norm(x.bfloat16()).dtype == torch.float32
    assert norm(x.double()).dtype == torch.float64
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_other_arguments_run_the_forward_of_the_class(calls: list[str]) -> None:
    norm = GatedRMSNorm(64)
    x, gate = torch.randn(2, 64), torch.randn(2, 64)
    expected = norm(x, gate)
    replaced(norm)
    for got in (norm(x, gate), norm(x, gate=gate), norm(hidden_states=x, gate=gate)):
        assert torch.equal(got, expected)
    assert calls == []
    torch.testing.assert_close(norm(x, None), norm(x))
    assert calls == ["_fast_rms_norm"]


def test_what_models_read_stays() -> None:
    layer, llama = nn.LayerNorm(64), LlamaRMSNorm(64)
    for norm in (layer, llama):
        before = dir(norm), repr(norm), type(norm).__name__, type(norm).__module__
        signature = inspect.signature(norm.forward)
        replaced(norm)
        assert set(before[0]) <= set(dir(norm))
        assert (repr(norm), type(norm).__name__, type(norm).__module__) == before[1:]
        assert inspect.signature(norm.forward) == signature
    assert layer.normalized_shape == (64,)
    assert (layer.eps, layer.elementwise_affine, llama.variance_epsilon) == (1e-5, True, 1e-6)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        llama(torch.ones(64), other=1)


@pytest.mark.parametrize("size", [3, 64])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_channels_first(size: int, memory: Any) -> None:
    norm = random_norm(lambda: ChannelsFirstLayerNorm(size))
    x = torch.randn(2, size, 3, 64).to(memory_format=memory)
    new = replaced(copy.deepcopy(norm))
    expected, got = norm(x), new(x)
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got, expected)
    assert got.stride() == expected.stride()
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), got)
    for wrong in (torch.randn(2, size + 1, 3, 64), torch.randn(2, size), torch.randn(64)):
        with pytest.raises(RuntimeError):
            new(wrong)


def test_a_replaced_norm_only_computes_as_before() -> None:
    """Layers are computed together across a norm, as across Qwen3's q_norm."""
    for norm in (LlamaRMSNorm(64), nn.LayerNorm(64)):
        before = is_pure(norm)
        assert is_pure(replaced(norm)) == before
    assert before


def test_strides_stay() -> None:
    norm = LlamaRMSNorm(64)
    x = torch.randn(3, 2, 64).transpose(0, 1)
    strides = norm(x).stride()
    assert strides == x.stride()
    assert replaced(norm)(x).stride() == strides


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: setattr(norm, "variance_epsilon", 0.5),
        lambda norm: setattr(norm, "weight", nn.Parameter(torch.full((1,), 3.0))),
        lambda norm: setattr(norm, "weight", nn.Parameter(torch.full((64,), 3.0))),
        lambda norm: norm._parameters.update(weight=nn.Parameter(torch.full((1, 64), 3.0))),
        lambda norm: setattr(norm.weight, "data", torch.full((64,), 3.0)),
        lambda norm: norm.load_state_dict({"weight": torch.zeros(64)}, assign=True),
        lambda norm: nn.utils.weight_norm(norm, dim=None),
        lambda norm: prune.l1_unstructured(norm, "weight", 0.5),
        lambda norm: parametrize.register_parametrization(norm, "weight", nn.Tanh()),
        lambda norm: setattr(norm, "forward", lambda x: x),
        lambda norm: norm.to(torch.bfloat16),
        lambda norm: norm.to(torch.float64),
    ],
)
def test_changes_that_come_later_have_their_effect(change: Callable[[nn.Module], Any]) -> None:
    norm = LlamaRMSNorm(64)
    new = replaced(copy.deepcopy(norm))
    x = torch.randn(3, 64)
    for module in (norm, new):
        change(module)
    torch.testing.assert_close(new(x), norm(x), rtol=1e-5, atol=1e-5)


def test_a_layer_norm_without_its_parameters() -> None:
    norm = replaced(random_norm(lambda: nn.LayerNorm(64)))
    norm.weight = norm.bias = None
    x = torch.randn(3, 64)
    assert torch.equal(norm(x), nn.functional.layer_norm(x, (64,)))
    affine = replaced(nn.LayerNorm(64, elementwise_affine=False))
    affine._parameters["weight"] = nn.Parameter(torch.full((64,), 2.0))
    torch.testing.assert_close(affine(x), 2 * nn.functional.layer_norm(x, (64,)))


def test_an_attribute_that_is_set_ends_the_replacement_until_the_verb_is_called_again(
    calls: list[str],
) -> None:
    norm = replaced(LlamaRMSNorm(64))
    norm.variance_epsilon = norm.variance_epsilon  # nothing new
    norm.train()
    norm(torch.ones(64))
    assert len(calls) == 1
    norm.variance_epsilon = 0.5
    norm(torch.ones(64))
    assert len(calls) == 1
    replaced(norm)(torch.ones(64))
    assert len(calls) == 2
    torchquant.restore_norms_(norm)
    assert type(norm) is LlamaRMSNorm


def test_marks_of_libraries_do_not_end_the_replacement(calls: list[str]) -> None:
    norm = replaced(FlaggedNorm(64))
    norm._hf_hook = norm._is_torch_compile = True
    norm(torch.ones(64))
    assert len(calls) == 1
    norm._double = True
    assert torch.equal(norm(torch.ones(64)), FlaggedNorm.forward(norm, torch.ones(64)))
    assert len(calls) == 1


class FlaggedNorm(LlamaRMSNorm):
    _double: ClassVar[bool] = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (2 if self._double else 1)


def test_undo_of_a_parametrized_norm() -> None:
    norm = replaced(LlamaRMSNorm(64))
    x = torch.randn(3, 64)
    parametrize.register_parametrization(norm, "weight", nn.Tanh())
    torchquant.restore_norms_(norm)
    own = LlamaRMSNorm(64)
    own.weight = nn.Parameter(norm.weight.detach())
    torch.testing.assert_close(norm(x), own(x))
    parametrize.remove_parametrizations(norm, "weight")
    torchquant.restore_norms_(norm)
    assert type(norm) is LlamaRMSNorm


def test_meta(calls: list[str]) -> None:
    norm = replaced(nn.LayerNorm(64)).to("meta")
    assert norm(torch.ones(2, 64, device="meta")).shape == (2, 64)


def stored(norm: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, copy.copy, stored, lambda norm: pickle.loads(pickle.dumps(norm))]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "copy", "save", "pickle"])
def test_copies_are_replaced_norms(copied: Callable[[Any], Any], calls: list[str]) -> None:
    norm = replaced(LlamaRMSNorm(64))
    new = copied(norm)
    x = torch.randn(2, 64)
    assert type(new) is type(norm)
    assert torch.equal(new(x), norm(x))
    assert len(calls) == 2
    torchquant.restore_norms_(new)
    assert isinstance(norm, ReplacedNorm)
    assert type(new) is LlamaRMSNorm


def test_a_class_that_pickles_itself() -> None:
    norm = replaced(SelfPickledNorm(64))
    assert type(copy.deepcopy(norm)) is SelfPickledNorm


class SelfPickledNorm(LlamaRMSNorm):
    def __reduce__(self) -> Any:
        return SelfPickledNorm, (64,)


class RegisteredNorm(LlamaRMSNorm):
    names: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        RegisteredNorm.names.append(cls.__name__)


def test_registries_of_subclasses_stay() -> None:
    replaced(RegisteredNorm(64))
    assert RegisteredNorm.names == []


def test_transforms_of_functions() -> None:
    norm = replaced(nn.LayerNorm(64))
    own, x = nn.LayerNorm(64), torch.randn(3, 64)

    def loss(module: nn.Module, weight: Tensor) -> Tensor:
        values = {"weight": weight, "bias": module.bias.detach()}
        result: Tensor = torch.func.functional_call(module, values, (x,)).square().sum()
        return result

    weight = torch.randn(64)
    torch.testing.assert_close(
        torch.func.grad(lambda w: loss(norm, w))(weight),
        torch.func.grad(lambda w: loss(own, w))(weight),
    )
    torch.testing.assert_close(torch.func.jvp(norm, (x,), (x,)), torch.func.jvp(own, (x,), (x,)))
    torch.testing.assert_close(torch.vmap(norm)(x), own(x))


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(64), lambda: GemmaRMSNorm(64)])
def test_traces_contain_the_operator(make: Callable[[], nn.Module]) -> None:
    norm = replaced(random_norm(make))
    model, x = nn.Sequential(norm), torch.randn(3, 64)
    expected = norm(x)
    program = torch.export.export(model, (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "norm" in name] == [
        f"torchquant.{recipe_of(norm).family}_norm.default"  # type: ignore[union-attr]
    ]
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)  # type: ignore[no-untyped-call]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)


def test_symbolic_traces_and_scripts_see_the_norm_of_the_class() -> None:
    model = nn.Sequential(nn.LayerNorm(64))
    before = torch.fx.symbolic_trace(model).code
    replaced(model[0])
    x = torch.randn(3, 64)
    assert torch.fx.symbolic_trace(model).code == before
    scripted = torch.jit.script(copy.deepcopy(model))
    torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.parametrize("make", NORMS, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16])
def test_autocast(make: Callable[[], nn.Module], of_input: torch.dtype) -> None:
    norm = random_norm(make)
    new = replaced(copy.deepcopy(norm))
    x = torch.randn(3, 64).to(of_input)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = norm(x), new(x)
    assert got.dtype == expected.dtype
    unit = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=4 * unit, atol=4 * unit)
