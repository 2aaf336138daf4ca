"""The state of QuantizedLinear: copies, conversions and state dicts hold the canonical weight."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import (
    ALL_CONFIGS,
    ASYMMETRIC,
    CONFIGS,
    assert_same_state,
    float_layer,
    layer_of,
)
from torch import nn

from torchquant import QuantizationConfig, cpu
from torchquant.nn import QuantizedLinear

# ---------------------------------------------------------------- copies


def through_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


COPIES: dict[str, Callable[[QuantizedLinear], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS)
def test_copies(
    config: QuantizationConfig, make: Callable[[QuantizedLinear], QuantizedLinear]
) -> None:
    layer = layer_of(config, "silu").eval()
    other = make(layer)
    x = floats(3, 64)
    assert_same_bits(other(x), layer(x))
    assert_same_state(other, layer)
    assert (repr(other), other.training, other.config) == (repr(layer), False, config)
    assert [name for name, _ in other.named_buffers()] == [n for n, _ in layer.named_buffers()]
    assert other.packed is not layer.packed


def test_a_pickle_holds_the_canonical_weight_once() -> None:
    layer = layer_of(out_features=512, in_features=512, bias=False)
    for data in (pickle.dumps(layer), through_bytes(layer.state_dict()), through_bytes(layer)):
        assert 512 * 512 < len(data) < 1.2 * 512 * 512
    with cpu.use_isa("scalar"):
        assert_same_state(layer_of(out_features=512, in_features=512, bias=False), layer)


def through_bytes(thing: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


@pytest.mark.parametrize("config", ["default", "int4_groups"])
def test_shared_memory_and_a_forked_process(config: str) -> None:
    layer, x = layer_of(ALL_CONFIGS[config]), floats(3, 64)
    expected = layer(x).detach()
    layer.share_memory()
    assert layer.packed.is_shared()
    assert_same_bits(layer(x).detach(), expected)
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work() -> None:
        queue.put((torch.equal(layer(x), expected), pickle.dumps(copy.deepcopy(layer))))

    process = context.Process(target=work)
    process.start()
    same, data = queue.get()
    process.join(30)
    assert process.exitcode == 0
    assert same
    assert_same_bits(pickle.loads(data)(x).detach(), expected)
    layer.load_state_dict(layer_of(ALL_CONFIGS[config], seed=5).state_dict())
    assert layer.packed.is_shared(), "loading must write into the memory that others read"


# ---------------------------------------------------------------- .to()

CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "type": lambda layer: layer.type(torch.float64),
    "memory_format": lambda layer: layer.to(memory_format=torch.channels_last),
    "cpu": lambda layer: layer.cpu(),
    "cpu_half": lambda layer: layer.to("cpu", torch.half),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("config", ["asymmetric", "int3_zero_points"])
def test_scales_stay_float32_and_the_bias_follows(
    config: str,
    convert: Callable[[nn.Module], nn.Module],
) -> None:
    layer, x = layer_of(ALL_CONFIGS[config]), floats(3, 64)
    layer(x.requires_grad_()).sum().backward()
    same, linear = copy.deepcopy(layer), nn.Linear(64, 32)
    bias, dtype = layer.bias, convert(linear).bias.dtype
    dtype = torch.float32 if dtype == torch.float64 else dtype  # no kernel takes float64
    assert convert(layer) is layer
    assert layer.bias is bias is not None
    assert bias.grad is not None
    assert layer.dtype == layer.weight.dtype == bias.dtype == bias.grad.dtype == dtype
    rounded = same.bias.detach().to(dtype)
    assert_same_bits(bias.detach(), rounded)
    with torch.no_grad():
        same.bias.copy_(rounded.float())
    assert_same_bits(layer(x).detach(), same(x).detach())
    layer.bias.data = layer.bias.data.float()
    assert_same_state(layer, same)


def test_within_a_model_in_bfloat16() -> None:
    model = nn.Sequential(nn.Linear(64, 64), layer_of(), nn.LayerNorm(32)).to(torch.bfloat16)
    assert model(floats(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model[1].weight_scale.dtype == torch.float32


@pytest.fixture
def _no_lucky_memory() -> Iterator[None]:
    """torch.empty() returns numbers that are not a packed weight."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_no_lucky_memory")
@pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS)
@pytest.mark.parametrize("bias", [True, False])
def test_to_meta_and_back_by_to_empty(bias: bool, config: QuantizationConfig) -> None:
    layer = layer_of(config, bias=bias)
    state, x = layer.state_dict(), floats(3, 64)
    expected = layer(x).detach()
    layer.to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert copy.deepcopy(layer).packed.is_meta
    layer.to_empty(device="cpu")
    assert [(k, v.shape) for k, v in layer.state_dict().items()] == [
        (k, v.shape) for k, v in state.items()
    ], "no values, but in order"
    copy.deepcopy(layer)
    layer.load_state_dict(state)
    assert_same_bits(layer(x).detach(), expected)


# ---------------------------------------------------------------- state dict


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_holds_the_canonical_tensors(config: QuantizationConfig, bias: bool) -> None:
    state = layer_of(config, bias=bias).state_dict()
    expected = {"qweight": (torch.int8, (32, 64)), "qweight_scale": (torch.float32, (32,))}
    if not config.weights.symmetric:
        expected["qweight_zero_point"] = (torch.int32, (32,))
    if bias:
        expected["bias"] = (torch.float32, (32,))
    assert {key: (t.dtype, tuple(t.shape)) for key, t in state.items()} == expected
    assert not any(t.requires_grad for t in state.values())


def test_keep_vars() -> None:
    layer = layer_of()
    assert layer.state_dict(keep_vars=True)["bias"] is layer.bias


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS)
def test_loading_a_state_dict(config: QuantizationConfig, assign: bool) -> None:
    source, layer = layer_of(config, seed=1), layer_of(config, seed=2)
    packed, bias = layer.packed, layer.bias
    result = layer.load_state_dict(source.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(layer, source)
    x = floats(3, 64)
    assert_same_bits(layer(x).detach(), source(x).detach())
    assert (layer.packed is packed) is not assign, "in place unless assigned"
    assert isinstance(layer.bias, nn.Parameter)
    assert (layer.bias is bias) is not assign


@pytest.mark.parametrize("config", ["asymmetric", "int3_zero_points"])
def test_a_state_dict_on_disk_with_weights_only(config: str, tmp_path: Any) -> None:
    source, layer = layer_of(ALL_CONFIGS[config], seed=1), layer_of(ALL_CONFIGS[config], seed=2)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    for mmap in (False, True):
        state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap)
        layer.load_state_dict(state)
        assert_same_state(layer, source)


def test_loading_onto_the_meta_device() -> None:
    source = layer_of(ASYMMETRIC)
    layer = QuantizedLinear(64, 32, config=ASYMMETRIC, device="meta")
    with pytest.warns(UserWarning, match="no-op"):
        layer.load_state_dict(source.state_dict())
    assert layer.packed.is_meta
    layer.load_state_dict(source.state_dict(), assign=True)
    x = floats(3, 64)
    assert_same_bits(layer(x).detach(), source(x).detach())


def test_a_state_dict_that_was_converted_to_bfloat16() -> None:
    source = layer_of()
    state = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in source.state_dict().items()
    }
    for assign in (True, False):
        layer = layer_of(seed=3)
        layer.load_state_dict(state, assign=assign)
        assert layer.weight_scale.dtype == torch.float32
        assert_same_bits(layer.weight_scale, source.weight_scale.bfloat16().float())
        # As in nn.Linear: a parameter that is assigned keeps the dtype of the state dict.
        assert layer.bias.dtype == (torch.bfloat16 if assign else torch.float32)
        assert_same_bits(layer.bias.detach().float(), source.bias.detach().bfloat16().float())
        layer(floats(3, 64))


BAD_ENTRIES: dict[str, tuple[str, Any, str]] = {
    "shape": (
        "qweight",
        torch.zeros(32, 65, dtype=torch.int8),
        "0.qweight must be int8 [32, 64], got int8 [32, 65]",
    ),
    "transposed": (
        "qweight",
        torch.zeros(64, 32, dtype=torch.int8),
        "0.qweight must be int8 [32, 64], got int8 [64, 32]",
    ),
    "dtype": (
        "qweight",
        torch.zeros(32, 64),
        "0.qweight must be int8 [32, 64], got float32 [32, 64]",
    ),
    "unsigned": (
        "qweight",
        torch.zeros(32, 64, dtype=torch.uint8),
        "0.qweight must be int8 [32, 64], got uint8 [32, 64]",
    ),
    "no_tensor": ("qweight", [1, 2], "0.qweight must be int8 [32, 64], got list"),
    "meta": (
        "qweight",
        torch.zeros(32, 64, dtype=torch.int8, device="meta"),
        "0.qweight must be int8 [32, 64], got a tensor on the meta device, which has no values",
    ),
    "scale_shape": (
        "qweight_scale",
        torch.ones(1),
        "0.qweight_scale must be float32 [32], got float32 [1]",
    ),
    "scale_dtype": (
        "qweight_scale",
        torch.ones(32, dtype=torch.int32),
        "0.qweight_scale must be float32 [32], got int32 [32]",
    ),
    "zero_point_dtype": (
        "qweight_zero_point",
        torch.zeros(32),
        "0.qweight_zero_point must be int32 [32], got float32 [32]",
    ),
    "bias_shape": ("bias", torch.zeros(33), "0.bias must be float32 [32], got float32 [33]"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("name", "value", "text"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_changes_nothing(name: str, value: Any, text: str, strict: bool) -> None:
    model = nn.Sequential(layer_of(ASYMMETRIC, seed=1))
    before = copy.deepcopy(model)
    state = nn.Sequential(layer_of(ASYMMETRIC, seed=2)).state_dict()
    state[f"0.{name}"] = value
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(state, strict=strict)
    assert text in str(raised.value)
    assert_same_state(model, before)


def test_missing_and_unknown_keys() -> None:
    source = layer_of(seed=1).state_dict()
    del source["qweight"]
    source["weight"] = torch.zeros(32, 64)
    layer = layer_of(seed=2)
    with pytest.raises(RuntimeError, match=r'Missing key.*"qweight"'):
        layer.load_state_dict(source)
    result = layer.load_state_dict(source, strict=False)
    assert result.unexpected_keys == ["weight"]
    assert torch.equal(layer.qweight, layer_of(seed=2).qweight)


def test_a_float_state_dict_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r'"qweight", "qweight_scale"'):
        layer_of().load_state_dict(float_layer().state_dict())


def test_a_zero_point_for_a_symmetric_layer_is_refused() -> None:
    symmetric, asymmetric = layer_of(), layer_of(ASYMMETRIC)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*qweight_zero_point"):
        symmetric.load_state_dict(asymmetric.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*qweight_zero_point"):
        asymmetric.load_state_dict(layer_of().state_dict())
