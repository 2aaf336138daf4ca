"""torch.compile and torch.export: one graph, our operators opaque in it, their bits kept."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import ASYMMETRIC, CONFIGS, layer_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from torchquant import QuantizationConfig, load, quantize_, save
from torchquant.nn import QuantizedLinear

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

OPERATOR = torch.ops.torchquant.linear_dynamic.default


@pytest.fixture(autouse=True)
def _no_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(config: QuantizationConfig | None = None, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 4)
    )
    assert len(quantize_(net.eval(), config).quantized) == 2
    return net


def compiled(net: nn.Module, **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """A compiled module, in one graph, and the counter of its compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(net, fullgraph=True, backend=counter, **options), counter


class Taps(nn.Module):
    """A model that also returns the inputs and outputs of each quantized layer."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        taps = []
        for layer in self.net:
            before, x = x, layer(x)
            if isinstance(layer, QuantizedLinear):
                taps.append((before, x))
        return x, taps


# ---------------------------------------------------------------- compile


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aot_eager_has_the_bits_of_eager(config: QuantizationConfig, dtype: torch.dtype) -> None:
    net = model(config).to(dtype)
    call, counter = compiled(net)
    x = floats(5, 64, dtype=dtype)
    with torch.no_grad():
        assert_same_bits(call(x), net(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_fused_activations(activation: str) -> None:
    layer = layer_of(ASYMMETRIC, activation)
    call, _ = compiled(layer)
    x = floats(2, 3, 64)
    assert_same_bits(call(x).detach(), layer(x).detach())


def test_inductor_leaves_our_operators_their_bits() -> None:
    net = Taps(model(ASYMMETRIC))
    call = torch.compile(net, fullgraph=True)
    x = floats(5, 64)
    with torch.no_grad():
        out, taps = call(x)
        expected, _ = net(x)
        layers = [layer for layer in net.net if isinstance(layer, QuantizedLinear)]
        assert len(taps) == len(layers) == 2
        for layer, (before, after) in zip(layers, taps, strict=True):
            assert_same_bits(after, layer(before))
    torch.testing.assert_close(out, expected)


def test_inductor_in_training() -> None:
    net, x = model(), floats(5, 64)
    results = []
    for call in (net, torch.compile(net, fullgraph=True)):
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        out.square().sum().backward()
        assert leaf.grad is not None
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        assert len(grads) == len(list(net.parameters()))
        results.append([out.detach(), leaf.grad, *grads])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("frozen", [True, False])
def test_training_through_a_compiled_model(frozen: bool) -> None:
    net = model(ASYMMETRIC).train().requires_grad_(not frozen)
    call, counter = compiled(net)
    x, results = floats(5, 64), []
    for run in (net, call):
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.square().sum().backward()
        assert leaf.grad is not None
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        assert bool(grads) is not frozen
        results.append([out.detach(), leaf.grad, *grads])
    for eager, other in zip(*results, strict=True):
        assert_same_bits(other, eager)
    assert counter.frame_count == 1


def test_a_dynamic_batch_is_compiled_once() -> None:
    net = model()
    call, counter = compiled(net)
    x = floats(5, 64)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        assert_same_bits(call(x), net(x))
        for batch in (2, 3, 17, 100):
            other = floats(batch, 64, seed=batch)
            assert_same_bits(call(other), net(other))
    assert counter.frame_count == 1


def test_dynamic_tokens_and_batch() -> None:
    net = model(ASYMMETRIC)[:3]  # torch compiles a LayerNorm twice
    call, counter = compiled(net, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 7, 64), (3, 5, 64), (8, 2, 64)):
            x = floats(*shape)
            assert_same_bits(call(x), net(x))
    assert counter.frame_count == 1


def test_an_empty_batch_and_one_row() -> None:
    net = model()
    call, _ = compiled(net)
    with torch.no_grad():
        for batch in (4, 0, 1):
            x = floats(batch, 64)
            assert_same_bits(call(x), net(x))


def test_nothing_is_compiled_again_for_the_same_call() -> None:
    net = model()
    call, counter = compiled(net)
    with torch.no_grad():
        for seed in range(5):
            call(floats(5, 64, seed=seed))
    assert counter.frame_count == 1


def test_there_are_no_graph_breaks() -> None:
    explanation = torch._dynamo.explain(model())(floats(5, 64))
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1
    calls = [node.target for node in explanation.graphs[0].graph.nodes]
    assert calls.count(OPERATOR) == 2, "our operators must stay whole"


def test_autocast() -> None:
    layer, x = layer_of(), floats(5, 64)
    call, _ = compiled(layer)
    with torch.no_grad():
        assert call(x).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert call(x).dtype == dtype
                assert_same_bits(call(x), layer(x))
        assert call(x).dtype == torch.float32

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result: Tensor = layer(x)
            return result

    whole = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert_same_bits(whole(x).detach(), inside(x).detach())


def test_inference_mode() -> None:
    net, x = model(), floats(5, 64)
    call, _ = compiled(net)
    with torch.inference_mode():
        assert torch.equal(call(x), net(x))


def test_a_compiled_model_sees_new_weights(tmp_path: Path) -> None:
    net, other, x = model(seed=1), model(seed=2), floats(5, 64)
    call, counter = compiled(net)
    with torch.no_grad():
        first = call(x)
        expected = other(x)
        assert not torch.equal(first, expected)
        net.load_state_dict(other.state_dict())
        assert_same_bits(call(x), expected)
        assert counter.frame_count == 1, "in place: nothing to compile again"
        net.load_state_dict(model(seed=1).state_dict(), assign=True)
        assert_same_bits(call(x), first)
        save(other, tmp_path / "other.safetensors")
        load(tmp_path / "other.safetensors", net)
        assert_same_bits(call(x), expected)


def test_quantizing_a_compiled_model() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    call, _ = compiled(net)
    x = floats(5, 64)
    with torch.no_grad():
        call(x)
        report = quantize_(call)
        assert [layer.name for layer in report.quantized] == ["_orig_mod.0"]
        assert isinstance(net[0], QuantizedLinear)
        assert_same_bits(call(x), net(x))


def test_wrong_input_says_the_same() -> None:
    call = torch.compile(model(), backend="aot_eager")
    with pytest.raises(ValueError, match=r"in_features = 64, got \[3, 65\]"):
        call(torch.zeros(3, 65))
    with pytest.raises(TypeError, match="input must be float32, bfloat16 or float16, got float64"):
        call(torch.zeros(3, 64, dtype=torch.float64))


def test_a_deepcopy_of_a_model_that_was_compiled() -> None:
    net, x = model(), floats(5, 64)
    net.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = net(x)
        assert_same_bits(copy.deepcopy(net)(x), expected)


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_has_the_bits_of_eager(dynamic: bool, strict: bool) -> None:
    net, x = model(ASYMMETRIC), floats(5, 64)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(net, (x,), dynamic_shapes=shapes, strict=strict)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(OPERATOR) == 2
    batches = (5, 1, 2, 40) if dynamic else (5,)
    with torch.no_grad():
        for batch in batches:
            other = floats(batch, 64, seed=batch)
            assert_same_bits(program.module()(other), net(other))


def test_an_exported_program_on_disk() -> None:
    net, x = model(ASYMMETRIC), floats(5, 64)
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    weights = sum(layer.packed.numel() for layer in net if isinstance(layer, QuantizedLinear))
    assert len(file.getvalue()) < weights + 40_000, "each weight once"
    file.seek(0)
    loaded = torch.export.load(file)
    with torch.no_grad():
        for rows in (5, 9):
            other = floats(rows, 64, seed=rows)
            assert_same_bits(loaded.module()(other), net(other))


def test_decompositions_leave_our_operators_alone() -> None:
    net, x = model(), floats(5, 64)
    program = torch.export.export(net, (x,))
    with torch.no_grad():
        for table in (None, {}):
            lowered = program.run_decompositions(table)
            assert [node.target for node in lowered.graph.nodes].count(OPERATOR) == 2
            assert_same_bits(lowered.module()(x), net(x))


def test_export_of_a_model_in_bfloat16() -> None:
    net, x = model().to(torch.bfloat16), floats(5, 64, dtype=torch.bfloat16)
    program = torch.export.export(net, (x,))
    with torch.no_grad():
        assert_same_bits(program.module()(x), net(x))


def test_export_refuses_wrong_input() -> None:
    with pytest.raises(ValueError, match="in_features = 64"):
        torch.export.export(model(), (torch.zeros(3, 65),))
