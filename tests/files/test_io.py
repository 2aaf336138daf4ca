"""save and load: round trips of many models, and files that must be refused."""

import json
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import assert_same_bits, floats
from support.layers import ASYMMETRIC, CONFIGS, assert_same_state
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchquant
from torchquant import Fusion, QuantizationConfig, cpu, load, quantize_, save
from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant.files import format as file_format
from torchquant.nn import FusedActivation, QuantizedLinear


class LanguageModel(nn.Module):
    """A tied head, a buffer of each kind, a layer used twice."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.body = nn.ModuleList([nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)])
        self.body.append(self.body[0])
        self.head = nn.Linear(64, 100, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.zeros(64))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("positions", torch.arange(64) / 64, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions + self.offset
        for layer in self.body:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


TOKENS = torch.arange(12).reshape(3, 4)


def trained(tied: bool = True) -> LanguageModel:
    torch.manual_seed(1)
    model = LanguageModel(tied).eval()
    model.offset += 0.25
    model.steps += 7
    return model


def small() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def saved_small(
    path: Path, config: QuantizationConfig | None = None, fusion: Fusion | None = None
) -> nn.Sequential:
    model = small()
    quantize_(model, config, fusion=fusion)
    save(model, path)
    return model


def other_small() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check that the block does not change any module, tensor or value."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places = {
        id(module): (dict(module._parameters), dict(module._buffers)) for module in model.modules()
    }
    values = {key: value.detach().clone() for key, value in model.state_dict().items()}
    yield
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    for module in model.modules():
        parameters, buffers = places[id(module)]
        assert list(module._parameters) == list(parameters)
        assert list(module._buffers) == list(buffers)
        assert all(module._parameters[name] is parameters[name] for name in parameters)
        assert all(module._buffers[name] is buffers[name] for name in buffers)
    for key, value in model.state_dict().items():
        if not value.is_meta:
            assert_same_bits(value, values[key], key)


def metadata_of(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["torchquant"])
    assert isinstance(header, dict)
    return header


def rewrite(
    path: Path,
    edit: Callable[[dict[str, Any], dict[str, Tensor]], Any],
    sign: bool = True,
) -> None:
    """Edit the metadata and tensors of a file, and write a matching checksum."""
    header, tensors = metadata_of(path), safetensors.torch.load_file(path)
    edit(header, tensors)
    if sign:
        header["sha256"] = file_format.digest(header, tensors)
    write(path, tensors, {"torchquant": json.dumps(header)})


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    tensors = {
        key: tensor.clone() for key, tensor in tensors.items()
    }  # copies, because the file is mapped
    safetensors.torch.save_file(tensors, path, metadata=metadata)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_into_a_float_model(path: Path, config: QuantizationConfig) -> None:
    model = trained()
    quantize_(model, config)
    save(model, path)
    other = LanguageModel().eval()
    assert load(path, other) is other
    assert_same_state(other, model)
    assert repr(other) == repr(model)
    assert isinstance(other.body[0], QuantizedLinear)
    assert other.body[0].config == config
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_round_trip_into_a_model_on_the_meta_device(path: Path) -> None:
    model = nn.Sequential(trained().body[:3], nn.BatchNorm1d(64))
    quantize_(model, ASYMMETRIC)
    save(model, path)
    with torch.device("meta"):
        other = nn.Sequential(LanguageModel().body[:3], nn.BatchNorm1d(64))
    load(path, other)
    assert_same_state(other, model)
    assert {t.device.type for t in [*other.parameters(), *other.buffers()]} == {"cpu"}


def test_round_trip_into_a_model_that_is_quantized(path: Path) -> None:
    model = trained()
    quantize_(model)
    save(model, path)
    for config in CONFIGS.values():
        other = LanguageModel().eval()
        quantize_(other, config)
        body = other.body[0]
        load(path, other)
        assert_same_state(other, model)
        assert (other.body[0] is body) is (config == Config()), "replaced only where it must be"
        assert torch.equal(other(TOKENS), model(TOKENS))


def test_round_trip_of_a_float_model(path: Path) -> None:
    model = trained()
    save(model, path)
    other = load(path, LanguageModel().eval())
    assert_same_state(other, model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert metadata_of(path)["layers"] == {}


def test_round_trip_of_one_layer_alone(path: Path) -> None:
    layer = QuantizedLinear.from_float(nn.Linear(64, 32), ASYMMETRIC, "gelu")
    save(layer, path)
    other = QuantizedLinear(64, 32, config=ASYMMETRIC, activation="gelu")
    load(path, other)
    assert_same_state(other, layer)
    with pytest.raises(ValueError, match="layer at the root in the file, Linear in the model"):
        load(path, nn.Linear(64, 32))
    with pytest.raises(ValueError, match="layer at the root in the file"):
        load(path, QuantizedLinear(64, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_trip_of_a_model_in_low_precision(path: Path, dtype: torch.dtype) -> None:
    model = trained().to(dtype)
    quantize_(model)
    save(model, path)
    for other in (LanguageModel().eval(), LanguageModel().eval().to(dtype)):
        load(path, other)
        assert_same_state(other, model)
        assert other.embedding.weight.dtype == dtype
        assert other.body[0].weight_scale.dtype == torch.float32
    other.positions = other.positions.to(dtype)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_round_trip_between_instruction_sets(path: Path, isa: str) -> None:
    model = trained()
    quantize_(model)
    save(model, path)
    with cpu.use_isa("scalar"):
        other = load(path, LanguageModel().eval())
        expected = other(TOKENS)
        content = path.read_bytes()
        save(other, path)
        assert path.read_bytes() == content, "a file does not depend on the CPU"
    assert torch.equal(other(TOKENS), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(64, 32, 2),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128), 2),
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64)),
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(64, 64)), nn.Linear(64, 64)),
        lambda: nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Linear(64, 2)),
        lambda: nn.Sequential(nn.Linear(64, 64, bias=False)),
        lambda: nn.Sequential(nn.ParameterList([torch.zeros(0, 3), torch.zeros(3, 0)])),
        lambda: nn.Sequential(nn.ReLU()),
    ],
    ids=["lstm", "encoder", "parametrized", "spectral", "norm", "no_bias", "empty", "nothing"],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_round_trip_of_other_modules(path: Path, make: Callable[[], nn.Module]) -> None:
    model, other = make().eval(), make().eval()
    quantize_(model)
    save(model, path)
    load(path, other)
    assert_same_state(other, model)
    if isinstance(model, nn.LSTM):
        x = floats(3, 2, 64)
        assert torch.equal(other(x)[0], model(x)[0])


class Exotic(nn.Module):
    """Tensors that are not contiguous, conjugated, or negated views."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(24.0).reshape(4, 6)
        self.whole = nn.Parameter(base)
        self.register_buffer("rows", base[1:3])
        self.register_buffer("transposed", base.t())
        self.register_buffer("expanded", torch.ones(1).expand(5))
        self.register_buffer("scalar", torch.tensor(3.0))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("complex", torch.tensor([1 + 2j]))
        self.register_buffer("conjugate", self.complex.conj())
        self.register_buffer("absent", None)


def test_round_trip_of_exotic_tensors(path: Path) -> None:
    model, other = Exotic(), Exotic()
    with torch.no_grad():
        model.whole += 1
        other.whole.zero_()
    save(model, path)
    load(path, other)
    assert {key: value.tolist() for key, value in other.state_dict().items()} == {
        key: value.tolist() for key, value in model.state_dict().items()
    }


class WithExtraState(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state(path: Path) -> None:
    model = WithExtraState(torch.tensor([1.0, 2.0]))
    quantize_(model)
    save(model, path)
    other = WithExtraState(torch.zeros(5))
    load(path, other)
    assert torch.equal(other.extra, model.extra)
    with pytest.raises(ValueError) as raised:
        save(WithExtraState({"a": 1}), path)
    assert str(raised.value) == (
        "save: the state dict must hold tensors only, got dict at '_extra_state'; modules with "
        "get_extra_state() cannot be stored in safetensors"
    )
    assert load(path, WithExtraState(None))


# ---------------------------------------------------------------- ties, flags, devices


def test_ties_are_kept(path: Path) -> None:
    model = trained()
    quantize_(model, filter_fn=lambda module, name: name != "head")
    save(model, path)
    assert metadata_of(path)["aliases"]["head.weight"] == "embedding.weight"
    assert len(path.read_bytes()) < 100 * 64 * 4 + 2 * 64 * 64 + 8000, "stored once"
    fresh = LanguageModel()
    with torch.device("meta"):
        on_meta = LanguageModel()
    went_to_meta = LanguageModel().to("meta")
    assert went_to_meta.head.weight is not went_to_meta.embedding.weight, "torch unties it"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the non-persistent buffer
        for other in (fresh, on_meta, went_to_meta):
            load(path, other)
            assert other.head.weight is other.embedding.weight
            assert_same_state(other, model)
            assert other.body[0] is other.body[3]


def test_tensors_that_the_model_does_not_tie_stay_separate(path: Path) -> None:
    model = trained()
    quantize_(model, filter_fn=lambda module, name: name != "head")
    save(model, path)
    other = load(path, LanguageModel(tied=False))
    assert torch.equal(other.head.weight, other.embedding.weight)
    with torch.no_grad():
        other.head.weight.zero_()
    assert bool(other.embedding.weight.any())


def test_a_file_that_contradicts_a_tie_is_refused(path: Path) -> None:
    save(trained(tied=False), path)
    model = LanguageModel()
    with (
        unchanged(model),
        pytest.raises(ValueError, match="two tensors in the file, one tensor in"),
    ):
        load(path, model)
    equal = trained(tied=False)
    with torch.no_grad():
        equal.head.weight.copy_(equal.embedding.weight)
    save(equal, path)
    load(path, model)
    assert model.head.weight is model.embedding.weight


def test_an_untied_head(path: Path) -> None:
    model = trained()
    assert quantize_(model).layers[-1].reason == "untied"
    save(model, path)
    other = load(path, LanguageModel().eval())
    assert isinstance(other.head, QuantizedLinear)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_shared_layer_is_stored_once(path: Path) -> None:
    linear = nn.Linear(256, 256)
    model = nn.Sequential(linear, nn.Sequential(linear), linear)
    quantize_(model)
    save(model, path)
    assert len(path.read_bytes()) < 1.1 * 256 * 256
    other = nn.Linear(256, 256)
    shared = nn.Sequential(other, nn.Sequential(other), other)
    load(path, shared)
    assert shared[0] is shared[1][0] is shared[2]
    apart = nn.Sequential(
        nn.Linear(256, 256), nn.Sequential(nn.Linear(256, 256)), nn.Linear(256, 256)
    )
    load(path, apart)
    assert apart[0] is not apart[2]
    x = floats(3, 256)
    assert torch.equal(shared(x), model(x))
    assert torch.equal(apart(x), model(x))
    assert apart[0].bias is not apart[2].bias


def test_a_shared_layer_refuses_two_configurations(path: Path) -> None:
    apart = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(apart, filter_fn=lambda module, name: name == "0")
    quantize_(apart, ASYMMETRIC)
    save(apart, path)
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, linear)
    with unchanged(model), pytest.raises(ValueError, match="'1' is a separate layer in the file"):
        load(path, model)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_requires_grad_mode_and_hooks_do_not_change(
    path: Path, requires_grad: bool, training: bool, quantized: bool
) -> None:
    saved_small(path)
    model = other_small().train(training).requires_grad_(requires_grad)
    if quantized:
        quantize_(model, ASYMMETRIC)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    load(path, model)
    assert isinstance(model[0], QuantizedLinear)
    assert all(p.requires_grad is requires_grad for p in model.parameters())
    assert all(module.training is training for module in model.modules())
    model(floats(2, 64))
    assert calls == [1]


def test_a_warning_names_buffers_that_are_not_saved(path: Path) -> None:
    model = trained()
    quantize_(model)
    save(model, path)
    with torch.device("meta"):
        other = LanguageModel().eval()
    with pytest.warns(UserWarning) as warned:
        load(path, other)
    assert [str(warning.message) for warning in warned] == [
        "load: every buffer must have values for the model to run, but these non-persistent "
        "buffers are not saved and are on the meta device: positions; set them, or build the model "
        "on the CPU"
    ]
    assert warned[0].filename == __file__
    other.positions = model.positions
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_the_default_dtype_and_device_are_ignored(path: Path) -> None:
    model = saved_small(path, ASYMMETRIC)
    other = other_small()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            load(path, other)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(other, model)
    assert torch.equal(other(floats(3, 64)), model(floats(3, 64)))


def test_the_model_does_not_depend_on_the_file(path: Path) -> None:
    """safetensors maps the file; writing to the file must not change a loaded model."""
    model = trained()
    quantize_(model)
    save(model, path)
    other = load(path, LanguageModel().eval())
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_state(other, model)
    assert all(t.data_ptr() % 64 == 0 for t in other.parameters()), "and is aligned as torch's"


# ---------------------------------------------------------------- fused activations


@pytest.mark.parametrize("there", ["float", "fused", "unfused", "meta"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused_file", "plain_file"])
def test_a_file_fits_a_model_in_any_state(path: Path, fused: bool, there: str) -> None:
    saved = saved_small(path, fusion=Fusion(activations=fused))
    model = other_small()
    if there in ("fused", "unfused"):
        quantize_(model, fusion=Fusion(activations=there == "fused"))
    elif there == "meta":
        model.to("meta")
    load(path, model)
    assert [type(m) for m in model] == [type(m) for m in saved]
    assert_same_state(model, saved)
    assert (model[0].activation, type(model[1])) == (
        ("relu", FusedActivation) if fused else ("none", nn.ReLU)
    )
    x = floats(5, 64)
    assert_same_bits(model(x), saved(x))


def test_a_model_with_another_fused_activation_gets_the_one_in_the_file(path: Path) -> None:
    saved = saved_small(path)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    quantize_(model)
    assert "GELU in the model" in refused(path, model)
    model[1] = FusedActivation("gelu", nn.ReLU())
    load(path, model)
    assert (model[0].activation, model[1].activation) == ("relu", "relu")
    assert_same_state(model, saved)


def test_an_activation_that_is_shared_only_in_the_model_is_refused(path: Path) -> None:
    saved_small(path)
    model = other_small()
    model[2].act = model[1]
    assert "'2.act' is a separate module in the file" in refused(path, model)


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("fused", [False, True])
def test_the_format(path: Path, fused: bool) -> None:
    saved_small(path, fusion=Fusion(activations=fused))
    header = metadata_of(path)
    sha256 = header.pop("sha256")
    assert len(bytes.fromhex(sha256)) == 32
    assert header == {
        "format": 3,
        **({"absorbed": {"1": "relu"}} if fused else {}),
        "torchquant": torchquant.__version__,
        "layers": {
            "0": {
                "kind": "linear",
                "format": "int8",
                "in_features": 64,
                "out_features": 64,
                "bias": True,
                "activation": "relu" if fused else "none",
                "config": {
                    "type": "QuantizationConfig",
                    "weights": {
                        "type": "Weights",
                        "bits": 8,
                        "symmetric": True,
                        "narrow_range": None,
                        "granularity": {"type": "PerAxis", "axis": 0},
                    },
                    "activations": {"type": "Dynamic", "bits": 8, "symmetric": False},
                },
            }
        },
        "aliases": {},
    }
    tensors = safetensors.torch.load_file(path)
    assert {key: tensor.dtype for key, tensor in tensors.items()} == {
        "0.bias": torch.float32,
        "0.qweight": torch.int8,
        "0.weight_scale": torch.float32,
        "2.bias": torch.float32,
        "2.weight": torch.float32,
    }


def test_a_crash_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved_small(path)
    content = path.read_bytes()

    def fail(tensors: Any, filename: Path, metadata: Any) -> None:
        Path(filename).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("torchquant.files.save.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(other_small(), path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(other_small(), path)
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing is left behind"
    assert_same_state(load(path, small()), model)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_file_has_the_usual_permissions(path: Path) -> None:
    mask = os.umask(0o027)
    try:
        saved_small(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    monkeypatch.chdir(tmp_path)
    save(model, "relative")
    load("relative", other_small())
    (tmp_path / "folder").mkdir()
    for bad, error, text in [
        ("folder", IsADirectoryError, "save: path must name a file, got the folder 'folder'"),
        (
            "missing/file",
            FileNotFoundError,
            "save: path must be in an existing folder, got 'missing/file'",
        ),
    ]:
        with pytest.raises(error) as raised:
            save(model, bad)
        assert str(raised.value) == text
    for bad in ("folder", "missing/file", "missing"):
        with pytest.raises(FileNotFoundError) as raised:
            load(bad, model)
        assert str(raised.value) == f"load: path must name a file that exists, got {bad!r}"


@pytest.mark.parametrize("verb", [save, load], ids=["save", "load"])
def test_arguments_that_are_not_a_model(verb: Callable[..., Any], path: Path) -> None:
    arguments = ({}, path) if verb is save else (path, {})
    with pytest.raises(TypeError, match=f"{verb.__name__}: model must be an nn.Module, got dict"):
        verb(*arguments)


def test_a_model_on_the_meta_device_is_not_saved(path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        save(small().to("meta"), path)
    assert str(raised.value) == (
        "save: tensors must have values, got '0.weight' on the meta device; load the model first"
    )
    assert not path.exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_that_no_file_can_hold(path: Path) -> None:
    values = [torch.eye(4).to_sparse()]
    if hasattr(torch, "qint8"):  # torch plans to remove quantized tensors
        values.append(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    for value in values:
        model = nn.Sequential(nn.Linear(64, 64))
        model.register_buffer("odd", value)
        quantize_(model)
        with pytest.raises(ValueError, match="save: tensors must be dense, got 'odd' of torch"):
            save(model, path)


# ---------------------------------------------------------------- damaged files


def refused(path: Path, model: nn.Module, match: str | None = None) -> str:
    with unchanged(model), pytest.raises(ValueError, match=match) as raised:
        load(path, model)
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_a_truncated_file(path: Path) -> None:
    saved_small(path)
    content = path.read_bytes()
    model = other_small()
    step = 97
    for length in {0, 1, 7, 8, 9, *range(10, len(content), step), len(content) - 1}:
        path.write_bytes(content[:length])
        refused(path, model, "must be a complete safetensors file")
    path.write_bytes(content + b"\0")
    refused(path, model, "must be a complete safetensors file")


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF], ids=hex)
def test_an_edited_byte_anywhere(path: Path, mask: int) -> None:
    saved = saved_small(path)
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    model = other_small()
    positions = [*range(header), *range(header, len(content), 211)]
    accepted = []
    for position in positions:
        content[position] ^= mask
        path.write_bytes(content)
        content[position] ^= mask
        try:
            with unchanged(model):
                load(path, model)
                accepted.append(position)
                raise ValueError  # skip the checks below, because the model was changed
        except ValueError:
            pass
        except AssertionError:
            assert position in accepted
            assert_same_state(model, saved)
            model = other_small()
    # Only if the edited JSON header has the same meaning, for example a change of white space.
    assert all(position < header for position in accepted)
    assert len(accepted) <= 2


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "must be a complete safetensors file"),
    "text": (lambda path: path.write_text("hello" * 50), "must be a complete safetensors file"),
    "torch_save": (
        lambda path: torch.save(small().state_dict(), path),
        "must be a complete safetensors file",
    ),
    "no_metadata": (
        lambda path: write(path, small().state_dict(), None),
        "must be a file that torchquant.save wrote, but its metadata has no 'torchquant' entry; "
        "load a plain float checkpoint with safetensors.torch.load_model",
    ),
    "other_metadata": (
        lambda path: write(path, small().state_dict(), {"format": "pt"}),
        "must be a file that torchquant.save wrote",
    ),
    "no_tensors": (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"), "torchquant.save"),
}


@pytest.mark.parametrize(("make", "text"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file(path: Path, make: Callable[[Path], Any], text: str) -> None:
    make(path)
    assert text in refused(path, other_small())


DAMAGED = "has damaged torchquant metadata; save the model again"
CHANGED = "was changed after it was saved (its checksum does not match); save the model again"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"format"', "[" * 100_000, '{"format": 1' + "0" * 5000 + "}"],
    ids=["empty", "open", "list", "number", "null", "text", "deep", "huge_number"],
)
def test_metadata_that_is_not_an_object(path: Path, text: str) -> None:
    saved_small(path)
    write(path, safetensors.torch.load_file(path), {"torchquant": text})
    assert DAMAGED in refused(path, other_small())


def setting(key: str, value: Any) -> Callable[[dict[str, Any], Any], None]:
    def edit(header: dict[str, Any], tensors: Any) -> None:
        header[key] = value

    return edit


def deeply_nested() -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(400):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda header, tensors: header.pop("format"), DAMAGED),
        (setting("format", None), DAMAGED),
        (setting("format", "1"), DAMAGED),
        (setting("format", 1.0), DAMAGED),
        (setting("format", True), DAMAGED),
        (setting("format", [1]), DAMAGED),
        (
            setting("format", 4),
            "has format 4, but this torchquant reads formats 1 to 3; install a newer torchquant",
        ),
        (setting("format", 1), DAMAGED),  # format 1 has no "absorbed"
        (setting("format", 0), "has format 0, but this torchquant reads formats 1 to 3"),
        (setting("absorbed", None), DAMAGED),
        (setting("absorbed", ["1"]), DAMAGED),
        (setting("absorbed", "1"), DAMAGED),
        (setting("projections", None), DAMAGED),
        (setting("projections", {"0": "2"}), DAMAGED),
        (setting("projections", ["02"]), DAMAGED),
        (setting("projections", [["0", 2]]), DAMAGED),
        (
            setting("projections", [["0", "2"], [], ["9"], ["", "0"]]),
            None,
        ),  # a reader may ignore it
        (lambda header, tensors: header.pop("layers"), DAMAGED),
        (setting("layers", []), DAMAGED),
        (setting("layers", "0"), DAMAGED),
        (setting("layers", None), DAMAGED),
        (lambda header, tensors: header.pop("aliases"), DAMAGED),
        (setting("aliases", [["a", "b"]]), DAMAGED),
        (setting("aliases", {"new": "nothing"}), DAMAGED),
        (setting("aliases", {"new": ["0.bias"]}), DAMAGED),
        (setting("aliases", {"new": {}}), DAMAGED),
        (setting("aliases", {"new": None}), DAMAGED),
        (setting("aliases", {"2.bias": "0.bias"}), DAMAGED),
        (setting("aliases", {"new": "0.bias"}), "unknown new"),
        (setting("nested", deeply_nested()), None),
    ],
)
def test_metadata_of_wrong_types(path: Path, edit: Callable[..., Any], text: str | None) -> None:
    saved = saved_small(path)
    rewrite(path, edit)
    if text is None:  # keys that a reader ignores are accepted if the checksum matches
        assert_same_state(load(path, other_small()), saved)
    else:
        assert text in refused(path, other_small())


@pytest.mark.parametrize("value", [None, 3, "", "0" * 64, []])
def test_a_checksum_of_another_file(path: Path, value: Any) -> None:
    saved_small(path)
    rewrite(path, setting("sha256", value), sign=False)
    text = CHANGED if isinstance(value, str) else DAMAGED
    assert text in refused(path, other_small())


@pytest.mark.parametrize(
    "edit",
    [
        lambda header, tensors: header["layers"]["0"].update(activation="gelu"),
        lambda header, tensors: header["absorbed"].update({"1": "gelu"}),
        lambda header, tensors: header.pop("absorbed"),
        lambda header, tensors: header["layers"]["0"]["config"]["weights"].update(bits=4),
        lambda header, tensors: header["aliases"].update({"0.weight_scale": "0.bias"}),
        lambda header, tensors: header.update(torchquant="9.9"),
        lambda header, tensors: tensors["0.qweight"][3, 5].add_(1),
        lambda header, tensors: tensors.update({"0.bias": tensors["0.bias"].view(torch.int32)}),
        lambda header, tensors: tensors.update({"2.weight": tensors["2.weight"].view(64, 8)}),
        lambda header, tensors: tensors.update({"2.bios": tensors.pop("2.bias")}),
        lambda header, tensors: tensors.update(more=torch.zeros(1)),
        lambda header, tensors: tensors.pop("0.bias"),
    ],
    ids=[
        "activation",
        "absorbed",
        "not_absorbed",
        "config",
        "alias",
        "version",
        "value",
        "dtype",
        "shape",
        "name",
        "more",
        "fewer",
    ],
)
def test_the_checksum_covers_everything(path: Path, edit: Callable[..., Any]) -> None:
    saved_small(path)
    rewrite(path, edit, sign=False)
    message = refused(path, other_small())
    assert CHANGED in message or DAMAGED in message


# ---------------------------------------------------------------- valid files that do not fit


def entry(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"]["0"].update(values)


def config(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"]["0"]["config"].update(values)


def weights(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"]["0"]["config"]["weights"].update(values)


def named(name: str) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"].update({name: header["layers"].pop("0")})


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (setting("layers", {"0": None}), "the entry of layer '0' is not valid"),
        (setting("layers", {"0": 3}), "the entry of layer '0' is not valid"),
        (setting("layers", {"0": "text"}), "the entry of layer '0' is not valid"),
        (setting("layers", {"0": []}), "the entry of layer '0' is not valid"),
        (setting("layers", {"0": {}}), "the entry of layer '0' is not valid ('kind')"),
        (entry(in_features=2**40), f"'0' has in_features={2**40} in the file, 64 in the model"),
        (entry(out_features=2**62), f"out_features={2**62} in the file, 64 in the model"),
        (entry(in_features=-64), "'0' has in_features=-64 in the file"),
        (entry(in_features=0), "'0' has in_features=0 in the file"),
        (entry(in_features="64"), "'0' has in_features='64' in the file, 64 in the model"),
        (entry(in_features=64.0), "'0' has in_features=64.0 in the file, 64 in the model"),
        (entry(in_features=None), "'0' has in_features=None in the file"),
        (entry(in_features=[64]), "'0' has in_features=[64] in the file"),
        (entry(bias=False), "'0' has bias=False in the file, True in the model"),
        (entry(bias="yes"), "bias"),
        (entry(activation="mish"), "activation must be one of none, relu, gelu, gelu_tanh, silu"),
        (entry(activation=None), "activation must be one of"),
        (entry(activation=[]), "the entry of layer '0' is not valid"),
        (entry(config=None), "the entry of layer '0' is not valid"),
        (entry(config="int8"), "the entry of layer '0' is not valid"),
        (entry(config={}), "configuration type must be one of"),
        (config(type="Int4Config"), "got 'Int4Config'; the file may be from a newer torchquant"),
        (config(type=[]), "the entry of layer '0' is not valid"),
        (config(bits=4), "configuration QuantizationConfig does not fit this"),
        (weights(symmetric="yes"), "symmetric must be True or False, got 'yes'"),
        (weights(symmetric=False), "missing 0.weight_zero_point"),
        (
            entry(kind="conv7d"),
            "kind of layer must be one of linear, got 'conv7d'; the file may be",
        ),
        (entry(kind=[]), "the entry of layer '0' is not valid"),
        (entry(format="int3"), "weight format must be 'int8', got 'int3'; the file may be from a"),
        (named("1"), "a quantized linear layer at '1' in the file, ReLU in the model"),
        (named("7"), "a quantized linear layer at '7' in the file, nothing in the model"),
        (named(""), "a quantized linear layer at the root in the file, Sequential in the model"),
        (named("0."), "a quantized linear layer at '0.' in the file, nothing in the model"),
        (named("__class__"), "at '__class__' in the file, nothing in the model"),
        (named("\0"), "in the file, nothing in the model"),
        (named("2"), "'2' has out_features=64 in the file, 8 in the model"),
        (
            setting("absorbed", {"1": "gelu"}),
            "a fused activation 'gelu' at '1' in the file, ReLU in the model",
        ),
        (
            setting("absorbed", {"1": 3}),
            "a fused activation 3 at '1' in the file, ReLU in the model",
        ),
        (setting("absorbed", {"1": None}), "activation None at '1' in the file, ReLU in the model"),
        (setting("absorbed", {"1": []}), "activation [] at '1' in the file, ReLU in the model"),
        (setting("absorbed", {"0": "relu"}), "computes at '0' in the file"),
        (setting("absorbed", {"9": "relu"}), "computes at '9' in the file, nothing in the model"),
        (setting("absorbed", {"": "relu"}), "computes at '' in the file, Sequential in the model"),
        (setting("layers", {}), "missing 0.weight; unknown 0.qweight, 0.weight_scale"),
    ],
)
def test_invalid_entries(path: Path, edit: Callable[..., Any], text: str) -> None:
    saved_small(path)
    rewrite(path, edit)
    message = refused(path, other_small())
    assert "does not fit the model: " in message
    assert text in message


def tensor(key: str, value: Tensor) -> Callable[[Any, dict[str, Tensor]], None]:
    return lambda header, tensors: tensors.update({key: value})


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            tensor("0.qweight", torch.zeros(64, 64)),
            "0.qweight is float32 [64, 64] in the file, int8 [64, 64] in the model",
        ),
        (
            tensor("0.qweight", torch.zeros(64, 64, dtype=torch.uint8)),
            "0.qweight is uint8 [64, 64] in the file, int8 [64, 64] in the model",
        ),
        (
            tensor("0.qweight", torch.zeros(64, 65, dtype=torch.int8)),
            "0.qweight is int8 [64, 65] in the file, int8 [64, 64] in the model",
        ),
        (
            tensor("0.weight_scale", torch.zeros(64, dtype=torch.int8)),
            "0.weight_scale is int8 [64] in the file, float32 [64] in the model",
        ),
        (
            tensor("2.weight", torch.zeros(8, 64, dtype=torch.int64)),
            "2.weight is int64 [8, 64] in the file, float32 [8, 64] in the model",
        ),
        (
            tensor("2.bias", torch.zeros(8, dtype=torch.complex64)),
            "2.bias is complex64 [8] in the file, float32 [8] in the model",
        ),
        (
            tensor("2.bias", torch.zeros(8, dtype=torch.float8_e4m3fn)),
            "2.bias is float8_e4m3fn [8] in the file, float32 [8] in the model",
        ),
        (tensor("more", torch.zeros(1)), "unknown more"),
        (lambda header, tensors: tensors.pop("0.weight_scale"), "missing 0.weight_scale"),
        (lambda header, tensors: tensors.pop("0.qweight"), "missing 0.qweight"),
        (lambda header, tensors: tensors.pop("2.bias"), "missing 2.bias"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("meta", [False, True], ids=["cpu", "meta"])
def test_tensors_that_do_not_fit(
    path: Path, edit: Callable[..., Any], text: str, quantized: bool, meta: bool
) -> None:
    saved_small(path)
    rewrite(path, edit)
    model = other_small()
    if quantized:
        quantize_(model)
    if meta:
        model.to("meta")
    assert text in refused(path, model)


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()), "unknown 2.bias, 2.weight"),
        (lambda: nn.Sequential(*small(), nn.Linear(8, 8)), "missing 3.bias, 3.weight"),
        (
            lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9)),
            "2.weight is float32 [8, 64] in the file, float32 [9, 64] in the model",
        ),
        (
            lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)),
            "'0' has out_features=64 in the file, 32 in the model",
        ),
        (
            lambda: nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 8)),
            "'0' has bias=True in the file, False in the model",
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(64, 64, 1), nn.ReLU(), nn.Linear(64, 8)),
            "a quantized linear layer at '0' in the file, Conv1d in the model",
        ),
        (
            lambda: nn.Sequential(Subclass(64, 64), nn.ReLU(), nn.Linear(64, 8)),
            "a quantized linear layer at '0' in the file, Subclass in the model",
        ),
        (
            lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.LazyLinear(8)),
            "uninitialized parameter",
        ),
        (lambda: nn.Linear(64, 64), "at '0' in the file, nothing in the model"),
        (lambda: nn.Sequential(), "at '0' in the file, nothing in the model"),
    ],
)
def test_another_model(path: Path, make: Callable[[], nn.Module], text: str) -> None:
    saved_small(path)
    model = make()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError) as raised:
        load(path, model)
    assert text in str(raised.value)
    assert str(raised.value).endswith(
        "build the model that was saved (torchquant.quantize_ is not needed before load)"
    )
    assert dict(model.named_modules()) == modules


def test_a_float_file_for_a_quantized_model(path: Path) -> None:
    save(small(), path)
    model = other_small()
    quantize_(model)
    assert "missing 0.qweight, 0.weight_scale; unknown 0.weight" in refused(path, model)


class RaisesOnLoad(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def _load_from_state_dict(self, *arguments: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [MemoryError("full"), KeyboardInterrupt(), KeyError("mine")])
def test_a_failed_load_is_undone(path: Path, error: BaseException) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 32), RaisesOnLoad(error))
        model.tied = nn.Linear(64, 64)
        model.tied.weight = model[0].weight
        return model

    source = make()
    quantize_(source, filter_fn=lambda module, name: name == "0")
    save(source, path)
    for quantized in (False, True):
        model = make()
        if quantized:
            quantize_(model, ASYMMETRIC, filter_fn=lambda module, name: name == "0")
        hook = model[0].register_forward_hook(lambda *_: None)
        with torch.no_grad():
            model[1].weight_ih_l0.mul_(2)  # the values in the file are different
        x = floats(5, 2, 64)
        expected = model[1](x)[0]
        with unchanged(model), pytest.raises(type(error)):
            load(path, model)
        assert torch.equal(model[1](x)[0], expected), "LSTM's own list included"
        hook.remove()


# ---------------------------------------------------------------- plain torch


def test_torch_save_and_load_with_weights_only(tmp_path: Path) -> None:
    model = trained()
    quantize_(model, ASYMMETRIC)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = LanguageModel().eval()
    quantize_(other, ASYMMETRIC)
    other.load_state_dict(state)
    assert_same_state(other, model)
    assert torch.equal(other(TOKENS), model(TOKENS))
