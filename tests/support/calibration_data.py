"""Data for tests of observers and calibration: distributions, and random divisions of them."""

import random

import torch
from torch import Tensor

from support import floats


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


DISTRIBUTIONS: dict[str, Tensor] = {
    "normal": randn(20_000, seed=1),
    "relu": randn(20_000, seed=2).relu(),
    "negative": -floats(5_000, seed=3).abs() - 0.1,
    "far from 0": floats(5_000, seed=10).abs().clamp(max=1.0) + 9.0,
    "outliers": torch.cat([randn(20_000, seed=4), torch.tensor([60.0, -35.0, 59.0])]),
    "laplace": floats(20_000, seed=5) * floats(20_000, seed=6).abs(),
    "discrete": (floats(5_000, seed=7) * 2).round(),
    "one value": torch.full((100,), 0.37),
    "few": torch.tensor([0.5, -0.25, 3.0]),
    "tiny": floats(1_000, seed=8) * 2.0**-125,
    "huge": floats(1_000, seed=9).clamp(-3.0, 3.0) * 1e38,
}


def divisions(x: Tensor, seed: int) -> list[Tensor]:
    """The elements of ``x`` in random order, in pieces of different sizes and shapes."""
    choose = random.Random(seed)
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed))
    x = x.flatten()[order]
    cuts = sorted(choose.randrange(x.numel() + 1) for _ in range(4))
    pieces = []
    for piece in x.tensor_split(cuts):
        width = choose.choice([size for size in (1, 2, 3, 5) if piece.numel() % size == 0])
        pieces.append(piece.view(-1, width) if piece.numel() else piece)
    return pieces
