"""A prepared model and its quantized copy, run side by side, layer after layer."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from torchquant.algorithms.batches import Enough, Forward, outputs_of, taken
from torchquant.algorithms.inputs import quantized_input
from torchquant.convert.adjustment import Adjustment, adjust
from torchquant.convert.convert import convert_
from torchquant.nn.base import QuantizedModule
from torchquant.report.base import RowReport

__all__ = ["TwoModels"]


class TwoModels:
    """A prepared model in float, a converted copy of it, and the batches that both see.

    The copy is the model that ``convert_`` would make now. An algorithm improves it layer by layer,
    so that each layer is adapted to the errors of the layers before it.

    Args:
        who: the verb, with which messages start.
        model: a prepared and calibrated model; it stays unchanged.
        loader: the batches; they are kept until the end.
        limit: the greatest number of batches; None for all.
        forward: takes a model and a batch, and calls the model.
        anew: if True, the copy is without what earlier calls of verbs found.

    Attributes:
        order: names of the layers in the order of their first calls.
        left: a row of the report for each layer that cannot be improved.

    Raises:
        TypeError: model is not a module.
        ValueError: there is no batch, or the model cannot be converted yet.

    Example:
        >>> import torch, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> batches = [torch.randn(8, 64)]
        >>> _ = torchquant.prepare_(model)
        >>> _ = torchquant.calibrate(model, batches)
        >>> models = TwoModels("verb", model, batches, None, None)
        >>> models.order, type(models.quantized_layer("2")).__name__
        (['0', '2'], 'QuantizedLinear')
        >>> ((floating, quantized),) = models.inputs("2")
        >>> 0 < (quantized - floating).abs().max() < 0.1
        tensor(True)
    """

    def __init__(
        self,
        who: str,
        model: nn.Module,
        loader: Iterable[Any],
        limit: int | None,
        forward: Forward | None,
        *,
        anew: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")
        self.batches = taken(who, loader, limit)
        self.who, self.model, self.forward = who, model, forward
        self.quantized = copy.deepcopy(model)
        for module in self.quantized.modules() if anew else ():
            adjust(module, Adjustment())
        try:
            convert_(self.quantized, progress=False)
        except ValueError as error:
            raise ValueError(
                f"{who}: model must be prepared and calibrated, so that it can be converted; call "
                f"prepare_ and calibrate first ({error})"
            ) from None
        self.order, self.calls = self._order()
        self.left: list[RowReport] = []
        for name, layer in self.quantized.named_modules():
            if isinstance(layer, QuantizedModule) and name not in self.calls:
                kind = type(model.get_submodule(name)).__name__
                self.left.append(RowReport(name, kind, "left", "no batch reached it"))

    def float_layer(self, name: str) -> Any:
        """A layer of the prepared model."""
        return self.model.get_submodule(name)

    def quantized_layer(self, name: str) -> Any:
        """The layer of the same name in the copy."""
        return self.quantized.get_submodule(name)

    def inputs(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs of a layer in both models, call by call: in float, and in the copy.

        The input in the copy has the values of its integers.
        """
        layer = self.quantized_layer(name)
        for batch in self.batches:
            floating = self._seen(self.model, name, batch)
            quantized = self._seen(self.quantized, name, batch)
            if len(floating) != len(quantized):
                raise ValueError(
                    f"{self.who}: model must call its layers in the same way with quantized "
                    f"values, but it calls {name} {len(floating)} times in float and "
                    f"{len(quantized)} times quantized; pass batches for which its forward makes "
                    "the same calls"
                )
            for x, y in zip(floating, quantized, strict=True):
                yield x, quantized_input(layer, y)

    def _seen(self, model: nn.Module, name: str, batch: Any) -> Sequence[Tensor]:
        seen: list[Tensor] = []
        once = self.calls[name] == 1

        def see(_: str, input: Tensor, output: Any) -> None:
            seen.append(input.detach())
            if once:
                raise Enough

        outputs_of(self.who, model, batch, self.forward, {name: see})
        return seen

    def _order(self) -> tuple[list[str], Counter[str]]:
        """The layers in the order of their first calls, and the most calls in one batch."""
        most: Counter[str] = Counter()
        calls: Counter[str] = Counter()

        def see(name: str, input: Any, output: Any) -> None:
            calls[name] += 1

        layers = [
            name
            for name, layer in self.quantized.named_modules()
            if isinstance(layer, QuantizedModule)
        ]
        for batch in self.batches:  # one may take another path than the first
            calls.clear()
            outputs_of(self.who, self.model, batch, self.forward, dict.fromkeys(layers, see))
            most |= calls
        return list(most), most
