"""Modules and verbs on a GPU."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.gpu_modules import (
    CUDA,
    devices_of,
)
from support.layers import CONFIGS, assert_same_state, float_layer, layer_of
from torch import Tensor, nn

import torchquant.nn.projections as projections
from torchquant import (
    Int8StaticActivationInt8WeightConfig,
    convert_,
    load,
    ops,
    prepare_qat_,
    quantize_,
    replace_norms_,
    save,
    verify,
)
from torchquant.nn import QuantizedLinear
from torchquant.ops._arguments import packed_shape

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # A kernel that fails leaves its operator to ATen with a message: here that is a failure.
    pytest.mark.filterwarnings("error:torchquant:RuntimeWarning"),
]


def static_layer() -> QuantizedLinear:
    config = Int8StaticActivationInt8WeightConfig()
    zero_point = torch.tensor([3], dtype=torch.int32)
    return QuantizedLinear.from_float(
        float_layer(37, 100), config, input_scale=torch.tensor([0.02]), input_zero_point=zero_point
    )


LAYERS: dict[str, Callable[[], QuantizedLinear]] = {
    **{name: lambda c=config: layer_of(c, "gelu") for name, config in CONFIGS.items()},  # type: ignore[misc]
    "odd": lambda: layer_of(out_features=37, in_features=101, bias=False),
    "tiny": lambda: layer_of(out_features=1, in_features=1),
    "wide": lambda: layer_of(out_features=1000, in_features=40000),
    "static": static_layer,
}


class Block(nn.Module):
    """What models are made of: a norm, layers on one tensor, a residual; no product of torch's."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.q, self.k, self.v = (
            nn.Linear(size, 128),
            nn.Linear(size, 64, False),
            nn.Linear(size, 64),
        )
        self.relu, self.down = nn.ReLU(), nn.Linear(256, size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y: Tensor = self.down(self.relu(torch.cat([self.q(h), self.k(h), self.v(h)], -1)))
        return x + y


def quantized_block() -> Block:
    torch.manual_seed(0)
    model = Block().eval()
    replace_norms_(model)  # ours are exact on every device
    quantize_(model)
    return model


# ---------------------------------------------------------------- QuantizedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_goes_to_the_gpu_and_back(
    make: Callable[[], QuantizedLinear], dtype: torch.dtype
) -> None:
    layer = make()
    twin, packed = copy.deepcopy(layer), layer.packed.clone()
    x = floats(3, 5, layer.in_features, dtype=dtype)
    expected = twin(x).detach()
    layer.cuda()
    assert devices_of(layer) == {CUDA}
    assert tuple(layer.packed.shape) == packed_shape(layer.out_features, layer.in_features, CUDA)
    for rows in (x, x[0, :1], x[:0]):
        assert_same_bits(layer(rows.to(CUDA)).detach().cpu(), twin(rows).detach())
    with torch.inference_mode():
        assert_same_bits(layer(x.to(CUDA)).cpu(), expected)
    assert_same_bits(copy.deepcopy(layer)(x.to(CUDA)).detach().cpu(), expected)
    layer.cpu()
    assert torch.equal(layer.packed, packed)
    assert_same_state(layer, twin)


def test_gradients_reach_the_input() -> None:
    layer, x = layer_of(activation="gelu"), floats(5, 64)
    grads = []
    for device in ("cpu", CUDA):
        layer.to(device)
        rows = x.detach().to(device).requires_grad_()
        layer(rows).square().sum().backward()
        assert rows.grad is not None
        grads.append(rows.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_between_devices(assign: bool) -> None:
    source = layer_of(CONFIGS["asymmetric"])
    x = floats(4, 64)
    state = {key: value.clone() for key, value in source.state_dict().items()}
    there = layer_of(CONFIGS["asymmetric"], seed=5).to(CUDA)
    there.load_state_dict({key: value.to(CUDA) for key, value in state.items()}, assign=assign)
    assert devices_of(there) == {CUDA}
    assert_same_bits(there(x.to(CUDA)).detach().cpu(), source(x).detach())
    assert all(torch.equal(value.cpu(), state[key]) for key, value in there.state_dict().items())
    there.load_state_dict(state, assign=assign)  # from the CPU; assigned, it is there
    assert devices_of(there) == {torch.device("cpu") if assign else CUDA}
    assert_same_bits(there(x.to(there.packed.device)).detach().cpu(), source(x).detach())


def test_from_meta_onto_the_gpu() -> None:
    source = layer_of()
    layer = layer_of(seed=3).to("meta").to_empty(device=CUDA)
    layer.load_state_dict(source.state_dict())
    x = floats(4, 64)
    assert_same_bits(layer(x.to(CUDA)).detach().cpu(), source(x).detach())
    assert QuantizedLinear(64, 32, device="cuda").packed.device == CUDA


def test_pickled_on_one_device_and_read_on_another() -> None:
    model = quantized_block()
    x = floats(4, 64)
    expected = model(x).detach()
    model.to(CUDA)
    copied = pickle.loads(pickle.dumps(model))
    assert devices_of(copied) == {CUDA}
    assert_same_bits(copied(x.to(CUDA)).detach().cpu(), expected)
    for source, target in ((CUDA, "cpu"), ("cpu", "cuda:0"), (CUDA, "cuda:0")):
        file = io.BytesIO()
        torch.save(model.to(source), file)
        file.seek(0)
        loaded = torch.load(file, map_location=target, weights_only=False)
        assert devices_of(loaded) == {torch.device(target)}
        assert_same_bits(loaded(x.to(target)).detach().cpu(), expected)


@pytest.mark.parametrize("layer", [layer_of, static_layer], ids=["dynamic", "static"])
def test_errors_are_in_the_words_of_a_layer(layer: Callable[[], QuantizedLinear]) -> None:
    module = layer().to(CUDA)
    k = module.in_features
    x = floats(2, k - 1)
    with pytest.raises(ValueError, match=f"in_features = {k}, got"):  # padded, it would fit
        module(x.to(CUDA))
    with pytest.raises(ValueError, match="layer's device cuda:0, got one on cpu; move one of them"):
        module(floats(2, k))
    with pytest.raises(ValueError, match="layer's device cpu, got one on cuda:0; move one of them"):
        module.cpu()(floats(2, k).to(CUDA))
    with pytest.raises(TypeError, match="input"):
        module.to(CUDA)(torch.zeros(2, k, dtype=torch.float64, device=CUDA))


def test_autocast() -> None:
    for layer in (layer_of(), static_layer()):
        x = floats(3, layer.in_features)
        with torch.autocast("cpu", torch.bfloat16):
            expected = layer(x)
        layer.to(CUDA)
        with torch.autocast("cuda", torch.bfloat16):
            output = layer(x.to(CUDA))
        assert output.dtype == torch.bfloat16
        assert_same_bits(output.detach().cpu(), expected.detach())
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x.to(CUDA)).dtype == torch.float32


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_gpus() -> None:
    layer, x = layer_of(), floats(4, 64)
    expected = layer(x).detach()
    for index in (0, 1, 0):
        device = torch.device("cuda", index)
        assert devices_of(layer.to(device)) == {device}
        assert_same_bits(layer(x.to(device)).detach().cpu(), expected)
    with pytest.raises(ValueError, match="layer's device cuda:0, got one on cuda:1"):
        layer(x.to("cuda:1"))


# ---------------------------------------------------------------- verbs


def test_a_model_is_quantized_where_it_is() -> None:
    torch.manual_seed(0)
    here = Block().eval()
    there = copy.deepcopy(here).to(CUDA)
    reports = []
    for model in (here, there):
        assert len(replace_norms_(model).replaced) == 1
        reports.append(quantize_(model))
    assert devices_of(there) == {CUDA}
    assert str(reports[0].fusions) == str(reports[1].fusions)
    assert "fused: q, k, v: one product" in map(str, reports[1].fusions)
    x = floats(5, 64)
    with torch.inference_mode():
        assert_same_bits(there(x.to(CUDA)).cpu(), here(x))
    assert_same_state(there.cpu(), here)


def test_activations_are_fused_on_the_gpu() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(CUDA).eval()
    report = quantize_(model)
    assert [str(fusion) for fusion in report.fusions] == ["fused: 0 with 1 (gelu)"]


def test_memory_after_conversion() -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    here = copy.deepcopy(model)
    quantize_(here)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(CUDA)
    model.to(CUDA)
    quantize_(model)
    gc.collect()
    wanted = sum(tensor.nbytes for tensor in (*here.parameters(), *here.buffers()))
    assert torch.cuda.memory_allocated(CUDA) - before < 1.02 * wanted
    model.cpu()
    gc.collect()
    assert torch.cuda.memory_allocated(CUDA) == before
    here.to(CUDA)
    assert torch.cuda.memory_allocated(CUDA) - before < 1.02 * wanted


def test_files(tmp_path: Path) -> None:
    model, x = quantized_block(), floats(4, 64)
    save(model, tmp_path / "here")
    with torch.device("meta"):
        empty = Block().eval()
    there = load(tmp_path / "here", empty, device="cuda")
    assert devices_of(there) == {CUDA}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(CUDA)
    save(there, tmp_path / "there")
    qweights = [m.qweight.nbytes for m in there.modules() if isinstance(m, QuantizedLinear)]
    assert torch.cuda.max_memory_allocated(CUDA) - before < sum(qweights), "one at a time"
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    replace_norms_(there)
    with torch.inference_mode():
        assert_same_bits(there(x.to(CUDA)).cpu(), model(x))
    assert devices_of(load(tmp_path / "here", there)) == {torch.device("cpu")}


# ---------------------------------------------------------------- layers computed together


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    split = projections._split

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[5]))
        return split(*arguments)

    monkeypatch.setattr(projections, "_split", counted)
    return calls


def test_projections(shared: list[int]) -> None:
    model, x = quantized_block(), floats(5, 64)
    with torch.inference_mode():
        expected = model(x)
    for move in ("cuda", "cpu", CUDA):
        model.to(move)
        assert model.q._group is not None
        assert model.q._group.active
        with torch.inference_mode():
            assert_same_bits(model(x.to(move)).cpu(), expected)
    assert shared == [3, 3, 3, 3]
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        assert_same_bits(copied(x.to(CUDA)).cpu(), expected)
        assert len(shared) == 5
        with torch.autocast("cuda", torch.bfloat16):
            model(x.to(CUDA))
        assert len(shared) == 5, "not under autocast"
        with pytest.raises(ValueError, match="in_features = 64"):
            model.q(torch.zeros(2, 63, device=CUDA))


def test_projections_on_a_stream_of_their_own(shared: list[int]) -> None:
    class Streams(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x), self.k(x)
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                v = self.v(x)
            torch.cuda.current_stream().wait_stream(self.side)
            return torch.cat([q, k, v], -1)

        side: Any = None

    model = quantized_block().to(CUDA)
    model.__class__ = Streams
    model.side = torch.cuda.Stream()
    assert model.q._group is not None
    model.q._group.codes = (Streams.forward.__code__,) * 3
    x = floats(5, 64)
    with torch.inference_mode():
        output = model(x.to(CUDA)).cpu()
        apart = [layer.cpu()(x) for layer in (model.q, model.k, model.v)]
    assert_same_bits(output, torch.cat(apart, -1))
    assert shared == [3]


def test_a_cuda_graph() -> None:
    model, x = quantized_block().to(CUDA), floats(6, 64).to(CUDA)
    rows, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        expected = model(x)
        model(rows)
        with torch.cuda.graph(graph):
            output = model(rows)
        rows.copy_(x)
        graph.replay()
        assert_same_bits(output.cpu(), expected.cpu())


def test_a_forward_does_not_wait(no_waiting: Any) -> None:
    models = [quantized_block().to(CUDA), static_layer().to(CUDA)]
    for model, k in zip(models, (64, 100), strict=True):
        x = floats(5, k).to(CUDA)
        with torch.inference_mode():
            model(x)
            with no_waiting:
                model(x)


# ---------------------------------------------------------------- verify


def test_verify_quantized_models_between_devices() -> None:
    model = quantized_block()
    there = copy.deepcopy(model).to(CUDA)
    report = verify(model, there, [floats(3, 64), (floats(2, 64),)])
    assert report.exact, str(report)
    assert "Devices: cpu (trained) and cuda:0 (converted)" in str(report)
    with torch.no_grad():
        there.down.bias[3] += 1
    for models in ((model, there), (there, model)):
        report = verify(*models, [floats(3, 64)])
        assert not report.exact
        assert report.first_difference is not None
        assert report.first_difference.layer == "down"


def test_random_operators_see_the_same_numbers_on_one_gpu() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + torch.rand_like(x))  # type: ignore[no-any-return]

    model = Noisy().to(CUDA)
    prepare_qat_(model)
    converted = copy.deepcopy(model)
    convert_(converted)
    before = torch.cuda.get_rng_state(CUDA)
    assert verify(model, converted, [floats(3, 64)]).exact
    assert torch.equal(before, torch.cuda.get_rng_state(CUDA))


def test_a_packed_weight_between_devices() -> None:
    weight = torch.randint(-128, 128, (20, 30), dtype=torch.int8)
    packed = ops.PackedWeight.pack(weight)
    x = torch.randint(-128, 128, (4, 30), dtype=torch.int8)
    scales = {"input_scale": 0.02, "weight_scale": 0.01}
    expected = ops.quantized_linear(x, packed, **scales)  # type: ignore[arg-type]
    there = packed.to("cuda")
    output = ops.quantized_linear(x.to(CUDA), there, **scales)  # type: ignore[arg-type]
    assert_same_bits(output.cpu(), expected)
    assert torch.equal(there.to("cpu").packed, packed.packed)
