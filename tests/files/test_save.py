"""The file that save writes, and models and paths that save refuses."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.layers import assert_same_state
from support.model_files import metadata_of, other_small, saved_small, small
from torch import nn

import torchquant
from torchquant import Fusion, load, quantize_, save


@pytest.mark.parametrize("fused", [False, True])
def test_the_format(path: Path, fused: bool) -> None:
    saved_small(path, fusion=Fusion(activations=fused))
    header = metadata_of(path)
    sha256 = header.pop("sha256")
    assert len(bytes.fromhex(sha256)) == 32
    assert header == {
        "format": 4,
        **({"activations": {"1": "relu"}} if fused else {}),
        "torchquant": torchquant.__version__,
        "layers": {
            "0": {
                "kind": "linear",
                "format": "int8",
                "dtype": "float32",
                "in_features": 64,
                "out_features": 64,
                "bias": True,
                "activation": "none",
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
        "0.qweight_scale": torch.float32,
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
