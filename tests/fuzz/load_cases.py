"""Broken model files for the fuzzer of ``torchquant.load``: turns bytes into a file.

A file with flipped bytes only reaches the test of the checksum. So the bytes of a case are read as
decisions: which model to save, what to change in the parsed file (lengths, the JSON header, dtypes,
shapes, offsets, torchquant's metadata, values), and whether to compute the checksum again. Any
bytes are a valid case, so a coverage-guided fuzzer can mutate them and a random generator can draw
them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchquant
from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import QuantizationConfig
from torchquant.nn.fused import FusedActivation


class Decisions:
    """Numbers and choices read from bytes; zeros after the last byte."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)

    def byte(self) -> int:
        return (self.stream.read(1) or b"\0")[0]

    def below(self, limit: int) -> int:
        width = (max(limit - 1, 1).bit_length() + 7) // 8
        return int.from_bytes(self.stream.read(width), "little") % max(limit, 1)

    def pick(self, choices: Any) -> Any:
        """A copy of one of the choices; later decisions may change the copy."""
        return copy.deepcopy(choices[self.below(len(choices))])

    def rest(self) -> bytes:
        return self.stream.read()


# ---------------------------------------------------------------- models and their files


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.first(x)))  # type: ignore[no-any-return]


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 20, bias=False))


def _half() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16()


def _active() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": _plain,
    "tied": Tied,
    "half": _half,
    "active": _active,
}
CONFIGS = (Config(), Config(weight_symmetric=False))


def model_of(number: int, quantized: bool) -> nn.Module:
    model = list(MODELS.values())[number % len(MODELS)]()
    if quantized:
        quantize(model, CONFIGS[number // len(MODELS) % len(CONFIGS)])
    return model.eval()


def quantize(model: nn.Module, config: QuantizationConfig) -> None:
    """Quantize all linear layers that are not shared; a GELU becomes part of the first one."""
    fused = next((module for module in model.modules() if type(module) is nn.GELU), None)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "head":
            activation = "gelu" if fused and name == "0" else "none"
            layer = torchquant.nn.QuantizedLinear.from_float(module, config, activation)
            for parent in model.modules():
                for key, child in list(parent._modules.items()):
                    if child is module:
                        setattr(parent, key, layer)
    if fused is not None:
        model.add_module("1", FusedActivation("gelu", fused))


@cache
def seed_file(number: int, quantized: bool) -> bytes:
    """The bytes of a valid file."""
    torch.manual_seed(number)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        torchquant.save(model_of(number, quantized), path)
        return path.read_bytes()


# ---------------------------------------------------------------- a file in pieces

Pairs = list[tuple[Any, Any]]  # a JSON object in which a name may occur twice


class File:
    """The parts of a safetensors file: tensors' entries, torchquant's metadata, data."""

    def __init__(self, content: bytes) -> None:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        self.metadata: Any = json.loads(header.pop("__metadata__")["torchquant"])
        self.tensors: Pairs = list(header.items())
        self.data = bytearray(content[8 + length :])

    def compact(self) -> None:
        """Store every tensor's bytes once and in order, as safetensors requires."""
        data = bytearray()
        for at, (key, entry) in enumerate(self.tensors):
            begin, end = entry["data_offsets"]
            own = self.data[begin:end]
            place = [len(data), len(data) + len(own)]
            self.tensors[at] = (key, {**entry, "data_offsets": place})
            data += own
        self.data = data

    def sign(self) -> None:
        """Write the matching checksum into the metadata, as ``torchquant.save`` does."""
        if not isinstance(self.metadata, dict):
            return
        rest = {key: value for key, value in self.metadata.items() if key != "sha256"}
        names = {"F32": "float32", "BF16": "bfloat16", "I8": "int8", "I32": "int32", "I64": "int64"}
        names |= {"F64": "float64", "F16": "float16", "U8": "uint8", "BOOL": "bool"}
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
        for key, entry in sorted(dict(self.tensors).items()):
            begin, end = entry["data_offsets"]
            dtype = names.get(entry["dtype"], entry["dtype"].lower())
            digest.update(f"{key}\0torch.{dtype}\0{entry['shape']}\0".encode())
            digest.update(self.data[begin:end])
        self.metadata["sha256"] = digest.hexdigest()

    def content(self, metadata_text: str | None = None) -> tuple[bytes, bytes]:
        """The header and the data."""
        text = json.dumps(self.metadata) if metadata_text is None else metadata_text
        pairs: Pairs = [("__metadata__", {"torchquant": text}), *self.tensors]
        members = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs)
        return ("{" + ", ".join(members) + "}").encode("utf-8", "surrogatepass"), bytes(self.data)


# ---------------------------------------------------------------- what can be wrong

ODD_NUMBERS = (0, 1, -1, 2, 15, 17, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64)
ODD_VALUES: tuple[Any, ...] = (
    *ODD_NUMBERS,
    *(None, True, False, "", "none", "gelu", "0", "\0", "\ud800", "é" * 300, 0.5, 1e308, -0.0),
    *(float("nan"), float("inf"), [], {}, [[]], [0], {"": 0}, [1] * 1000, 10**30, "a" * 70000),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "U32", "U64")
ODD_DTYPES = (*DTYPES, "F8_E4M3", "F8_E5M2", "F4", "C64", "", "f32", "F128", 7, None)
SHAPES: tuple[Any, ...] = (
    *([], [0], [1], [16], [20, 16], [16, 16, 1], [2**32, 2**32], [2**63], [-1], [0, 2**62], [1.5]),
    *([1] * 64, [1] * 5000, ["16"], None, 16, [None], [2**40], [[16]], [True, 256]),
)


def edit_entry(file: File, decide: Decisions) -> None:
    """Change a tensor's dtype, shape, offsets or name."""
    if not file.tensors:
        return
    at = decide.below(len(file.tensors))
    key, entry = file.tensors[at]
    entry = dict(entry) if isinstance(entry, dict) else {}
    what = decide.below(8)
    if what == 0:
        entry["dtype"] = decide.pick(ODD_DTYPES)
    elif what == 1:
        entry["shape"] = decide.pick(SHAPES)
    elif what == 2:
        entry["data_offsets"] = [decide.below(2 * len(file.data) + 1) for _ in range(2)]
    elif what == 3:
        entry["data_offsets"] = [decide.pick(ODD_NUMBERS) for _ in range(1 + decide.below(3))]
    elif what == 4:
        key = decide.pick(("", "0.qweight", "bias", "é", "\ud800", "a\0b", "a" * 5000, "0..weight"))
    elif what == 5:
        entry = decide.pick(ODD_VALUES)
    elif what == 6:
        entry.pop(decide.pick(("dtype", "shape", "data_offsets")), None)
    else:
        entry[decide.pick(("dtype", "shape", "data_offsets", "more"))] = decide.pick(ODD_VALUES)
    file.tensors[at] = (key, entry)


def edit_tensors(file: File, decide: Decisions) -> None:
    """Remove, repeat or reorder tensors, or give a tensor the data of another one."""
    if not file.tensors:
        return
    at, other = decide.below(len(file.tensors)), decide.below(len(file.tensors))
    what = decide.below(5)
    if what == 0:
        del file.tensors[at]
    elif what == 1:
        file.tensors.append(file.tensors[at])
    elif what == 2:
        file.tensors[at], file.tensors[other] = file.tensors[other], file.tensors[at]
    elif what == 3:
        file.tensors[at] = (file.tensors[other][0], file.tensors[at][1])
    else:
        file.tensors.append((decide.pick(("new", "0.weight", "2.bias")), file.tensors[at][1]))


def reshape(file: File, decide: Decisions) -> None:
    """Give a tensor another dtype or shape of the same size: a valid file with wrong content."""
    if not file.tensors:
        return
    at = decide.below(len(file.tensors))
    key, entry = file.tensors[at]
    if not isinstance(entry, dict) or not isinstance(entry.get("data_offsets"), list):
        return
    offsets = entry["data_offsets"]
    if len(offsets) != 2 or not all(isinstance(offset, int) for offset in offsets):
        return
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
    dtype = decide.pick(DTYPES[:10])
    count = (offsets[1] - offsets[0]) // sizes.get(dtype, 1)
    shape = decide.pick(([count], [count, 1], [1, count], [count // 16, 16], [16, count // 16]))
    file.tensors[at] = (key, {**entry, "dtype": dtype, "shape": shape})


def edit_values(file: File, decide: Decisions) -> None:
    """Change bytes of the data: scales become NaN, infinity or at most 0, zero points too large."""
    if not file.data:
        return
    patterns = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80")
    for _ in range(1 + decide.below(4)):
        pattern = (*patterns, b"\x80", b"\xff" * 64, b"\1\0\0\0")[decide.below(8)]
        at = decide.below(max(1, len(file.data) - len(pattern) + 1))
        file.data[at : at + len(pattern)] = pattern[: len(file.data) - at]


def edit_data_size(file: File, decide: Decisions) -> None:
    if decide.byte() % 2:
        file.data += bytes(decide.below(300))
    else:
        del file.data[decide.below(len(file.data) + 1) :]


def edit_metadata(file: File, decide: Decisions) -> None:
    """Replace, remove, rename or add a value anywhere in torchquant's metadata."""
    holder, key, value = None, None, file.metadata
    for _ in range(decide.below(6)):
        if isinstance(value, dict) and value:
            holder, key = value, decide.pick(list(value))
        elif isinstance(value, list) and value:
            holder, key = value, decide.below(len(value))
        else:
            break
        value = holder[key]
    what = decide.below(6)
    if holder is None:
        if what == 0:
            file.metadata = decide.pick(ODD_VALUES)
        return
    if what <= 2:
        holder[key] = decide.pick(ODD_VALUES)
    elif what == 3:
        del holder[key]
    elif isinstance(holder, dict):
        names = ("0", "1", "", "head", "embedding", "first", "again", "again.qweight", "type", "x")
        if what == 4:
            holder[decide.pick(names)] = holder.pop(key)
        else:
            holder[decide.pick(names)] = decide.pick((*ODD_VALUES, *holder.values()))


def edit_aliases(file: File, decide: Decisions) -> None:
    if isinstance(file.metadata, dict):
        names = [str(key) for key, _ in file.tensors] + ["nothing", "head.weight", "0.qweight", ""]
        aliases = file.metadata.setdefault("aliases", {})
        if isinstance(aliases, dict):
            aliases[decide.pick(names)] = decide.pick(names)


EDITS = (
    *(edit_entry, edit_tensors, edit_tensors, reshape, reshape, reshape, edit_values, edit_values),
    *(edit_data_size, edit_metadata, edit_metadata, edit_metadata, edit_metadata, edit_aliases),
)
ODD_TEXTS = (
    *(
        "",
        "{",
        "null",
        "[]",
        "{}",
        '"',
        "[" * 100_000,
        '{"a":' * 100_000,
        "NaN",
        "1e999",
        "\\ud800",
    ),
    *('{"format": 1}', '{"format": ' + "9" * 5000 + "}", '{"format": 1, "format": 2}', "\0"),
)


# ---------------------------------------------------------------- a case


def file_of(data: bytes) -> tuple[bytes, nn.Module]:
    """The file of a case, and a model to load it into."""
    decide = Decisions(data)
    number, kind = decide.below(8), decide.byte()
    quantized, into_quantized = kind % 8 != 0, kind % 16 > 12
    model = model_of(number, into_quantized)
    content = seed_file(number, quantized)
    mode = decide.below(16)
    if mode == 0:  # arbitrary bytes
        return decide.rest(), model
    if mode == 1:  # a valid file with other bytes somewhere
        at, bytes_there = decide.below(len(content)), decide.rest()
        return content[:at] + bytes_there + content[at + len(bytes_there) :], model
    if mode == 2:
        return content[: decide.below(len(content))], model
    file = File(content)
    for _ in range(decide.below(4) + (mode != 3)):
        decide.pick(EDITS)(file, decide)
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # file too odd
        if decide.below(4):
            file.compact()
        if decide.below(8):
            file.sign()
    text = decide.pick(ODD_TEXTS) if decide.below(32) == 1 else None
    header, rest = file.content(text)
    what = decide.below(32)
    if what == 1:
        header = decide.pick(ODD_TEXTS).encode("utf-8", "surrogatepass")
    elif what == 2:
        at = decide.below(len(header))
        header = header[:at] + bytes([decide.byte()]) + header[at + 1 :]
    length = len(header)
    if decide.below(32) == 1:
        odd = (0, 1, 7, length - 1, length + 1, length + len(rest), 100_000_001, 2**63, 2**64 - 1)
        length = decide.pick(odd)
    return struct.pack("<Q", length) + header + rest, model
