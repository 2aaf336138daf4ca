"""Several linear layers on one input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support import (
    floats,
    integers,
    positive,
)
from torchquant import ops

OUTPUTS = (1, 5, 16, 17, 31, 32, 48, 63, 64, 100, 128)  # multiples of a tile's 16 and others


@dataclass
class Layers:
    """The tensors of one call, layer by layer and concatenated."""

    weights: list[Tensor]
    scales: list[Tensor]
    zero_points: list[Tensor] | None
    biases: list[Tensor] | None
    activations: list[str]
    symmetric: bool = True
    output_dtype: torch.dtype | None = None

    @property
    def packed(self) -> Tensor:
        return torch.cat([ops.pack_weight(weight) for weight in self.weights])

    def arguments(self) -> dict[str, Any]:
        def together(parts: list[Tensor] | None) -> Tensor | None:
            return None if parts is None else torch.cat(parts)

        return {
            "packed": self.packed,
            "weight_scale": together(self.scales),
            "weight_zero_point": together(self.zero_points),
            "bias": together(self.biases),
            "out_features": [weight.shape[0] for weight in self.weights],
            "symmetric": self.symmetric,
            "activations": self.activations,
            "output_dtype": self.output_dtype,
        }

    def alone(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every layer by itself."""
        return tuple(
            ops.linear_dynamic(
                x,
                ops.pack_weight(weight),
                self.scales[i],
                None if self.zero_points is None else self.zero_points[i],
                None if self.biases is None else self.biases[i],
                out_features=weight.shape[0],
                symmetric=self.symmetric,
                activation=self.activations[i] if self.activations else "none",
                output_dtype=self.output_dtype,
            )
            for i, weight in enumerate(self.weights)
        )

    def together(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.linear_dynamic_split(x, **self.arguments()))


def layers(
    outputs: tuple[int, ...],
    inputs: int,
    *,
    zero_points: bool = False,
    biases: bool = True,
    activations: tuple[str, ...] = (),
    seed: int = 0,
    **options: Any,
) -> Layers:
    def each(make: Callable[[int, int], Tensor]) -> list[Tensor]:
        return [make(n, seed + number) for number, n in enumerate(outputs)]

    return Layers(
        weights=each(lambda n, s: integers(n, inputs, seed=s)),
        scales=each(lambda n, s: positive(n, seed=s)),
        zero_points=each(lambda n, s: integers(n, seed=s).int()) if zero_points else None,
        biases=each(lambda n, s: floats(n, seed=s)) if biases else None,
        activations=list(activations),
        **options,
    )
