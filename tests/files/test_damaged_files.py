"""Damaged, edited and foreign files are refused, and the model stays as it is."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.layers import assert_same_state, unchanged
from support.model_files import (
    CHANGED,
    DAMAGED,
    other_small,
    refused,
    rewrite,
    saved_small,
    setting,
    small,
    write,
)

from torchquant import load


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
                try:
                    load(path, model)
                except ValueError:
                    continue  # unchanged() checks the model on the way out
                accepted.append(position)
        except AssertionError:  # the model was loaded, so it did change
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


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"format"', "[" * 100_000, '{"format": 1' + "0" * 5000 + "}"],
    ids=["empty", "open", "list", "number", "null", "text", "deep", "huge_number"],
)
def test_metadata_that_is_not_an_object(path: Path, text: str) -> None:
    saved_small(path)
    write(path, safetensors.torch.load_file(path), {"torchquant": text})
    assert DAMAGED in refused(path, other_small())


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
            setting("format", 6),
            "has format 6, but this torchquant reads formats 1 to 5; install a newer torchquant",
        ),
        (setting("format", 1), DAMAGED),  # format 1 has no "activations"
        (setting("format", 0), "has format 0, but this torchquant reads formats 1 to 5"),
        (setting("activations", None), DAMAGED),
        (setting("activations", ["1"]), DAMAGED),
        (setting("absorbed", None), DAMAGED),
        (setting("absorbed", ["1"]), DAMAGED),
        (setting("absorbed", "1"), DAMAGED),
        (setting("projections", None), DAMAGED),
        (setting("buffers", None), DAMAGED),
        (setting("buffers", {"a": 1}), DAMAGED),
        (setting("buffers", {"a": "no such tensor"}), DAMAGED),
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
        lambda header, tensors: header["activations"].update({"1": "gelu"}),
        lambda header, tensors: header.pop("activations"),
        lambda header, tensors: header["layers"]["0"]["config"]["weights"].update(bits=4),
        lambda header, tensors: header["aliases"].update({"0.qweight_scale": "0.bias"}),
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
        "activations",
        "no_activations",
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
