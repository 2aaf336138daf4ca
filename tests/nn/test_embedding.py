"""QuantizedEmbedding and QuantizedEmbeddingBag: values, state, copies, refusals."""

import copy
import io
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from support import FLOATS, assert_same_bits, check_everywhere
from support import generator as seeded
from torch import Tensor, nn

from torchquant import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    functional,
)
from torchquant.configs import QuantizationConfig
from torchquant.nn import QuantizedEmbedding, QuantizedEmbeddingBag, QuantizedIntxLinear
from torchquant.nn.shared_weight import share_weight

CONFIGS: dict[str, QuantizationConfig] = {
    "int8": Int8WeightOnlyConfig(),
    "int8 groups": Int8WeightOnlyConfig(32),
    "int4": IntxWeightOnlyConfig(4, 32),
    "int4 rows": IntxWeightOnlyConfig(4, None),
    "int3 zero points": IntxWeightOnlyConfig(3, 64, symmetric=False),
    "int2": IntxWeightOnlyConfig(2, 20),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
IDS = torch.tensor([[0, 49, 7], [7, 3, 3]])


def embedding(**options: Any) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(50, 70, **options)


def quantized(config: QuantizationConfig | None = None, **options: Any) -> QuantizedEmbedding:
    return QuantizedEmbedding.from_float(embedding(**options), config)


# ---------------------------------------------------------------- values


@configs
def test_rows_are_those_of_the_readable_weight(config: QuantizationConfig) -> None:
    layer = quantized(config)
    weight = layer.weight
    assert_same_bits(layer(IDS), weight[IDS])
    check_everywhere(lambda: layer(IDS), layer.dequantized()[IDS])
    assert torch.equal(layer(IDS), nn.functional.embedding(IDS, layer.weight))
    assert_same_bits(layer.to_float()(IDS).detach(), layer(IDS))


@configs
def test_the_table_is_quantized_as_a_linear_layers_weight(config: QuantizationConfig) -> None:
    """Both have the same integers, so that a tied head can have the same tensor."""
    table = embedding()
    head = nn.Linear(70, 50, bias=False)
    head.weight = table.weight
    layer = QuantizedEmbedding.from_float(table, config)
    assert torch.equal(QuantizedIntxLinear.from_float(head, config).packed, layer.packed)
    error = (layer.dequantized() - table.weight).abs().max()
    step = layer.qweight_scale.max()
    assert 0 < error <= 0.5001 * step
    limits = config.weights.range
    assert limits[0] <= int(layer.integers.min()) and int(layer.integers.max()) <= limits[1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_result_has_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    layer = QuantizedEmbedding.from_float(embedding().to(dtype), CONFIGS["int4"])
    assert layer(IDS).dtype == layer.weight.dtype == layer.dtype == dtype
    assert_same_bits(layer(IDS), layer.dequantized()[IDS])
    scales = layer.qweight_scale
    layer.to(torch.float16)
    assert layer(IDS).dtype == torch.float16
    assert_same_bits(layer.qweight_scale, scales)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # like nn.Embedding: no effect
        assert layer(IDS).dtype == torch.float16


def test_int32_indices_and_any_shape() -> None:
    layer = quantized(CONFIGS["int4"])
    for ids in (IDS, IDS.int(), IDS[0, 0], IDS.t(), IDS[:0], IDS[None]):
        assert_same_bits(layer(ids), layer.dequantized()[ids.long()])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str) -> None:
    torch.manual_seed(0)
    table = nn.EmbeddingBag(50, 70, mode=mode, padding_idx=3)
    layer = QuantizedEmbeddingBag.from_float(table, CONFIGS["int4"])
    assert (layer.mode, layer.padding_idx) == (mode, 3)
    reference: Any = layer.to_float()
    assert type(reference) is nn.EmbeddingBag and reference.padding_idx == 3
    torch.testing.assert_close(layer(IDS), reference(IDS).detach())
    flat, offsets = IDS.flatten(), torch.tensor([0, 2, 2])
    torch.testing.assert_close(layer(flat, offsets), reference(flat, offsets).detach())
    weight = {"weight": layer.integers, "weight_scale": layer.qweight_scale}
    expected = functional.embedding_bag_intx(
        **{"input": IDS, **weight, "bits": 4, "group_size": 32, "mode": mode, "padding_idx": 3}
    )
    check_everywhere(lambda: layer(IDS), expected)


def test_weights_of_a_bag_get_a_gradient() -> None:
    table = nn.EmbeddingBag(50, 70, mode="sum", include_last_offset=True)
    layer = QuantizedEmbeddingBag.from_float(table)
    reference: Any = layer.to_float()
    flat, offsets = IDS.flatten(), torch.tensor([0, 2, 6])
    ours, theirs = (torch.rand(6, generator=seeded(1)).requires_grad_() for _ in range(2))
    for module, weights in ((layer, ours), (reference, theirs)):
        module(flat, offsets, weights).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# ---------------------------------------------------------------- state


@configs
def test_state_dict(config: QuantizationConfig) -> None:
    layer, weights = quantized(config), config.weights
    state = layer.state_dict()
    names = ["qweight", "qweight_scale", *([] if weights.symmetric else ["qweight_zero_point"])]
    assert list(state) == names
    assert state["qweight"].dtype == torch.uint8
    assert state["qweight"].shape == (50, -(-70 * weights.bits // 8))
    other = QuantizedEmbedding(50, 70, config=config)
    assert not other(IDS).any()
    other.load_state_dict(state)
    assert_same_bits(other(IDS), layer(IDS))
    with torch.device("meta"):
        empty = QuantizedEmbedding(50, 70, config=config)
    empty.load_state_dict(state, assign=True)
    assert_same_bits(empty(IDS), layer(IDS))
    with pytest.raises(RuntimeError, match="qweight must be uint8"):
        QuantizedEmbedding(51, 70, config=config).load_state_dict(state)


def test_copies() -> None:
    layer = quantized(CONFIGS["int3 zero points"], padding_idx=2)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for made in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert_same_bits(made(IDS), layer(IDS))
        assert repr(made) == repr(layer)
        assert made.packed.data_ptr() != layer.packed.data_ptr()
    assert repr(layer) == (
        "QuantizedEmbedding(50, 70, padding_idx=2, int3 in groups of 64 with zero point)"
    )


def test_float_again() -> None:
    layer = quantized(padding_idx=4, sparse=True, scale_grad_by_freq=True)
    table: Any = layer.to_float()
    assert (table.padding_idx, table.sparse, table.scale_grad_by_freq) == (4, True, True)
    assert type(table) is nn.Embedding and table.weight.requires_grad
    assert_same_bits(QuantizedEmbedding.from_float(table)(IDS), layer(IDS))


@pytest.mark.parametrize("bits", range(2, 9))
def test_memory(bits: int) -> None:
    """Bits times weights plus scales, within 2 %."""
    table = nn.Embedding(512, 1024)
    layer = QuantizedEmbedding.from_float(table, IntxWeightOnlyConfig(bits, 128))
    wanted = table.weight.numel() * bits / 8 + 512 * 8 * 4
    assert wanted <= layer.packed.nbytes < 1.02 * wanted
    assert sum(t.nbytes for t in layer.state_dict().values()) == wanted
    assert sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) == layer.packed.nbytes


def test_compile_export_and_meta() -> None:
    layer = quantized(CONFIGS["int4"])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(IDS), layer(IDS))
    exported = torch.export.export(layer, (IDS,))
    assert_same_bits(exported.module()(IDS), layer(IDS))
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert_same_bits(traced(IDS), layer(IDS))
    bag = QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(50, 70))
    assert_same_bits(torch.compile(bag, backend="aot_eager", fullgraph=True)(IDS), bag(IDS))
    assert layer.to("meta")(IDS.to("meta")).shape == (2, 3, 70)


# ---------------------------------------------------------------- a shared weight


def tied(config: QuantizationConfig = CONFIGS["int4"]) -> nn.ModuleDict:
    table, head = embedding(), nn.Linear(70, 50)
    head.weight = table.weight
    model = nn.ModuleDict(
        {
            "embedding": QuantizedEmbedding.from_float(table, config),
            "head": QuantizedIntxLinear.from_float(head, config),
        }
    )
    share_weight([*model.values()])
    return model


def is_shared(model: Any) -> bool:
    first, second = model["embedding"], model["head"]
    assert first.shared_weight is second.shared_weight is not None
    assert first.shared_weight.packed is first.packed
    return first.packed is second.packed


def outputs(model: Any) -> tuple[Tensor, ...]:
    rows = model["embedding"](IDS)
    return rows, model["head"](rows).detach()


def assert_shared(model: Any, expected: tuple[Tensor, ...]) -> None:
    assert is_shared(model)
    for got, wanted in zip(outputs(model), expected, strict=True):
        assert_same_bits(got, wanted)


def test_copies_share_the_weight() -> None:
    model = tied()
    expected = outputs(model)
    assert_shared(model, expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    one = io.BytesIO()
    torch.save(model["embedding"], one)
    assert buffer.tell() < 1.5 * one.tell()
    buffer.seek(0)
    for made in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert_shared(made, expected)
        assert made["head"].packed.data_ptr() != model["head"].packed.data_ptr()
        made["head"].packed.zero_()
    assert_shared(model, expected)
    alone = copy.deepcopy(model["head"])
    assert_same_bits(alone(expected[0]).detach(), expected[1])


def test_moves_keep_the_sharing() -> None:
    model = tied()
    expected = outputs(model)
    model.to("cpu").float()
    assert_shared(model, expected)
    model._apply(torch.clone)  # every tensor becomes a new one
    assert_shared(model, expected)
    model["head"]._apply(torch.clone)  # only one of both
    assert_shared(model, expected)
    head = copy.deepcopy(model["head"]).to("meta")
    assert head.packed.is_meta and head.shared_weight is not model["head"].shared_weight
    model["head"].to("meta")  # the embedding stays where it is
    assert_same_bits(model["embedding"](IDS), expected[0])
    state = model["embedding"].state_dict()
    assert_same_bits(state["qweight"], model["embedding"].qweight)
    model["head"].to_empty(device="cpu")
    with torch.no_grad():
        model["head"].bias.copy_(tied()["head"].bias)
    model["embedding"].load_state_dict(state, assign=True)
    assert_shared(model, expected)
    model.bfloat16()
    assert is_shared(model) and model["embedding"](IDS).dtype == torch.bfloat16
    model.to("meta")
    assert is_shared(model)
    model.to_empty(device="cpu")
    assert is_shared(model)


def test_state_dicts_hold_the_tensors_once() -> None:
    model, other = tied(), tied()
    state = model.state_dict()
    for name in ("qweight", "qweight_scale"):
        pointers = {state[f"{layer}.{name}"].data_ptr() for layer in ("embedding", "head")}
        assert len(pointers) == 1
    with torch.no_grad():
        other["embedding"].packed.zero_()
        other["head"].bias.zero_()
    other.load_state_dict(state)
    assert_shared(other, outputs(model))
    other["embedding"].load_state_dict(  # one of both changes both
        {name: torch.zeros_like(t) for name, t in model["embedding"].state_dict().items()}
    )
    assert is_shared(other) and not other["embedding"](IDS).any()
    assert other.state_dict()["head.qweight_scale"].any().item() is False
    other.load_state_dict(state, assign=True)
    assert_shared(other, outputs(model))
    empty = copy.deepcopy(other).to("meta")
    empty.load_state_dict(state, assign=True)
    assert_shared(empty, outputs(model))


def test_a_state_dict_that_somebody_changes_is_not_the_state() -> None:
    model = tied()
    first = model.state_dict()
    kept = {name: tensor.clone() for name, tensor in first.items()}
    first["embedding.qweight_scale"].zero_()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, kept[name])
    assert model["embedding"].qweight_scale.all()


def test_a_state_dict_after_a_move_while_the_old_weight_is_in_use() -> None:
    model = tied()
    state, old = model.state_dict(), model["head"].packed
    model._apply(torch.clone)
    assert model["head"].packed is not old
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, state[name])
    with torch.inference_mode():
        again = model.state_dict()
    assert again["head.qweight"].data_ptr() == again["embedding.qweight"].data_ptr()


def test_only_equal_weights_are_shared() -> None:
    first, second = quantized(CONFIGS["int4"]), quantized(CONFIGS["int8"])
    with pytest.raises(ValueError, match="layers must have the same weight in the same format"):
        share_weight([first, second])
    assert first.shared_weight is None is second.shared_weight


# ---------------------------------------------------------------- refusals


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "dynamic": (
        nn.Embedding(50, 70),
        Int8DynamicActivationInt8WeightConfig(),
        ValueError,
        "embeddings take indices and need a configuration of weights alone, such as "
        "IntxWeightOnlyConfig(), not Dynamic activations",
    ),
    "group size": (
        nn.Embedding(50, 70),
        IntxWeightOnlyConfig(),
        ValueError,
        "embedding cannot be quantized: group_size must be at most embedding_dim = 70, got 128",
    ),
    "max_norm": (
        nn.Embedding(50, 70, max_norm=1.0),
        None,
        TypeError,
        "embedding must be a plain nn.Embedding, got max_norm, with which each call changes the "
        "weight",
    ),
    "subclass": (Scaled(50, 70), None, TypeError, "got Scaled (subclass of nn.Embedding)"),
    "another class": (nn.Linear(2, 2), None, TypeError, "got Linear (subclass of nn.Embedding)"),
    "dtype": (nn.Embedding(5, 7).double(), None, TypeError, "got weight of dtype float64"),
    "meta": (
        nn.Embedding(50, 70, device="meta"),
        None,
        ValueError,
        "on the meta device, without values; load its weights first",
    ),
    "NaN": (
        nn.Embedding(5, 7, _weight=torch.full((5, 7), torch.nan)),
        None,
        ValueError,
        "its weight holds NaN or infinity; check the checkpoint",
    ),
    "empty": (nn.Embedding(0, 7), None, ValueError, "weight of shape [0, 7]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized(name: str) -> None:
    module, config, error, message = REFUSED[name]
    with pytest.raises(error, match=re.escape(message)):
        QuantizedEmbedding.from_float(module, config)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_constructor() -> None:
    for arguments, message in (
        ((0, 4), "num_embeddings must be an integer of at least 1, got 0"),
        ((4, 2.0), "embedding_dim must be an integer of at least 1, got 2.0"),
        ((4, 4, 4), r"padding_idx must be from -4 to 3 \(num_embeddings = 4\), got 4"),
    ):
        with pytest.raises(ValueError, match=f"QuantizedEmbedding: {message}"):
            QuantizedEmbedding(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be one of sum, mean, max, got 'min'"):
        QuantizedEmbeddingBag(4, 4, mode="min")
    assert QuantizedEmbedding(4, 4, -1).padding_idx == 3


def test_wrong_input() -> None:
    layer = quantized()
    with pytest.raises(IndexError, match=r"from 0 to 49 \(num_embeddings = 50\), got 50"):
        layer(torch.tensor([1, 50]))
    with pytest.raises(TypeError, match="input must be int64 or int32, got float32"):
        layer(torch.ones(2))
    with pytest.raises(TypeError, match="QuantizedEmbedding: input must be a tensor, got list"):
        layer([1])
    with pytest.raises(ValueError, match="input must be on the layer's device cpu, got one on me"):
        layer(IDS.to("meta"))
    with pytest.raises(ValueError, match="device meta, got one on cpu; load its weights first"):
        copy.deepcopy(layer).to("meta")(IDS)


def test_the_weight_is_read_only() -> None:
    model = tied()
    with pytest.raises(RuntimeError, match="weight must not be changed"):
        model["embedding"].weight.mul_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model["head"].weight = model["embedding"].weight  # tied already
    with pytest.warns(UserWarning, match="the parameter that was assigned to it is ignored"):
        quantized().weight = model["embedding"].weight  # of another weight
    with pytest.raises(TypeError, match="weight must not be assigned"):
        quantized().weight = torch.ones(50, 70)
