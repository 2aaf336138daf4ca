"""load_checkpoint: a model with the integers of a checkpoint that another library wrote."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.configs import Activations, Dynamic, QuantizationConfig, config_to_dict
from torchquant.convert.plan import check_model, find_layers
from torchquant.files.buffers import MissingValues
from torchquant.files.fit import current_tensors
from torchquant.files.undo import undoing
from torchquant.functional import _bits
from torchquant.graph.modules import replace_module, tensor_bytes
from torchquant.integrations.checkpoints.nearest import nearest
from torchquant.integrations.checkpoints.places import Place, Plan, plan
from torchquant.integrations.checkpoints.report import CheckpointReport, CheckpointRow
from torchquant.integrations.checkpoints.source import read_contents
from torchquant.integrations.checkpoints.stored import Integers, StoredWeight, Unreadable
from torchquant.nn.base import QuantizedModule
from torchquant.nn.dtypes import dtype_name
from torchquant.nn.kinds import weight_shape
from torchquant.nn.shared_weight import has_same_weight, share_weight
from torchquant.report.progress import track
from torchquant.scheme import MAX_BITS, MIN_BITS

Made = list[tuple[Place, QuantizedModule, CheckpointRow]]


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    bits: int = 8,
    activations: Activations | None = None,
    device: torch.device | str | int | None = None,
    progress: bool | None = None,
) -> CheckpointReport:
    """Load a checkpoint that another library quantized into a float model, in place.

    The layers whose weights are integers in the checkpoint become layers of
    :mod:`torchquant.nn` with these integers; everything else is loaded as float. The layout is
    found out from the files:

    - GPTQ (``qweight``, ``qzeros``, ``scales``, ``g_idx``; both versions of zero points),
    - AWQ (AutoAWQ's "gemm"),
    - compressed-tensors ("pack-quantized", "int-quantized"), also with int8 activations,
    - GGUF (llama.cpp; with the package ``gguf``) of the architectures llama, qwen2, qwen3, gemma,
      gemma2 and gemma3.

    A loaded weight has the values that the checkpoint describes, bit by bit, if one of our formats
    holds them: integers with a scale and an integer zero point for each channel or group of inputs.
    GGUF's Q4_1, Q5_1, Q2_K, Q4_K and Q5_K have real minimums, and with activation order the groups
    of GPTQ are no runs of inputs. Such weights are dequantized a few rows at a time and rounded to
    ``bits`` bits in groups; the report has the relative error of each.

    Everything is checked before the model is changed. After an error it is unchanged. Nothing is
    fetched from a network, and nothing is unpickled.

    Args:
        model: the float model for which the checkpoint was made, usually created from the
            checkpoint's configuration. On the meta device (``accelerate.init_empty_weights()``) its
            weights take no memory.
        path: a folder with ``*.safetensors`` and ``config.json``, an index of such files, or one
            file.
        bits: of weights that have to be rounded, 2 to 8.
        activations: what happens to the inputs of layers for which the checkpoint leaves them in
            float; None leaves them in float, ``Dynamic()`` multiplies integers.
        device: the device of all loaded tensors; None is the CPU.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report with a row for each module. Layers have the dtype of the float layers in whose
        place they are.

    Raises:
        TypeError: model is not a module, or activations are not dynamic ones.
        FileNotFoundError: path does not exist.
        ImportError: the checkpoint is a GGUF file, and the package ``gguf`` is not installed.
        ValueError: a file is truncated; the checkpoint is of another kind; it does not fit the
            model, or the model is quantized already; or bits is out of range.

    Example:
        >>> import tempfile, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.quantize_(model, torchquant.IntxWeightOnlyConfig(4, group_size=32))
        >>> other = nn.Sequential(nn.Linear(64, 64))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = torchquant.save_checkpoint(model, folder, layout="gptq")
        ...     print(load_checkpoint(other, folder).rows[0])
        loaded: 0 (Linear)
        >>> torch.equal(other[0].integers, model[0].integers)
        True

    Source:
        The files of AutoGPTQ and GPTQModel, AutoAWQ, compressed-tensors and llama.cpp that write
        these layouts; their descriptions are in the modules of
        ``torchquant.integrations.checkpoints``.
    """
    who = "load_checkpoint"
    check_model(who, model, floating="which cannot be replaced in place; wrap it in a module")
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{who}: bits must be an integer from 2 to 8, got {bits!r}")
    if activations is not None and not isinstance(activations, Dynamic):
        raise TypeError(f"{who}: activations must be None or Dynamic(), got {activations!r}")
    target = _checked_device(device)
    path = Path(path)
    steps = find_layers(model)
    try:
        shapes = {
            name: weight_shape(step.module)
            for step in steps
            if len(weight_shape(step.module)) == 2
            for name in step.names
        }
        modules = dict(model.named_modules(remove_duplicate=False))
        contents = read_contents(path, current_tensors(model), shapes, modules)  # type: ignore[arg-type]
        found = plan(model, contents, steps)
        made = _layers(found, bits, activations, target, progress)
        floats = _floats(found, model, target)
    except Unreadable as reason:
        raise ValueError(
            f"{who}: {str(path)!r} cannot be loaded into the model: {reason}"
        ) from None
    missing = MissingValues(model)
    with undoing(model):
        for place, new, _ in made:
            replace_module(place.step.owners, place.step.module, new)
        _assign(model, floats)
        _check_values(missing, path)
    for place, new, _ in made:  # nothing can fail any more
        for held in place.step.held:
            held.replace(new)
    rows = _rows(model, made, found)
    notes = [
        *contents.notes,
        *(f"{name} was not used: {why}." for name, why in found.ignored.items()),
    ]
    return CheckpointReport(tuple(rows), contents.layout, tuple(notes))


def _checked_device(device: Any) -> torch.device:
    try:
        place = torch.device("cpu" if device is None else device)
    except (TypeError, RuntimeError):
        raise ValueError(
            f"load_checkpoint: device must name one of torch's devices, got {device!r}"
        ) from None
    if place.type == "meta":
        raise ValueError(
            "load_checkpoint: device must hold values, got 'meta'; omit it for the CPU"
        )
    return place


def _layers(
    found: Plan,
    bits: int,
    activations: Activations | None,
    device: torch.device,
    progress: bool | None,
) -> Made:
    """The new layers, and their rows of the report. The model stays as it is."""
    made: Made = []
    by_name: dict[str, QuantizedModule] = {}
    read: dict[int, tuple[Integers, float | None]] = {}
    tied = Counter(id(place.stored) for place in found.places)
    for place in track(found.places, "load_checkpoint", progress):
        stored = place.stored
        known = id(stored) in read
        integers, error = read.pop(id(stored)) if known else _integers(stored, bits)
        tied[id(stored)] -= 1
        if tied[id(stored)]:
            read[id(stored)] = integers, error
        layer = _layer(place, integers, activations, device)
        remarks = ["" if error is None else stored.why]
        first = by_name.get(place.tied_to or "")
        shared = first is not None and has_same_weight(first, layer)
        if first is not None:
            remarks.append(f"{'shares the weight of' if shared else 'tied to'} {place.tied_to}")
        if shared:
            share_weight([first, layer])
        row = CheckpointRow(
            place.step.name,
            type(place.step.module).__name__,
            "loaded" if error is None else "rounded",
            "; ".join(filter(None, remarks)),
            stored.form,
            str(integers.weights),
            error or 0.0,
            tensor_bytes(layer) - (layer.packed.nbytes if shared else 0),
        )
        by_name[place.step.name] = layer
        made.append((place, layer, row))
    return made


def _integers(stored: StoredWeight, bits: int) -> tuple[Integers, float | None]:
    """Integers, and their relative error if they had to be rounded."""
    exact = stored.integers()
    return (exact, None) if exact is not None else nearest(stored, bits)


def _layer(
    place: Place, integers: Integers, activations: Activations | None, device: torch.device
) -> QuantizedModule:
    """A layer with given integers; its bias, which is a float tensor, has no values yet."""
    old, kind = place.step.module, place.step.kind
    inputs = None if kind.only_weights else (place.stored.activations or activations)
    config = QuantizationConfig(integers.weights, inputs)
    cls = kind.layer_class(config, old)
    shape = weight_shape(old)
    refusal = cls.config_refusal(config) or cls.shape_refusal(config, shape)
    if refusal is not None:
        raise Unreadable(
            f"{place.step.name} cannot have {config.weights}: {refusal}",
            "load the float weights, or leave the layer out of the checkpoint",
        )
    weight = old._parameters["weight"]
    assert weight is not None
    values = {name: cls.stored_value(old, name) for name in cls.stored}
    if "activation" in values:
        values["activation"] = "none"
    described = {"config": config_to_dict(config), "dtype": dtype_name(weight.dtype)}
    layer = cls.from_entry({**values, **described, "format": cls.weight_format.name})
    layer.adopt(old)
    tensors = {"qweight": integers.qweight, "qweight_scale": integers.scale}
    if integers.zero_point is not None:
        tensors["qweight_zero_point"] = integers.zero_point
    given = place.stored.input() if inputs is not None else None
    if given is not None:
        tensors["input_scale"], tensors["input_zero_point"] = given
    layer.load_state_dict(_canonical(layer, tensors, device), strict=False, assign=True)
    return layer.outside_programs()


def _canonical(
    layer: QuantizedModule, tensors: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Tensors as the state dict of a layer has them, on a device."""
    state = {}
    for name, (dtype, _) in layer.canonical().items():
        value = tensors.get(name)
        if value is None:
            continue
        if name == "qweight" and dtype == torch.uint8:
            value = _bits.pack(value, layer.config.weights.bits)
        state[name] = value.to(device, dtype).contiguous()
    return state


def _floats(found: Plan, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The float tensors, in the dtypes of the model; tied keys share one tensor."""
    current = current_tensors(model)
    made: dict[Any, Tensor] = {}
    ready: dict[str, Tensor] = {}
    replaced = {id(place.step.module) for place in found.places}
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, stored in found.floats.items():
        here = current[key]
        if here is None:
            continue
        tie = found.ties[key]
        if tie not in made:
            value = stored.read().to(device, here.dtype, copy=True)
            trained = isinstance(here, nn.Parameter)
            made[tie] = nn.Parameter(value, here.requires_grad) if trained else value
    for key, here in current.items():  # all names of a tied tensor
        layer, _, part = key.rpartition(".")
        gone = part == "weight" and id(modules.get(layer)) in replaced
        if here is not None and not gone and found.ties[key] in made:
            ready[key] = made[found.ties[key]]
    return ready


def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, value in values.items():
        name, _, part = key.rpartition(".")
        owner = modules[name]
        place: Any = owner._parameters if part in owner._parameters else owner._buffers
        place[part] = value


def _check_values(missing: MissingValues, path: Path) -> None:
    try:
        missing.check(path)
    except ValueError as error:
        text = str(error).removeprefix("load: ")
        raise ValueError(f"load_checkpoint: {text}") from None


def _rows(model: nn.Module, made: Made, found: Plan) -> list[CheckpointRow]:
    """The rows in the order of the model's modules."""
    quantized = {id(layer): row for _, layer, row in made}
    rows = []
    for name, module in model.named_modules():
        if id(module) in quantized:
            rows.append(quantized[id(module)])
            continue
        own = {
            key: found.floats[full]
            for key in (*module._parameters, *module._buffers)
            if (full := f"{name}.{key}" if name else key) in found.floats
        }
        if not own:
            continue
        forms = ", ".join(dict.fromkeys(tensor.form for tensor in own.values() if tensor.form))
        reasons = (found.reasons.get(f"{name}.{key}") for key in own)
        tensors = [module._parameters.get(key, module._buffers.get(key)) for key in own]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        why = "; ".join(filter(None, reasons))
        kind = type(module).__name__
        rows.append(CheckpointRow(name or "(model)", kind, "float", why, forms, bytes=size))
    return rows


__all__ = ["load_checkpoint"]
