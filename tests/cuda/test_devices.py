"""Modules between devices, on a machine that pretends to have a GPU."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.devices import (
    HOST,
    on_cuda,
)
from support.layers import CONFIGS, assert_same_state, layer_of
from support.pretend import CUDA, Pretended, pretended_cuda, values
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torchquant.nn.linear_layer as linear_module
import torchquant.nn.projections as projections
from torchquant import (
    Int8StaticActivationInt8WeightConfig,
    ops,
    quantize_,
)
from torchquant.graph.call_sites import call_sites
from torchquant.nn import LayerNorm, QuantizedLinear, RMSNorm
from torchquant.ops._arguments import packed_shape


def static_layer() -> QuantizedLinear:
    config = Int8StaticActivationInt8WeightConfig()
    zero_point = torch.tensor([3], dtype=torch.int32)
    return QuantizedLinear.from_float(
        nn.Linear(100, 37), config, input_scale=torch.tensor([0.02]), input_zero_point=zero_point
    )


LAYERS: dict[str, Callable[[], QuantizedLinear]] = {
    **{name: lambda c=config: layer_of(c, "gelu") for name, config in CONFIGS.items()},  # type: ignore[misc]
    "no_bias": lambda: layer_of(out_features=37, in_features=100, bias=False),
    "tiny": lambda: layer_of(out_features=1, in_features=1),
    "static": static_layer,
}


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (17, 65), (100, 3), (1000, 64), (3, 4096)])
def test_shapes_of_both_layouts(n: int, k: int) -> None:
    weight = torch.zeros(n, k, dtype=torch.int8)
    assert packed_shape(n, k, HOST) == tuple(ops.pack_weight(weight).shape)
    there = torch.ops.torchquant_aten.pack_weight(weight)
    assert packed_shape(n, k, CUDA) == tuple(there.shape)
    with FakeTensorMode():
        fake = torch.empty(n, k, dtype=torch.int8, device=CUDA)
        assert ops.pack_weight(fake).shape == there.shape
        assert ops.quantize_pack(fake.float())[0].shape == there.shape
    assert there.numel() <= ops.pack_weight(weight).numel() + 2 * packed_shape(n, k, CUDA)[1]


def test_a_packed_weight_between_devices() -> None:
    weight = torch.randint(-128, 128, (20, 30), dtype=torch.int8)
    packed = ops.PackedWeight.pack(weight)
    assert packed.to("cpu") is packed
    with pretended_cuda() as cuda:
        there = packed.to(cuda)
        assert there.packed.device == CUDA
        assert tuple(there.packed.shape) == packed_shape(20, 30, CUDA)
        back = there.to("cpu")
    assert torch.equal(back.unpack(), weight)
    assert torch.equal(back.packed, packed.packed)


# ---------------------------------------------------------------- QuantizedLinear


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_goes_to_the_gpu_and_back(make: Callable[[], QuantizedLinear]) -> None:
    layer = make()
    before, twin = layer.packed.clone(), copy.deepcopy(layer)
    x = floats(5, layer.in_features)
    with torch.no_grad(), pretended_cuda() as cuda:
        assert layer.to(cuda) is layer
        assert {t.device for t in (*layer.parameters(), *layer.buffers())} == {CUDA}
        assert tuple(layer.packed.shape) == packed_shape(
            layer.out_features, layer.in_features, CUDA
        )
        output = layer(on_cuda(x))
        assert output.device == CUDA
        copied = copy.deepcopy(layer)
        assert copied.packed.device == CUDA
        assert_same_bits(values(copied.packed), values(layer.packed))
        state = {key: values(tensor) for key, tensor in layer.state_dict().items()}
        layer.to("cpu")
    assert_same_bits(values(output), twin(x).detach())
    assert_same_bits(layer.packed, before)
    assert_same_state(layer, twin)
    assert all(torch.equal(state[key], tensor) for key, tensor in twin.state_dict().items())
    assert_same_bits(layer(x).detach(), twin(x).detach())


def test_dtypes_on_the_way() -> None:
    layer = layer_of()
    with pretended_cuda() as cuda:
        layer.to(cuda, torch.bfloat16)
        assert layer.packed.dtype == torch.int8
        assert layer.weight_scale.dtype == torch.float32
        assert layer.bias is not None
        assert (layer.bias.dtype, layer.bias.device) == (torch.bfloat16, CUDA)


def test_a_layer_without_values_becomes_one_of_the_gpu() -> None:
    source = layer_of()
    state = source.state_dict()
    with pretended_cuda() as cuda:
        layer = layer_of(seed=5).to("meta").to_empty(device=cuda)
        assert tuple(layer.packed.shape) == packed_shape(32, 64, CUDA)
        assert not values(layer.qweight).any()
        layer.load_state_dict(state)
        assert layer.packed.device == CUDA
        assert torch.equal(values(layer.qweight), source.qweight)
        made = QuantizedLinear(64, 32, device=cuda)
        assert tuple(made.packed.shape) == packed_shape(32, 64, CUDA)
        made.load_state_dict({key: Pretended(value) for key, value in state.items()}, assign=True)
        assert torch.equal(values(made.qweight), source.qweight)
        made.to("meta")
        assert tuple(made.packed.shape) == packed_shape(32, 64, torch.device("meta"))


def test_a_move_that_fails_leaves_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, twin = layer_of(), layer_of()

    def full(weight: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(ops, "pack_weight", full)
    with pretended_cuda() as cuda, pytest.raises(torch.OutOfMemoryError):
        layer.to(cuda)
    monkeypatch.undo()
    assert torch.equal(layer.packed, twin.packed)


def test_input_on_another_device() -> None:
    layer = layer_of()
    with pretended_cuda() as cuda, torch.no_grad():
        with pytest.raises(ValueError, match="layer's device cpu, got one on cuda:0; move one"):
            layer(on_cuda(floats(2, 64)))
        layer.to(cuda)
        with pytest.raises(ValueError, match="layer's device cuda:0, got one on cpu; move one"):
            layer(nn.Parameter(floats(2, 64)))


@pytest.mark.parametrize("layer", [layer_of, static_layer], ids=["dynamic", "static"])
def test_autocast_of_the_gpu(layer: Callable[[], QuantizedLinear]) -> None:
    module = layer()
    x = floats(3, module.in_features)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast("cuda") does nothing without a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        assert module(x).dtype == torch.float32, "the CPU's autocast is off"
        with torch.no_grad(), pretended_cuda() as cuda:
            assert module.to(cuda)(on_cuda(x)).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_quantized_where_the_float_layer_is(static: bool) -> None:
    linear = nn.Linear(100, 37)
    config = Int8StaticActivationInt8WeightConfig() if static else CONFIGS["asymmetric"]
    scale = torch.tensor([0.03]) if static else None
    here = QuantizedLinear.from_float(linear, config, input_scale=scale)
    x = floats(4, 100)
    with torch.no_grad(), pretended_cuda() as cuda:
        linear.to(cuda)
        assert linear_module.value_refusal(linear) is None
        layer = QuantizedLinear.from_tensors(linear.weight, linear.bias, config, input_scale=scale)
        assert {t.device for t in (*layer.parameters(), *layer.buffers())} == {CUDA}
        output = layer(on_cuda(x))
        layer.to("cpu")
    assert_same_bits(values(output), here(x).detach())
    assert_same_state(layer, here)


# ---------------------------------------------------------------- layers computed together


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 128), nn.Linear(64, 64, False), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def test_groups_form_again_on_the_gpu() -> None:
    model = Attention().eval()
    quantize_(model)
    group, twin = model.q._group, copy.deepcopy(model)
    assert group is not None
    x = floats(3, 64)
    with torch.no_grad(), pretended_cuda() as cuda:
        model.to(cuda)
        assert group.active
        assert model.k._group is group
        assert group.packed.device == CUDA
        rows = [packed_shape(layer.out_features, 64, CUDA)[0] for layer in model.children()]
        assert group.packed.shape[0] == sum(rows)
        first = values(model.k.packed).data_ptr() - values(group.packed).data_ptr()
        assert first == 64 * rows[0], "the members' weights are parts of the group's, no copies"
        arguments = (group.weight_scale, group.weight_zero_point, group.bias)
        packed = ops.linear_dynamic_split(
            on_cuda(x), group.packed, *arguments, out_features=[128, 64, 64], symmetric=False
        )
        apart = model(on_cuda(x))
        copied = copy.deepcopy(model)
        assert copied.q._group is not group
        assert copied.q._group.active
        model.to("cpu")
    expected = twin(x)
    assert_same_bits(torch.cat([values(part) for part in packed], -1), expected)
    assert_same_bits(values(apart), expected)
    assert group.active
    assert_same_bits(model(x).detach(), expected.detach())
    assert model.q._group is group


def test_a_member_that_stays_behind() -> None:
    model = Attention().eval()
    quantize_(model)
    group, twin = model.q._group, copy.deepcopy(model)
    assert group is not None
    with pretended_cuda() as cuda:
        model.k.to(cuda)
        assert not group.active
        assert projections.ProjectionGroup.obstacle([model.q, model.k]) == (
            "they are on different devices"
        )
        model.k.to("cpu")
    assert group.active
    with torch.no_grad():
        assert_same_bits(model(floats(3, 64)), twin(floats(3, 64)))


def test_an_output_is_for_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention().eval()
    quantize_(model)
    twin, x = copy.deepcopy(model), floats(3, 64)
    calls: list[Any] = []
    split, streams = projections._split, iter(["a", "a", "b", "b"])

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return split(*arguments)

    monkeypatch.setattr(projections, "_split", counted)
    monkeypatch.setattr(projections, "_stream_of", lambda input: next(streams))
    with torch.no_grad():
        output = model(x)  # q computes all on a; k takes its on a; v is called on b
        monkeypatch.undo()
        assert_same_bits(output, twin(x))
    assert len(calls) == 1
    assert model.v._group is not None


def test_streams_are_asked_for_on_gpus_only() -> None:
    assert projections._stream_of(torch.zeros(1)) is None


def test_autocast_for_gpus_between_layers_is_a_change_of_mode() -> None:
    class Net(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            torch.set_autocast_enabled("cuda", True)
            k = self.k(x)
            torch.set_autocast_enabled("cuda", False)
            return q + k

    q, k = call_sites(Net.forward.__code__).calls
    assert (q.path, k.path) == (("q",), ("k",))
    assert q.chain == ()


# ---------------------------------------------------------------- norms


class LlamaRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(x.dtype)


def test_norms_on_the_gpu() -> None:
    float_norms = [LlamaRMSNorm(64), nn.RMSNorm(64, eps=1e-5), nn.LayerNorm(64)]
    here = [RMSNorm.from_float(norm) for norm in float_norms[:2]]
    here.append(LayerNorm.from_float(float_norms[2]))  # type: ignore[arg-type]
    x = floats(4, 64)
    with torch.no_grad():
        expected = [norm(x) for norm in here]
    with torch.no_grad(), pretended_cuda() as cuda:
        norm = LlamaRMSNorm(64).to(cuda)
        norm.weight = float_norms[0].to(cuda).weight
        assert RMSNorm.from_float(norm).cast_before_weight
        outputs = [values(norm.to(cuda)(on_cuda(x))) for norm in here]
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(output, wanted)
