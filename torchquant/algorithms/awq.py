"""awq_: scales of input channels by the error of the outputs, and ranges of least error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchquant.algorithms.awq_report import AWQLayer, AWQReport
from torchquant.algorithms.awq_search import AWQSearch
from torchquant.algorithms.batches import Forward, taken
from torchquant.algorithms.quantize_with import give, quantize_with
from torchquant.configs import Fusion, QuantizationConfig
from torchquant.convert.plan import Step
from torchquant.convert.selection import FilterFn
from torchquant.report.quantization import NORMS

__all__ = ["awq_"]

_WHO = "awq_"


@torch.no_grad()
def awq_(
    model: nn.Module,
    config: QuantizationConfig | Mapping[str, QuantizationConfig | None] | None,
    data: Iterable[Any],
    *,
    quantize: bool = True,
    search_clip: bool = True,
    steps: int = 20,
    limit: int | None = None,
    forward: Forward | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    fusion: Fusion | None = None,
    progress: bool | None = None,
) -> AWQReport:
    """Scale the input channels of layers for the weights that matter most (AWQ), and quantize.

    Channels with large inputs get weights that are larger in proportion, so that their rounding
    errors are smaller; the norm or the layer that produces a channel is divided by its scale. The
    scales are powers of the mean magnitudes of the inputs. The power is searched for each group of
    layers by the error of the outputs of the module that holds them (attention, or the part with
    gate and up), with quantized weights. Groups are found as by :func:`torchquant.smoothquant_`, in
    any architecture. Ranges of weights with the least error of the outputs follow.

    A layer whose inputs no norm and no layer can scale gets such ranges only, and the report says
    so. The model then changes as by :func:`torchquant.quantize_`, and runs on the same kernels.

    Args:
        model: a float model, as for :func:`torchquant.quantize_`.
        config: as for :func:`torchquant.quantize_`. The search uses its weights, not its
            activations.
        data: the batches, as for :func:`torchquant.calibrate`. Few are enough: 512 inputs of each
            layer are kept, and the magnitudes of all are averaged (of a convolution 128 random
            places of each sample). The arguments and results of each module that holds a group of
            several layers are kept for all groups at once, in whole batches, until there are 512
            inputs; small batches need less memory. The float parameters are in memory twice.
        quantize: if False, only the scales are put into the model, which stays float and computes
            the same as before; then call :func:`torchquant.gptq_` with the same configuration.
        search_clip: whether to search the ranges.
        steps: the powers that are tried are ``0, 1 / steps, ..., 1``.
        limit: the greatest number of batches; None for all.
        forward: a function of ``(model, batch)`` that calls the model, as for ``calibrate``.
        filter_fn: selects the layers, as for :func:`torchquant.quantize_`.
        strict: as for :func:`torchquant.quantize_`.
        fusion: as for :func:`torchquant.quantize_`.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: as :func:`torchquant.quantize_`.
        ValueError: as :func:`torchquant.quantize_`; data has no batches; steps is not a positive
            integer. The model is unchanged.

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration" (2023).

    Example:
        >>> import torchquant
        >>> model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)).eval()
        >>> _ = model[0].weight.data[3].mul_(30)
        >>> config = torchquant.IntxWeightOnlyConfig(4, group_size=32)
        >>> report = awq_(model, config, [torch.randn(100, 64)])
        >>> report["1"].action, report["1"].error < report["1"].nearest_error
        ('scaled', True)
        >>> type(model[1]).__name__
        'QuantizedIntxLinear'
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{_WHO}: steps must be a positive integer, got {steps!r}")
    search = AWQSearch(_WHO, model, taken(_WHO, data, limit), forward, steps, progress)

    def find(chosen: list[Step]) -> None:
        try:
            search.scale(chosen)
            for step, found in search.integers(search_clip and quantize):
                if quantize:
                    give(step, found, _WHO)
        except BaseException:
            search.restore()
            raise
        if not quantize:
            raise _Done

    try:
        report = quantize_with(_WHO, model, config, filter_fn, strict, fusion, progress, find)
    except _Done:
        try:
            search.check()
        except BaseException:
            search.restore()
            raise
        left = {"rounded": "left"}
        rows = [replace(row, action=left.get(row.action, row.action)) for row in search.rows()]
        return AWQReport(tuple(rows), tuple(search.notes), None, search.difference)
    found = {row.name: row for row in search.rows()}
    rows = []
    for row in report.rows:
        if row.action == "quantized":
            one = found[row.name]
            reason = "; ".join(filter(None, (one.reason, row.reason)))
            rows.append(replace(one, reason=reason))
        elif row.family != NORMS:
            rows.append(AWQLayer(row.name, row.kind, "left", row.reason))
    return AWQReport(tuple(rows), (*search.notes, *report.notes), report, search.difference)


class _Done(Exception):
    """Ends quantize_ before the model changes."""
