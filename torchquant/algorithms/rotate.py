"""rotate_: rotate residual streams, so that no channel is much larger than the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import outputs_of, taken
from torchquant.algorithms.equalize import require_uncalibrated
from torchquant.algorithms.labels import owner_of
from torchquant.algorithms.orthogonal import rotation_matrix
from torchquant.algorithms.rotation import Rotation
from torchquant.algorithms.scaling_groups import TOLERANCE, is_float_linear, output_difference
from torchquant.algorithms.streams import Stream, find_streams
from torchquant.report.base import Report, RowReport
from torchquant.report.progress import track

__all__ = ["RotatedModule", "RotationReport", "rotate_"]

_HALF = 8  # roundings by which the outputs of a model of fewer bits may change


@dataclass(frozen=True)
class RotatedModule(RowReport):
    """What :func:`rotate_` did to a module.

    Attributes:
        name: name of the module.
        kind: the name of its class.
        action: "rotated"; "folded" for a norm whose gain its readers took over; or "left".
        reason: why the module was left, or which stream it reads or writes.
        channels: the number of channels of the stream; 0 for a module that was left.

    Example:
        >>> print(RotatedModule("fc", "Linear", "rotated", "reads embed", 64))
        rotated: fc (Linear): reads embed
    """

    channels: int = 0


@dataclass(frozen=True, repr=False)
class RotationReport(Report):
    """What :func:`rotate_` did; ``print`` it for a table.

    Attributes:
        rows: one row per module that reads or writes a stream, and per linear layer.
        notes: sentences that the user should read.
        streams: names of the modules that write the rotated streams first.
        difference: the greatest difference of the model's outputs on the first batch, relative to
            their greatest magnitude.

    Example:
        >>> row = RotatedModule("fc", "Linear", "rotated", "reads embed", 64)
        >>> RotationReport((row,), (), ("embed",), 1e-6).summary()
        '1 stream rotated: 1 modules, 0 linear layers left; outputs changed by 1.0e-06'
    """

    rows: tuple[RotatedModule, ...]
    notes: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    difference: float = 0.0

    def summary(self) -> str:
        """One line with the numbers of streams and modules and the change of the outputs."""
        done = sum(not row.unchanged for row in self.rows)
        several = "" if len(self.streams) == 1 else "s"
        return (
            f"{len(self.streams)} stream{several} rotated: {done} modules, "
            f"{len(self.rows) - done} linear layers left; outputs changed by {self.difference:.1e}"
        )


@torch.no_grad()
def rotate_(
    model: nn.Module,
    data: Any,
    *,
    kind: str = "hadamard",
    seed: int = 0,
    limit: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> RotationReport:
    """Rotate the residual streams of a model, in place; the function of the model stays the same.

    In a language model a few channels of the residual stream are much larger than the others, and
    leave few integers for the rest of a token. A rotation spreads them over all channels. Layers
    that write the stream take the rotation into their outputs, layers that read it into their
    inputs, and the gains of norms move into the layers that read their results, because a norm
    without a gain commutes with a rotation. Nothing is computed in addition at run time.

    Streams are found while the model runs on the data, in any architecture, and each is checked:
    the outputs must stay the same. A stream that something else reads, such as the norms between
    additions of BERT, is left.

    Call it on the float model, before ``smoothquant_`` and ``quantize_``. Hidden states that a
    model returns on request are rotated afterwards. An embedding and an output layer that share
    their weight no longer do if the two need different values.

    Args:
        model: a float model, in any training mode.
        data: a batch that is a tensor or a dictionary, or batches, as for
            :func:`torchquant.calibrate`. All are watched, and the first is compared.
        kind: "hadamard" or "random", as for
            :func:`torchquant.algorithms.rotation_matrix`.
        seed: the rotations follow from it.
        limit: the greatest number of batches; None for all.
        forward: a function of ``(model, batch)`` that calls the model, as for ``calibrate``.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module.
        ValueError: kind is unknown, data has no batches, model has no float linear layer, or ranges
            have been observed already. The model is unchanged.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024).

    Example:
        >>> model = nn.Sequential(nn.Embedding(50, 64), nn.RMSNorm(64), nn.Linear(64, 50)).eval()
        >>> tokens = torch.arange(8)[None]
        >>> before = model(tokens)
        >>> report = rotate_(model, tokens)
        >>> [(row.name, row.action, row.reason) for row in report]
        [('0', 'rotated', 'writes 0'), ('1', 'folded', 'reads 0'), ('2', 'rotated', 'reads 0')]
        >>> torch.allclose(model(tokens), before, rtol=1e-4, atol=1e-4)
        True
    """
    who = "rotate_"
    _check(who, model, kind)
    given = [data] if isinstance(data, (Tensor, Mapping)) else data
    batches = taken(who, given, limit)
    found = find_streams(model, batches, forward, who=who)
    expected = outputs_of(who, model, batches[0], forward)
    rows: dict[str, RotatedModule] = {}
    notes: list[str] = []
    done: list[Rotation] = []
    difference, allowed = 0.0, TOLERANCE
    try:
        for index, stream in enumerate(track(found.streams, who, progress)):
            matrix = rotation_matrix(stream.count, kind, seed + index, keeps_ones=stream.keeps_ones)
            done.append(Rotation(model, stream))
            done[-1].apply(matrix)
            apart = output_difference(expected, outputs_of(who, model, batches[0], forward))
            tolerance = max(allowed, _tolerance(model, stream))
            if apart > tolerance:
                done.pop().restore()
                reason = f"the outputs of the model would change by {apart:.1e}"
                rows.update(_rows(model, stream, reason))
                continue
            difference, allowed = apart, tolerance
            rows.update(_rows(model, stream, None, rows))
            notes += done[-1].notes
    except BaseException:
        for rotation in reversed(done):
            rotation.restore()
        raise
    if allowed > TOLERANCE:
        notes.append(f"The outputs of models of this data type may change by {allowed:.1e}.")
    for name, module in model.named_modules():
        if name not in rows and is_float_linear(module):
            reason = found.reasons.get(name, "it reads and writes no stream")
            rows[name] = RotatedModule(name, type(module).__name__, "left", reason)
    ordered = tuple(rows[name] for name, _ in model.named_modules() if name in rows)
    return RotationReport(ordered, tuple(notes), tuple(one.stream.name for one in done), difference)


def _rows(
    model: nn.Module,
    stream: Stream,
    refused: str | None,
    before: Mapping[str, RotatedModule] | None = None,
) -> dict[str, RotatedModule]:
    """A row for each module that reads or writes a stream."""
    words: dict[str, str] = {}
    reading = [*stream.readers, *(reader for gain in stream.gains for reader in gain.readers)]
    for gain in stream.gains:
        words[owner_of(gain.name)] = "reads"
    for name, _ in reading:
        words[owner_of(name)] = "reads"
    for name, _ in stream.written:
        word = words.get(owner_of(name))
        words[owner_of(name)] = "reads and writes" if word == "reads" else "writes"
    norms = {owner_of(gain.name) for gain in stream.gains}
    rows = {}
    for name, word in words.items():
        module = model.get_submodule(name)
        if refused is not None:
            if is_float_linear(module):
                rows[name] = RotatedModule(name, type(module).__name__, "left", refused)
            continue
        action = "folded" if name in norms else "rotated"
        reason = f"{word} {stream.name}"
        if before and name in before and not before[name].unchanged:
            reason = f"{before[name].reason}, {reason}"
        rows[name] = RotatedModule(name, type(module).__name__, action, reason, stream.count)
    return rows


def _tolerance(model: nn.Module, stream: Stream) -> float:
    """The greatest change of the outputs that rounding of the rotated parameters explains."""
    reading = [*stream.readers, *(reader for gain in stream.gains for reader in gain.readers)]
    names = [*(gain.name for gain in stream.gains), *(name for name, _ in reading)]
    names += [name for name, _ in stream.written]
    least = max(torch.finfo(model.get_parameter(name).dtype).eps for name in names)
    return TOLERANCE if least <= torch.finfo(torch.float32).eps else _HALF * least


def _check(who: str, model: Any, kind: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")
    if kind not in ("hadamard", "random"):
        raise ValueError(f'{who}: kind must be "hadamard" or "random", got {kind!r}')
    if not any(is_float_linear(module) for module in model.modules()):
        raise ValueError(
            f"{who}: model must hold float linear layers, got none; call it before quantize_, "
            "prepare_ and convert_"
        )
    require_uncalibrated(who, model)
