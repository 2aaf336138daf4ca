"""gptq_: integers with a small error of each layer's outputs, layer by layer, on any model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import Forward
from torchquant.algorithms.compress import compress_model
from torchquant.algorithms.compression_report import CompressionReport
from torchquant.algorithms.found import Found
from torchquant.algorithms.gptq_rounding import GPTQResult, Order, gptq
from torchquant.algorithms.hessian import Hessian
from torchquant.algorithms.inputs import grouped_weight
from torchquant.algorithms.integer_weight import IntegerWeight
from torchquant.algorithms.least_error import clip_search
from torchquant.algorithms.places import Place
from torchquant.configs import Fusion, QuantizationConfig, Weights
from torchquant.convert.adjustment import Adjustment, float_weight
from torchquant.convert.selection import FilterFn

__all__ = ["gptq_"]

_WHO = "gptq_"
_LEAST_INPUTS = 64  # of a layer, and an eighth of its terms


def gptq_(
    model: nn.Module,
    config: QuantizationConfig | Mapping[str, QuantizationConfig | None] | None,
    data: Iterable[Any],
    *,
    limit: int | None = None,
    forward: Forward | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    order: Order = "given",
    static_groups: bool | None = None,
    search_clip: bool = True,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    fusion: Fusion | None = None,
    resume: str | Path | None = None,
    offload: str | Path | None = None,
    progress: bool | None = None,
) -> CompressionReport:
    """Quantize a model with integers that give each layer's outputs a small error (GPTQ), in place.

    The model changes as by :func:`torchquant.quantize_` with the same configuration, and runs on
    the same kernels; only the integers are others. The layers are compressed in the order of their
    calls, each with what it reads when the layers before it have their integers already; see
    :func:`torchquant.algorithms.gptq_rounding.gptq` for a single layer. No layer gets a greater
    error than from rounding to the nearest integers on these inputs.

    Blocks that are called one after the other, such as the layers of a transformer, are found by
    watching one batch, and are then run one by one on all batches. Memory holds the float model;
    for each batch one tensor between two blocks, and the other arguments of the blocks such as
    masks and positions; the Hessians of a few layers; and the integers of all layers that are done,
    one byte each. A model without blocks is run as a whole for each layer.

    A layer that sees fewer inputs than 64 or an eighth of its terms (an expert that few tokens
    reach) gets integers of least weight error, and embeddings get the nearest integers. So does an
    output layer that shares its weight with an embedding. Of other layers that share a weight, the
    first is compressed with its own inputs, and the others get its integers. The report says so.

    If torch.distributed is initialised, all processes must call this verb with the same model and
    the same data. They share the work, and each gets the same integers as a process alone that has
    as many threads as each of them (``torchrun`` sets OMP_NUM_THREADS to 1): other numbers of
    threads may round sums in another way.

    Args:
        model: any module that contains layers, as for :func:`torchquant.quantize_`; or a model that
            :func:`torchquant.prepare_` prepared and that saw data in :func:`torchquant.calibrate`.
        config: as for :func:`torchquant.quantize_`. It must be None for a prepared model, which has
            its configuration. A prepared model stays as it is, and ``convert_`` takes the integers.
        data: the batches, as for :func:`torchquant.calibrate`; about 100 samples of 512 tokens for
            a language model. All are kept in memory.
        limit: the greatest number of batches; None for all.
        forward: a function of ``(model, batch)`` that calls the model, as for ``calibrate``.
        damping: what is added to the diagonal of each Hessian, as a fraction of its mean. It is
            raised for a layer whose Hessian cannot be factored otherwise, and the report says so.
        block_size: see :func:`~torchquant.algorithms.gptq_rounding.gptq`.
        order: "given" rounds the inputs of a layer in their order, "activations" those with the
            greatest mean square first.
        static_groups: see :func:`~torchquant.algorithms.gptq_rounding.gptq`.
        search_clip: whether scales are those of least error, which may cut off the greatest
            weights; False takes those of the range.
        filter_fn: selects the layers, as for :func:`torchquant.quantize_`.
        strict: as for :func:`torchquant.quantize_`.
        fusion: as for :func:`torchquant.quantize_`.
        resume: a folder for results. A call that was interrupted continues if it is repeated with
            the same folder, model, data and arguments, and gives the same bits with the same number
            of threads. Other ones are refused, except for another ``forward`` and objects in the
            data that hold no tensors, arrays, texts or numbers, which cannot be compared.
        offload: a folder for the tensors between blocks, which are then files; they are removed at
            the end. The other arguments of the blocks stay in memory.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: as :func:`torchquant.quantize_`.
        ValueError: as :func:`torchquant.quantize_`; data has no batches; an option is out of range;
            config is None and the model is not prepared and calibrated, or config is given and it
            is; the folder of ``resume`` is one of another call; the processes have different models
            or data. The model is unchanged.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers" (2022).

    Example:
        >>> import torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> batches = [torch.randn(64, 64) for _ in range(4)]
        >>> report = gptq_(model, torchquant.IntxWeightOnlyConfig(4, group_size=32), batches)
        >>> report["0"].error < report["0"].nearest_error
        True
        >>> type(model[0]).__name__
        'QuantizedIntxLinear'
    """
    method = _GPTQ(
        damping=damping,
        block_size=block_size,
        order=order,
        static_groups=static_groups,
        search_clip=search_clip,
    )
    gptq(torch.ones(1, 1), torch.ones(1, 1), Weights(), **method.options)  # checks the options
    report, _ = compress_model(
        _WHO,
        model,
        config,
        data,
        method,
        method.options,
        limit=limit,
        forward=forward,
        filter_fn=filter_fn,
        strict=strict,
        fusion=fusion,
        resume=resume,
        offload=offload,
        progress=progress,
        warn=_warn,
    )
    return report


def _warn(found: Mapping[str, Found]) -> None:
    """Warn of layers that were rounded, before the model changes: the warning may be an error."""
    for name, one in found.items():
        if one.fell_back:
            warnings.warn(
                f"{_WHO}: {name} was rounded to the nearest integers, wholly or in part, because "
                "its Hessian cannot be factored; check the inputs that it gets from the data",
                stacklevel=_stack_level(),
            )


def _stack_level() -> int:
    """The level of the caller of the verb, for a function that calls ``warnings.warn``."""
    frame, level, at = inspect.currentframe(), 0, 0
    while frame is not None:
        level += 1
        if frame.f_code is gptq_.__code__:
            at = level
        frame = frame.f_back
    return max(1, at)


class _GPTQ:
    """How gptq_ compresses a layer; the arguments are those of ``gptq``."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def statistics(self, place: Place) -> Hessian:
        return Hessian.of(place.layer, by_lane=True)

    def memory(self, place: Place) -> int:
        groups = getattr(place.layer, "groups", 1)
        return Hessian.matrices(by_lane=True) * groups * place.terms**2 * 4

    def compress(self, place: Place, statistics: Hessian) -> Found:
        weight = float_weight(place.layer).flatten(1)
        rows, hessian = statistics.rows, statistics.value()
        dropped = f"{statistics.dropped} inputs with NaN or infinities were left out"
        remarks = [dropped] if statistics.dropped else []
        least = max(_LEAST_INPUTS, place.terms // 8)
        if rows < least:
            reached = rows or statistics.dropped
            saw = f"saw {rows} inputs, fewer than {least}" if reached else "no input reached it"
            found = clip_search(weight, place.weights)
            remarks.insert(0, f"{saw}: integers of least weight error")
            return Found(_adjustment(place, found), "rounded", "; ".join(remarks), rows=rows)
        result: GPTQResult = gptq(weight, hessian, place.weights, **self.options)
        if result.damping > self.options["damping"]:
            remarks.append(f"damping raised to {result.damping:.1g}")
        if result.fell_back:
            remarks.append("its Hessian cannot be factored")
        size = _outputs(place.layer, weight, hessian)
        return Found(
            _adjustment(place, result.integers),
            "rounded" if result.fell_back else "compressed",
            "; ".join(remarks),
            nearest_error=result.nearest_error / size if size else 0.0,
            error=result.error / size if size else 0.0,
            rows=rows,
            fell_back=result.fell_back,
        )


def _adjustment(place: Place, found: IntegerWeight) -> Adjustment:
    qweight = found.qweight.view(place.shape)
    return Adjustment(qweight, found.scale, weight_zero_point=found.zero_point, found_by=_WHO)


def _outputs(layer: Any, weight: Tensor, hessian: Tensor) -> float:
    """The squares of the layer's outputs in the measure of the errors: ``trace(W H W^T)``."""
    by_group = grouped_weight(layer, weight)
    return float(((by_group @ hessian) * by_group).sum(dtype=torch.float64))
