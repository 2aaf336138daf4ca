"""The file format: canonical tensors in safetensors, with JSON metadata that describes them.

A file is a plain safetensors file. Its metadata has one key, ``torchquant``, a JSON object::

    {"format": 5, "torchquant": "0.1.0",
     "layers": {"encoder.0": {"kind": "linear", "format": "int8", "dtype": "float32",
                              "in_features": 384, "out_features": 1536, "bias": true,
                              "activation": "none",
                              "config": {"type": "QuantizationConfig", "weights": {...}, ...}}},
     "activations": {"encoder.1": "gelu"},
     "folded": ["stem.norm"],
     "projections": [["attention.q", "attention.k", "attention.v"]],
     "aliases": {"head.weight": "embedding.weight"},
     "buffers": {"positions": "buffers/positions"},
     "sha256": "..."}

``layers`` has an entry for each quantized layer: its kind (:mod:`torchquant.nn.kinds`), the format
of its weight (:mod:`torchquant.nn.weight`), the dtype in which it works (that of its readable
``weight``), the arguments of its constructor, and its configuration in parts
(:mod:`torchquant.configs`). ``activations`` maps the name of each activation module that
uses the library's operator to the name of its function. ``absorbed``, which older versions wrote,
does so for modules that became part of the preceding layer for good; they are identities.
``folded`` lists the batch norms that became part of the layer before them; they are identities
without tensors, and the layer has a bias. ``folded_dimensions`` maps the names of some of them to
the number of dimensions that their inputs must have. ``regions`` maps the name of each module
whose values stay int8 between layers to what its first batch showed
(:mod:`torchquant.files.regions`). ``attentions`` lists the attention modules whose projections are
layers of their own, and which were ``nn.MultiheadAttention``. ``projections`` lists the layers
that are computed together, in the order of their calls; a reader MAY ignore it. ``aliases`` maps
keys to the key whose tensor they share; the tensor is stored once.
``buffers`` maps the name of each non-persistent buffer to the key of its tensor. A reader uses them
only where a model has no values: a buffer that has values is not replaced.
``sha256`` covers the rest of this object and the name, dtype, shape and bytes of every tensor, so
that a damaged or edited file is refused. It is not a signature: an attacker can write a new one.
``activations``, ``absorbed``, ``folded``, ``folded_dimensions``, ``attentions``, ``projections``
and ``buffers`` are absent if they would be empty. A reader MUST refuse a higher ``format`` than its
own.
:mod:`torchquant.files.entries` reads older formats:

- Format 5 added ``attentions``, the weight format ``intx``, and configurations whose
  ``activations`` are null. A file without them is written as format 4, which older versions read.
- Format 4 calls the scales and zero points of a weight ``qweight_scale`` and
  ``qweight_zero_point``, and the quantizer of a trained weight ``qweight_quantizer``. Formats 1 to
  3 call them ``weight_scale``, ``weight_zero_point`` and ``weight_quantizer``.
- Formats 1 to 3 have no ``dtype``; their biases are float32.
- Formats 1 and 2 hold linear layers with other configurations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from torchquant.report.progress import track

FORMAT = 5
_BEFORE = 4
_OLDEST = 1
KEY = "torchquant"


def needed_format(layers: Mapping[str, Mapping[str, Any]], attentions: bool = False) -> int:
    """The lowest format in which layers with these entries can be stored.

    Args:
        layers: the entries.
        attentions: whether the model has attention modules whose projections became layers.

    Example:
        >>> needed_format({"fc": {"format": "int8"}}), needed_format({"fc": {"format": "intx"}})
        (4, 5)
    """
    new = attentions or any(entry.get("format") == "intx" for entry in layers.values())
    return FORMAT if new else _BEFORE


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a file's metadata (without the key ``sha256``) and tensors, in hexadecimal."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    hashed = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for key in track(sorted(tensors), "checksum"):
        tensor = tensors[key]
        hashed.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check a file.

    Returns:
        The tensors, which are views of the mapped file, and the metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, damaged, edited, from a newer torchquant, or was not
            written by :func:`torchquant.save`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"load: path must name a file that exists, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except PermissionError:
        raise
    except Exception as error:  # SafetensorError, or torch's error for impossible sizes
        raise ValueError(
            f"load: {str(path)!r} must be a complete safetensors file, but it is truncated, "
            f"damaged or of another kind ({error})"
        ) from None
    if KEY not in metadata:
        raise ValueError(
            f"load: {str(path)!r} must be a file that torchquant.save wrote, but its metadata has "
            f"no {KEY!r} entry; load a plain float checkpoint with safetensors.torch.load_model"
        )
    return tensors, _parse_header(path, metadata[KEY], tensors)


def _parse_header(path: Path, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    damaged = f"load: {str(path)!r} has damaged torchquant metadata; save the model again"
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(damaged) from None
    if not isinstance(header, dict) or type(header.get("format")) is not int:
        raise ValueError(damaged)
    if not _OLDEST <= header["format"] <= FORMAT:
        raise ValueError(
            f"load: {str(path)!r} has format {header['format']}, but this torchquant reads formats "
            f"{_OLDEST} to {FORMAT}; install a newer torchquant"
        )
    aliases = header.get("aliases")
    if not (
        isinstance(header.get("layers"), dict)
        and isinstance(header.get("absorbed", {}), dict)
        and isinstance(header.get("activations", {}), dict)
        and _is_list_of_lists_of_names([header.get("folded", [])])
        and isinstance(header.get("folded_dimensions", {}), dict)
        and all(type(count) is int for count in header.get("folded_dimensions", {}).values())
        and isinstance(header.get("regions", {}), dict)
        and _is_list_of_lists_of_names(header.get("projections", []))
        and (header["format"] > 1 or not header.keys() & {"absorbed", "activations", "projections"})
        and _is_dict_of_keys(header.get("buffers", {}), tensors)
        and (header["format"] > 2 or "buffers" not in header)
        and isinstance(header.get("sha256"), str)
        and isinstance(aliases, dict)
        and _is_dict_of_keys(aliases, tensors)
        and not aliases.keys() & tensors.keys()
    ):
        raise ValueError(damaged)
    try:
        found = digest(header, tensors)
    except (RuntimeError, RecursionError):  # a dtype or nesting depth that save does not write
        raise ValueError(damaged) from None
    if found != header["sha256"]:
        raise ValueError(
            f"load: {str(path)!r} was changed after it was saved (its checksum does not match); "
            "save the model again"
        )
    return header


def _is_dict_of_keys(value: Any, tensors: Mapping[str, Tensor]) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and key in tensors for key in value.values()
    )


def _is_list_of_lists_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value
    )
