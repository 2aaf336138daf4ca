"""The report: every parameter of a model is in one row, quantized or with the reason why not."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.float_models import Classifier, Conv1D, LanguageModel, Subclass
from torch import nn
from torch.nn.utils import parametrizations, prune

from torchquant import QATConfig, QuantizationReport, convert_, prepare_qat_, quantize_
from torchquant.graph.modules import memory_key
from torchquant.nn import QuantizedModule, TrainedModule


class Experts(nn.Module):
    """All experts in one parameter, as transformers holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 64))
        self.down_proj = nn.Parameter(torch.randn(4, 64, 32))


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 16, 64))
        self.proj = nn.Linear(64, 64)
        self.scales = nn.ParameterList([torch.randn(64), torch.randn(64, 2)])


class LoRALinear(nn.Linear):
    """A layer inside a layer."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.down, self.up = nn.Linear(64, 8), nn.Linear(8, 64)


def shared() -> nn.Module:
    linear, conv = nn.Linear(64, 64), nn.ConvTranspose1d(8, 8, 3)
    return nn.ModuleList([linear, conv, nn.Sequential(linear, conv)])


def tied_by_memory() -> nn.Module:
    model = nn.ModuleDict({"body": nn.Linear(64, 256), "head": nn.Linear(64, 100, bias=False)})
    model["embedding"] = nn.Embedding(100, 64, _weight=model["head"].weight)
    return model


def tied_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    model[1].bias = model[0].bias
    return model


def tied_linears() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), Subclass(64, 64))
    for layer in model:
        layer.weight = model[0].weight
    return model


class Attention(nn.MultiheadAttention):
    """A subclass, which may compute something else."""


MODELS: dict[str, Callable[[], nn.Module]] = {
    "classifier": Classifier,
    "language_model": LanguageModel,
    "convolutions": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv3d(2, 2, 1), nn.Conv2d(8, 8, 3)
    ),
    "recurrent": lambda: nn.ModuleList([nn.LSTM(8, 16, 2), nn.GRU(8, 8), nn.LSTMCell(8, 8)]),
    "embeddings": lambda: nn.ModuleList([nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)]),
    "experts": lambda: nn.Sequential(nn.Linear(64, 64), Experts()),
    "attention": lambda: nn.ModuleList([nn.MultiheadAttention(64, 4, kdim=32, vdim=16)]),
    "other_attention": lambda: nn.ModuleList([Attention(64, 4, kdim=32, vdim=16)]),
    "transformer": lambda: nn.Transformer(64, 4, 1, 1, 128),
    "raw": Patches,
    "norms": lambda: nn.ModuleList([nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.RMSNorm(8)]),
    "subclass": lambda: nn.Sequential(Subclass(64, 64), Conv1D(64, 64)),
    "nested": lambda: nn.Sequential(LoRALinear()),
    "shared": shared,
    "tied_by_memory": tied_by_memory,
    "tied_bias": tied_bias,
    "tied_linears": tied_linears,
    "parametrized": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(64, 64)),
        parametrizations.weight_norm(nn.Conv3d(8, 8, 3)),
        parametrizations.orthogonal(nn.Linear(64, 64)),
    ),
    "pruned": lambda: nn.Sequential(
        prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5),
        prune.l1_unstructured(nn.Conv1d(8, 8, 3), "weight", 0.5),
    ),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyConv3d(8, 3), nn.Linear(64, 64)),
    "meta": lambda: nn.Sequential(nn.Linear(64, 64), nn.Embedding(9, 4)).to("meta"),
    "empty": nn.Sequential,
    "no_parameters": lambda: nn.Sequential(nn.ReLU()),
}


def elements(model: nn.Module) -> dict[object, int]:
    """The number of elements of each distinct parameter."""
    return {memory_key(p): p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p)}


def in_float(model: nn.Module) -> dict[object, int]:
    """The sizes of the parameters of modules that neither are nor contain a layer of torchquant."""
    inside = {
        id(part)
        for module in model.modules()
        if isinstance(module, (QuantizedModule, TrainedModule))
        for part in module.modules()
    }
    return {
        memory_key(p): p.numel()
        for module in model.modules()
        if id(module) not in inside
        for p in module._parameters.values()
        if p is not None and not nn.parameter.is_lazy(p)
    }


def check(report: QuantizationReport, before: dict[object, int], model: nn.Module) -> None:
    assert report.parameters == sum(before.values())
    floating = sum(row.parameters for row in report if row.stays_float)
    assert floating == sum(in_float(model).values())
    assert floating == sum(report.float_families.values())
    assert len({row.name for row in report}) == len(report)
    for row in report:
        assert row.reason or row.action in ("quantized", "prepared", "converted", "skipped")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:enable_nested_tensor")
def test_shares_add_up(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = elements(model)
    check(quantize_(model, filter_fn=["*"]), before, model)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:enable_nested_tensor")
def test_shares_add_up_in_training(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = elements(model)
    check(prepare_qat_(model, QATConfig(weight_bits=4)), before, model)


ROWS = {
    "convolutions": ("0", "convolutions", "ConvTranspose2d, no integer path yet"),
    "recurrent": ("0", "recurrent layers", "LSTM, no integer path yet"),
    "embeddings": (
        "1",
        "embeddings",
        "EmbeddingBag; only quantize_ quantizes it, with weights alone, such as "
        "IntxWeightOnlyConfig()",
    ),
    "experts": ("1", "experts", "Experts, no integer path yet: gate_up_proj, down_proj"),
    "other_attention": (
        "0",
        "attention in_proj",
        "Attention's q_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias, no "
        "integer path yet",
    ),
    "raw": ("(model)", "raw parameters", "parameters of Patches, no integer path yet: position"),
    "norms": ("2", "norms", "RMSNorm"),
    "shared": ("1", "convolutions", "ConvTranspose1d, no integer path yet; also at 2.1"),
    "parametrized": ("1", "convolutions", "ParametrizedConv3d, no integer path yet"),
    "lazy": (
        "1",
        "convolutions",
        "LazyConv3d, no integer path yet; has no shape before the first call",
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_the_row_of_a_module_without_an_integer_path(name: str) -> None:
    where, family, reason = ROWS[name]
    row = quantize_(MODELS[name]())[where]
    assert (row.action, row.family, row.reason) == ("float", family, reason)


def test_a_parametrized_module_has_one_row() -> None:
    model = MODELS["parametrized"]()
    elements_of_conv = sum(p.numel() for p in model[1].parameters())
    report = quantize_(model)
    assert [row.name for row in report] == ["0", "2", "1"]
    assert report["1"].parameters == elements_of_conv == 8 * 8 * 27 + 8 + 8


def test_experts_are_in_the_summary() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), Experts(), nn.LayerNorm(64))
    summary = quantize_(model).summary()
    assert summary.startswith(
        "1 quantized (12 % of parameters), 0 skipped; 88 % stay in float: experts 70 %, "
        "embeddings 18 %, norms <1 %; model "
    )


def test_a_second_call_counts_what_was_quantized_before() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Embedding(65, 64))
    quantize_(model)
    report = quantize_(model)
    assert report.summary().startswith(
        "0 quantized (0 % of parameters), 1 skipped; 50 % quantized or prepared before; 50 % stay "
        "in float: embeddings 50 %; model "
    )
    assert report.summary().endswith("(same size)")


def test_training_and_conversion_count_the_same_parameters() -> None:
    model = Classifier()
    before = sum(elements(model).values())
    shares = []
    for report in (
        quantize_(copy.deepcopy(model)),
        prepare_qat_(model),
        convert_(model),
    ):
        assert report.parameters == before
        shares.append(sum(row.parameters for row in report.changed))
    assert shares[0] == shares[1] == shares[2]


def test_norms_share_a_line() -> None:
    model = nn.ModuleList([nn.LayerNorm(64), nn.Linear(64, 64), nn.RMSNorm(32), nn.LayerNorm(64)])
    text = str(quantize_(model))
    assert "3 norms" in text and "float (3): LayerNorm, RMSNorm" in text


_PARTS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(64, 64),
    lambda: nn.Linear(4, 4),
    lambda: nn.Conv1d(4, 4, 3),
    lambda: nn.Embedding(64, 64),
    lambda: nn.LayerNorm(64),
    lambda: Subclass(64, 64),
    lambda: nn.MultiheadAttention(64, 2),
    Patches,
    nn.ReLU,
]


@given(
    st.lists(st.integers(0, len(_PARTS) - 1), max_size=8),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_shares_of_random_models_add_up(kinds: list[int], ties: list[tuple[int, int]]) -> None:
    parts = [_PARTS[kind]() for kind in kinds]
    for a, b in ties:  # share parameters of one shape, or whole modules
        if max(a, b) < len(parts):
            one, two = (getattr(parts[place], "weight", None) for place in (a, b))
            if isinstance(one, nn.Parameter) and two is not None and one.shape == two.shape:
                parts[b].weight = one
            else:
                parts.append(parts[a])
    model = nn.ModuleList([nn.ModuleList(parts[::2]), nn.ModuleList(parts[1::2])])
    before = elements(model)
    check(quantize_(model), before, model)
