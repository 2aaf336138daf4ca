"""calibrate: run batches through a prepared model, so that its observers see the activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.convert.batches import call, samples, structure
from torchquant.convert.calibration_hooks import InputObserver, prepared_layers
from torchquant.convert.regions import observing
from torchquant.report.calibration import CalibrationReport, RangeReport
from torchquant.report.progress import track

Forward = Callable[[nn.Module, Any], Any]

_WHO = "calibrate"


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    progress: bool | None = True,
    limit: int | None = None,
    forward: Forward | None = None,
) -> CalibrationReport:
    """Run batches through a prepared model, and observe the ranges of its layers' inputs.

    The model runs in evaluation mode and without gradients; the mode of each module is restored
    afterwards. Several calls add up: their ranges are those of all batches together. The memory of
    the observers does not depend on the number of batches. After an exception, the observers are as
    they were before the call.

    With torch.distributed, each process calibrates with its own batches, and
    :func:`torchquant.convert_` combines them. The report shows those of this process.

    Args:
        model: a model that :func:`torchquant.prepare_` prepared.
        loader: the batches: a DataLoader, a list, a generator. A batch is a tensor; a dictionary of
            arguments by name; or a tuple or list of arguments by position, of which as many are
            passed as the model's forward takes (images without labels).
        progress: if True or None, a progress bar appears in a terminal and in a notebook, after two
            seconds.
        limit: the greatest number of batches; None takes all of them.
        forward: a function of ``(model, batch)`` that calls the model, for batches of any other
            structure.

    Returns:
        A report with the range of each layer; ``print`` it for a table.

    Raises:
        TypeError: model is not a module, loader cannot be iterated over or is itself a batch, a
            batch has another structure, or forward is not callable.
        ValueError: the model is not prepared; limit is not a positive integer; loader has no
            batches; a batch does not fit the model's forward; or no layer has seen a finite value
            other than 0.

    Example:
        >>> import torchquant
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> _ = torchquant.prepare_(model)
        >>> batches = [(torch.randn(8, 64), torch.zeros(8)) for _ in range(3)]
        >>> print(calibrate(model, batches).summary())
        2 layers observed over 3 batches, 24 samples
        >>> print(torchquant.convert_(model).layers[0].action, type(model[0]).__name__)
        converted QuantizedLinear
    """
    hooks = _checked(model, loader, limit, forward)
    run = forward or (lambda model, batch: call(_WHO, model, batch))
    count, total = 0, _length(loader)
    seen: int | None = 0
    if limit is not None:
        total = limit if total is None else min(limit, total)
    with _observing(model, hooks.values()), observing(model):
        batches = islice(iter(loader), limit)
        for batch in track(batches, _WHO, False if progress is False else None, total):
            run(_plain(model), batch)
            count += 1
            size = samples(batch)
            seen = None if seen is None or size is None else seen + size
        rows = tuple(_row(name, hook, model) for name, hook in hooks.items())
        notes = _notes(count, rows, limit)
    return CalibrationReport(rows, count, seen, tuple(notes))


def _checked(model: Any, loader: Any, limit: Any, forward: Any) -> dict[str, InputObserver]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHO}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(loader, (Tensor, Mapping, str, bytes)) or not _iterable(loader):
        raise TypeError(
            f"{_WHO}: loader must be an iterable of batches, such as a DataLoader or a list, got "
            f"{structure(loader)}; pass [batch] for a single batch"
        )
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(
            f"{_WHO}: limit must be None or a positive number of batches, got {limit!r}"
        )
    if forward is not None and not callable(forward):
        raise TypeError(
            f"{_WHO}: forward must be None or a function of (model, batch), got {forward!r}"
        )
    hooks = prepared_layers(model)
    if not hooks:
        raise ValueError(
            f"{_WHO}: model must hold layers that prepare_ prepared, got none; call "
            "prepare_(model, config) first"
        )
    return hooks


def _iterable(loader: Any) -> bool:
    """Asked without ``iter``, which would start the workers of a DataLoader."""
    return hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a generator, or a DataLoader over an IterableDataset
        return None


def _plain(model: nn.Module) -> nn.Module:
    """The module that torch.compile wraps; hooks run in eager mode."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


@contextmanager
def _observing(model: nn.Module, hooks: Iterable[InputObserver]) -> Iterator[None]:
    """Evaluation mode without gradients, in which hooks observe; all is undone if it fails."""
    modes = [(module, module.training) for module in model.modules()]
    observers = [hook.observer for hook in hooks]
    before = [{name: b.clone() for name, b in observer.named_buffers()} for observer in observers]
    try:
        model.eval()
        for hook in hooks:
            hook.observing = True
        with torch.no_grad():
            yield
    except BaseException:  # also Ctrl-C
        for observer, buffers in zip(observers, before, strict=True):
            observer._buffers.update(buffers)
        raise
    finally:
        for hook in hooks:
            hook.observing = False
        for module, training in modes:
            module.training = training


def _row(name: str, hook: InputObserver, model: nn.Module) -> RangeReport:
    observer = hook.observer
    kind, who = type(model.get_submodule(name)).__name__, type(observer).__name__
    bad = int(observer.nonfinite)
    missing = hook.missing_range()
    observed = _pair(observer.min_val, observer.max_val)
    if missing is not None:
        reason = missing.partition(": ")[2]
        return RangeReport(name, kind, "no range", reason, who, observed, None, None, None, bad)
    chosen = _pair(*observer.calculate_range())
    scale, zero_point = observer.calculate_qparams()
    return RangeReport(
        name, kind, "observed", "", who, observed, chosen, float(scale), int(zero_point), bad
    )


def _pair(least: Tensor, greatest: Tensor) -> tuple[float, float] | None:
    low, high = float(least), float(greatest)
    return (low, high) if low <= high else None


def _notes(batches: int, rows: tuple[RangeReport, ...], limit: int | None) -> Iterator[str]:
    """The notes of the report; raises if nothing was observed, warns about layers without range."""
    if not batches:
        raise ValueError(
            f"{_WHO}: loader must have batches, got none; an iterator can be used only once, so "
            "pass a list or a DataLoader"
        )
    missing = [row for row in rows if row.action == "no range"]
    listed = "; ".join(f"{row.name}: {row.reason}" for row in missing)
    if len(missing) == len(rows):
        raise ValueError(
            f"{_WHO}: batches must reach the prepared layers with finite values other than 0, got "
            f"{batches} without any ({listed})"
        )
    notes = []
    if missing:
        names = ", ".join(row.name for row in missing)
        notes.append(
            f"Without a range, so convert_ would leave them in float: {names}. Calibrate with "
            "batches that reach them."
        )
        warnings.warn(
            f"{_WHO}: layers without a range ({listed}); convert_ leaves them in float, unless "
            "batches that reach them are calibrated first",
            RuntimeWarning,
            stacklevel=3,
        )
    bad = {row.name: row.nonfinite for row in rows if row.nonfinite}
    if bad:
        counts = ", ".join(f"{name}: {count}" for name, count in bad.items())
        notes.append(f"NaN and infinite values were left out of the ranges ({counts}).")
    return iter(notes)


__all__ = ["calibrate"]
