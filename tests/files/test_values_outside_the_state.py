"""Models on the meta device: every tensor has the values of the saved model, or load refuses."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.layers import unchanged
from support.model_files import TOKENS, LanguageModel, metadata_of, trained
from torch import Tensor, nn

from torchquant import load, quantize_, save
from torchquant.files.format import read


class Positions(nn.Module):
    """Tensors of every sort beside a quantized layer."""

    def __init__(self, length: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("index", torch.arange(length), persistent=False)
        self.register_buffer("same", torch.arange(length), persistent=False)
        self.register_buffer("mask", torch.ones(length, length).tril() > 0, persistent=False)
        self.register_buffer("phase", torch.exp(1j * torch.arange(64.0)), persistent=False)
        self.register_buffer("nothing", None, persistent=False)
        self.register_buffer("empty", torch.zeros(0, 4), persistent=False)
        self.alias = self.index  # a plain attribute: not in the state, not a copy
        self.table = nn.Parameter(torch.randn(length, 64))
        self.own = self.table

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x) + self.table[self.index] + self.own[self.alias]
        output: Tensor = self.mask.float() @ x * self.phase.real
        return output


def saved(path: Path, make: Callable[[], nn.Module] = Positions) -> nn.Module:
    torch.manual_seed(4)
    model = make().eval()
    quantize_(model)
    save(model, path)
    return model


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def test_a_model_on_the_meta_device_gets_all_values(path: Path) -> None:
    model = saved(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = load(path, on_meta(Positions))
    x = torch.randn(8, 64)
    assert torch.equal(other(x), model(x))
    for name, buffer in model.named_buffers():
        there = dict(other.named_buffers())[name]
        assert torch.equal(there, buffer) and there.dtype == buffer.dtype
    assert other.alias is other.index
    assert other.own is other.table
    assert other.index is not other.same, "two buffers with equal values stay two"
    assert all(t.untyped_storage().data_ptr() for t in other.buffers() if t.numel())


def test_the_usual_example(path: Path) -> None:
    """As the README shows it, with a model whose positions are a non-persistent buffer."""
    model = trained()
    quantize_(model)
    save(model, path)
    other = load(path, on_meta(LanguageModel))
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_equal_buffers_are_stored_once(path: Path) -> None:
    def blocks() -> nn.Module:
        return nn.Sequential(*(Positions() for _ in range(4)))

    model = saved(path, blocks)
    tensors, header = read(path)
    own = {key for key in tensors if key.startswith("buffers/")}
    assert own == {f"buffers/0.{name}" for name in ("index", "mask", "phase", "empty")}
    assert set(header["buffers"].values()) == own
    assert set(header["buffers"]) == {
        f"{block}.{name}"
        for block in range(4)
        for name in ("index", "same", "mask", "phase", "empty")
    }
    x = torch.randn(8, 64)
    assert torch.equal(load(path, on_meta(blocks))(x), model(x))


def test_buffers_that_have_values_are_not_replaced(path: Path) -> None:
    saved(path)
    other = Positions().eval()
    other.index += 1
    other.index %= 8
    mine = other.index
    load(path, other)
    assert other.index is mine
    assert mine.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]


def test_the_metadata_names_no_buffers_where_there_are_none(path: Path) -> None:
    saved(path, lambda: nn.Sequential(nn.Linear(64, 64)))
    assert "buffers" not in metadata_of(path)


def test_a_shared_buffer_stays_one_tensor(path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.register_buffer("scale", torch.arange(64.0), persistent=False)
            self.inner = nn.Module()
            self.inner.register_buffer("scale", self.scale, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x) * self.scale + self.inner.scale
            return output

    model = saved(path, Shared)
    other = load(path, on_meta(Shared))
    assert other.scale is other.inner.scale
    x = torch.randn(2, 64)
    assert torch.equal(other(x), model(x))


def _plain(self: Any) -> None:
    self.frequencies = torch.arange(64.0)


def _in_a_list(self: Any) -> None:
    self.tables = [{"a": torch.arange(64.0)}]


def _in_an_object(self: Any) -> None:
    class Cache:
        def __init__(self) -> None:
            self.values = torch.arange(64.0)

    self.cache = Cache()


def _of_a_rare_dtype(self: Any) -> None:
    self.register_buffer("rare", torch.zeros(3, dtype=torch.complex128), persistent=False)


@pytest.mark.parametrize(
    ("give", "name"),
    [
        (_plain, "frequencies"),
        (_in_a_list, "tables[0]['a']"),
        (_in_an_object, "cache.values"),
        (_of_a_rare_dtype, "rare"),
    ],
)
def test_a_tensor_without_values_is_refused(
    path: Path, give: Callable[[Any], None], name: str
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            give(self)

    saved(path, Model)
    other = on_meta(Model)
    with unchanged(other), pytest.raises(ValueError) as raised:
        load(path, other)
    assert str(raised.value) == (
        f"load: every tensor must have values afterwards, but {str(path)!r} does not hold {name}, "
        "and the model has them on the meta device; build the model on the CPU, or under "
        "accelerate.init_empty_weights(), which leaves buffers on the CPU"
    )
    assert type(other.layer) is nn.Linear
    load(path, Model())  # the first remedy


def test_the_second_remedy(path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    class Model(Positions):
        def __init__(self) -> None:
            super().__init__()
            self.frequencies = torch.arange(64.0)

    model = saved(path, Model)
    with accelerate.init_empty_weights():
        other = Model().eval()
    load(path, other)
    x = torch.randn(8, 64)
    assert torch.equal(other(x), model(x))


def test_a_buffer_that_does_not_fit_is_refused(path: Path) -> None:
    saved(path, lambda: Positions(8))

    class Longer(Positions):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.arange(9), persistent=False)

    other = on_meta(Longer)
    with (
        unchanged(other),
        pytest.raises(ValueError, match=r"buffer index is int64 \[8\] in the file, int64 \[9\]"),
    ):
        load(path, other)


def test_a_model_that_holds_meta_tensors_of_its_own_is_loaded(path: Path) -> None:
    """Built on the CPU; what it keeps on the meta device is its own business."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.shape_only = torch.empty(4, device="meta")

    model = saved(path, Model)
    assert torch.equal(load(path, Model()).layer.qweight, model.layer.qweight)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "albert": ("Albert", {"embedding_size": 32}),
    "electra": ("Electra", {"embedding_size": 32}),
    "deberta": ("Deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "nystromformer": ("Nystromformer", {"segment_means_seq_len": 8, "num_landmarks": 4}),
    "llama": ("Llama", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        pad_token_id=0,
        **options,
    )

    def make() -> nn.Module:
        model: nn.Module = getattr(transformers, f"{kind}Model")(config)
        return model

    model = saved(path, make)
    other = load(path, on_meta(make)).eval()
    tokens = torch.arange(1, 17).reshape(2, 8)
    assert torch.equal(
        other(input_ids=tokens).last_hidden_state, model(input_ids=tokens).last_hidden_state
    )
