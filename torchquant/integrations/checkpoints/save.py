"""save_checkpoint: write a quantized model in the layout of another library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchquant.files.atomic import replacing
from torchquant.files.regions import region_entries
from torchquant.graph.modules import memory_key
from torchquant.integrations.checkpoints.layouts import LAYOUTS, Layout
from torchquant.integrations.checkpoints.report import CheckpointReport, CheckpointRow
from torchquant.integrations.checkpoints.tensors import INDEX
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.folded_norm import FoldedNorm
from torchquant.nn.kinds import kind_of
from torchquant.nn.multihead_attention import MultiheadAttention
from torchquant.report.progress import track

_SHARD = 5_000_000_000


@dataclass
class _Piece:
    """The tensors of one module, made when they are written."""

    name: str
    module: nn.Module
    row: CheckpointRow
    refusal: str | None = None  # of a quantized layer
    tied: bool = False  # to a quantized layer that was written before


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    layout: str,
    scale_dtype: torch.dtype = torch.float32,
    shard_bytes: int = _SHARD,
    progress: bool | None = None,
) -> CheckpointReport:
    """Write a quantized model as a checkpoint that other libraries read.

    The folder gets ``model.safetensors``, or several files and their index, and ``config.json``
    with a ``quantization_config``; the rest of ``config.json`` is that of ``model.config``, if the
    model has one, as transformers' models do. The integers are those of the model. Layers that the
    layout does not hold are written as floats, and the report says why; it is an error if that
    concerns all layers.

    - ``"gptq"``: linear layers of 2, 3, 4 or 8 bits. Version 1 of the zero points is written if
      none is 0, which all readers take; otherwise version 2 (``checkpoint_format: gptq_v2``).
    - ``"awq"``: linear layers of 4 bits, all with the same groups.
    - ``"compressed-tensors"``: linear layers and embeddings of 2 to 8 bits, with int8 activations,
      too. Layers with both in int8 are "int-quantized", others "pack-quantized".

    The layouts "gptq" and "awq" say nothing about activations; a reader leaves them in float.

    Args:
        model: a model with quantized layers.
        path: a folder, which is created if it does not exist. It must hold no safetensors yet.
        layout: "gptq", "awq" or "compressed-tensors".
        scale_dtype: the dtype of scales. float32 keeps the model's values. Other libraries write
            float16 or bfloat16, and convert what they read; scales that these round change the
            weights.
        shard_bytes: the largest size of a file, unless a single layer is larger. No more than that
            is in memory beside the model.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report with a row for each module that has tensors.

    Raises:
        TypeError: model is not a module, or scale_dtype is no float dtype.
        ValueError: layout is unknown, the folder has safetensors, no layer can be written, or the
            model has parts that no layout describes (int8 values between layers, folded batch
            norms, layers in training). Nothing is written.
        OSError: a file cannot be written; the files written before are removed.

    Example:
        >>> import tempfile, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.quantize_(model, torchquant.IntxWeightOnlyConfig(4, group_size=32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = save_checkpoint(model, folder, layout="awq")
        ...     print(*sorted(os.listdir(folder)))
        config.json model.safetensors
        >>> report["0"].action, report["0"].stored
        ('written', 'AWQ, int4 in groups of 32')

    Source:
        The same as of :func:`torchquant.load_checkpoint`.
    """
    who = "save_checkpoint"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")
    if layout not in LAYOUTS:
        raise ValueError(f"{who}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if scale_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"{who}: scale_dtype must be torch.float32, float16 or bfloat16, got {scale_dtype!r}"
        )
    reason = _refusal(model)
    if reason is not None:
        raise ValueError(f"{who}: model must be one that the layout describes, but {reason}")
    folder = Path(path)
    _check_folder(folder)
    chosen = LAYOUTS[layout](model, scale_dtype)
    pieces = list(_pieces(model, chosen))
    if not any(piece.row.action == "written" for piece in pieces):
        reasons = "; ".join(dict.fromkeys(piece.refusal for piece in pieces if piece.refusal))
        raise ValueError(
            f"{who}: the model must have a layer that the layout {layout!r} holds, but "
            f"{reasons or 'it has no quantized layer'}"
        )
    created = not folder.exists()
    folder.mkdir(exist_ok=True)
    written: list[Path] = []
    try:
        sizes = _write(folder, pieces, chosen, shard_bytes, written, progress)
        with replacing(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(_config(model, chosen), indent=2) + "\n")
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        if created:
            folder.rmdir()
        raise
    rows = tuple(
        CheckpointRow(**{**vars(piece.row), "bytes": sizes[piece.name]}) for piece in pieces
    )
    return CheckpointReport(rows, layout, tuple(chosen.notes))


def _refusal(model: nn.Module) -> str | None:
    """What in a model no layout describes, or None."""
    for name, module in model.named_modules():
        if isinstance(module, TrainedModule):
            return f"{name} is in training; call torchquant.convert_(model) first"
        if isinstance(module, QuantizedModule) and module.activation != "none":
            return f"{name} also computes {module.activation}; use torchquant.save(model, path)"
        if isinstance(module, QuantizedModule) and kind_of(module) is None:
            return f"{name} belongs to no kind of layers"
        state = [] if isinstance(module, QuantizedModule) else _own_state(name, module).values()
        if any(not isinstance(value, Tensor) for value in state):
            return f"the state of {name or 'the model'} holds a value that is no tensor"
        own = [*module._parameters.values(), *module._buffers.values()]
        if any(tensor is not None and tensor.is_meta for tensor in own):
            return f"{name or 'the model'} has tensors on the meta device, without values"
        if isinstance(module, FoldedNorm) and module.original is None:
            return f"{name} is a batch norm that became part of a layer; use torchquant.save"
        if isinstance(module, MultiheadAttention) and module.was_separated:
            return f"{name} is an nn.MultiheadAttention whose projections became layers"
    if region_entries(model):
        return "it has int8 values between layers; use torchquant.save(model, path)"
    return None


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_checkpoint: path must be a folder, got {str(folder)!r}")
    if not folder.exists() and not folder.parent.is_dir():
        raise FileNotFoundError(
            f"save_checkpoint: path must be in an existing folder, got {str(folder)!r}"
        )
    if folder.exists():
        found = sorted(
            file.name
            for file in folder.iterdir()
            if file.name.endswith(".safetensors") or file.name == INDEX
        )
        if found:
            raise ValueError(
                f"save_checkpoint: path must be a folder without weights, got {str(folder)!r} with "
                f"{', '.join(found)}; remove them, or choose another folder"
            )


def _pieces(model: nn.Module, layout: Layout) -> Iterator[_Piece]:
    """The modules that have tensors of their own, in the order of the model's modules."""
    shared_before: set[int] = set()
    seen: dict[Any, Tensor] = {}  # keeps tensors alive, so that their addresses stay unique
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, QuantizedModule):
            shared = module.shared_weight
            tied = shared is not None and id(shared) in shared_before
            shared_before.add(id(shared))
            if tied:
                row = CheckpointRow(name, kind, "float", "tied; written once", "", "")
                yield _Piece(name, module, row, tied=True)
                continue
            refusal = layout.refusal(name, module)
            action = "written" if refusal is None else "float"
            stored = layout.form(module) if refusal is None else "floats"
            weights = str(module.config.weights)
            row = CheckpointRow(name, kind, action, refusal or "", stored, weights)  # type: ignore[arg-type]
            yield _Piece(name, module, row, refusal)
            continue
        tensors = {memory_key(value): value for value in _own_state(name, module).values()}
        if not tensors.keys() <= seen.keys():
            yield _Piece(name, module, CheckpointRow(name or "(model)", kind, "float"))
        seen.update(tensors)


def _write(
    folder: Path,
    pieces: list[_Piece],
    layout: Layout,
    shard_bytes: int,
    written: list[Path],
    progress: bool | None,
) -> dict[str, int]:
    """Write the tensors; return the bytes of each module."""
    shard: dict[str, Tensor] = {}
    seen: dict[Any, Tensor] = {}  # keeps tensors alive, so that their addresses stay unique
    sizes: dict[str, int] = {}
    names: list[list[str]] = []
    total = size = 0

    def flush() -> None:
        file = folder / f"part-{len(written)}.safetensors"
        written.append(file)
        with replacing(file) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
        names.append([*shard])
        shard.clear()

    for piece in track(pieces, "save_checkpoint", progress):
        tensors = _tensors(piece, layout)
        own = 0
        for key, tensor in tensors.items():
            tie = memory_key(tensor)
            if tie in seen:
                continue
            if not isinstance(piece.module, QuantizedModule):
                seen[tie] = tensor
            amount = tensor.numel() * tensor.element_size()
            if shard and size + amount > shard_bytes:
                flush()
                size = 0
            shard[key] = tensor.detach().cpu().contiguous().clone()
            size, own = size + amount, own + amount
        sizes[piece.name] = own
        total += own
    flush()
    _rename(folder, written, names, total)
    return sizes


def _tensors(piece: _Piece, layout: Layout) -> dict[str, Tensor]:
    module, prefix = piece.module, f"{piece.name}." if piece.name else ""
    found: dict[str, Any] = {}
    if not isinstance(module, QuantizedModule):
        return _own_state(piece.name, module)
    if piece.refusal is not None:
        found[f"{prefix}weight"] = module.dequantized()
    elif not piece.tied:
        found = {f"{prefix}{key}": value for key, value in layout.tensors(module).items()}
    bias = module._parameters.get("bias")
    if bias is not None:
        found[f"{prefix}bias"] = bias
    return found


def _own_state(name: str, module: nn.Module) -> dict[str, Any]:
    """The state of a module without its children."""
    found: dict[str, Any] = {}
    module._save_to_state_dict(found, f"{name}." if name else "", False)
    return found


def _rename(folder: Path, written: list[Path], names: list[list[str]], total: int) -> None:
    """Give the files their names, and write their index if there are several."""
    count = len(written)
    final = ["model.safetensors"]
    if count > 1:
        final = [f"model-{place:05}-of-{count:05}.safetensors" for place in range(1, count + 1)]
    for place, name in enumerate(final):
        os.replace(written[place], folder / name)
        written[place] = folder / name
    if count > 1:
        weight_map = {key: name for name, keys in zip(final, names, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        written.append(folder / INDEX)
        with replacing(folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n")


def _config(model: nn.Module, layout: Layout) -> dict[str, Any]:
    """The content of config.json."""
    own: Any = getattr(model, "config", None)
    values = own.to_dict() if hasattr(own, "to_dict") else {}
    return {**values, "quantization_config": layout.config()}


__all__ = ["save_checkpoint"]
