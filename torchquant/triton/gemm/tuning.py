"""Choice of a configuration of :mod:`torchquant.triton.gemm` by measuring.

The trial runs on random tensors of the call's shape, not on the call's tensors: a model is often
warmed up with zeros, for which every product is correct.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from torchquant.triton.gemm import run as gemm
from torchquant.triton.gemm.configs import Config, candidates, default_config
from torchquant.triton.gemm.problem import Problem
from torchquant.triton.layout import packed_sums, padded_k, padded_n
from torchquant.triton.tuning import choose as tuning

MOST_CANDIDATES = 8  # a compilation takes seconds; candidates() puts the likely best first


class Key(NamedTuple):
    """The properties of a problem that decide which configuration is correct and fastest."""

    rows: int
    outputs: int
    columns: int
    input: torch.dtype
    output: torch.dtype
    row_scales: int | None  # 0 for a single value, 1 for one per row; None without
    row_zero_points: int | None
    weight_scales: int | None
    weight_zero_points: int | None
    bias: torch.dtype | None
    output_scale: bool
    activation: str
    loads_by_tma: bool
    stores_by_tma: bool

    def __str__(self) -> str:
        size = f"{self.rows}x{self.outputs}x{self.columns}"
        return "gemm " + " ".join(
            [size, *(str(field).removeprefix("torch.") for field in self[3:])]
        )


def key_of(problem: Problem) -> Key:
    """The key of a problem; computed at every call."""
    p = problem
    m, n = p.out.shape
    return Key(
        tuning.rounded_rows(m),
        n,
        p.x.shape[1],
        p.x.dtype,
        p.out.dtype,
        _extent(p.scale),
        _extent(p.zero_point),
        _extent(p.weight_scale),
        _extent(p.weight_zero_point),
        None if p.bias is None else p.bias.dtype,
        p.output_scale is not None,
        p.activation,
        p.loads_by_tma,
        p.stores_by_tma,
    )


def _extent(tensor: Tensor | None) -> int | None:
    return None if tensor is None else int(tensor.numel() > 1)


def choose(problem: Problem, tuner: tuning.Tuner | None = None) -> Config | None:
    """The configuration for a problem; its first call measures, with ``tuner`` or the GPU's.

    None if no candidate computes the right numbers on this device; then use the ATen fallback.
    """
    if tuner is None:
        if problem.x.device.type != "cuda":  # times under Triton's interpreter mean nothing
            return default_config(problem)
        tuner = tuning.tuner(problem.x.device)
    key = key_of(problem)
    known: Config | None = tuner.chosen.get(key)
    if known is not None:
        return known
    trial: list[Problem] = []

    def reference() -> Tensor:
        trial.append(trial_of(problem))
        return gemm.reference(trial[0])

    def run(config: Config) -> Tensor:
        gemm.run(trial[0], config)
        return trial[0].out

    return tuner.choose(
        key,
        candidates=lambda: candidates(problem)[:MOST_CANDIDATES],
        default=lambda: default_config(problem),
        prepare=lambda: poison(trial[0].out),
        run=run,
        reference=reference,
    )


def trial_of(problem: Problem) -> Problem:
    """A problem of the same shapes, with random numbers and a poisoned output."""
    p, device = problem, problem.x.device
    generator = torch.Generator(device).manual_seed(1)
    # Results are about 1 then, where activations are not linear.
    middle: float = 1.0 / (74.0 * p.k**0.25)

    def integers(shape: tuple[int, ...], dtype: torch.dtype, low: int = -128) -> Tensor:
        return torch.randint(low, low + 256, shape, dtype=dtype, device=device, generator=generator)

    def zero_points(like: Tensor | None) -> Tensor | None:
        return None if like is None else integers(tuple(like.shape), torch.int32)

    def scales(like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        values = torch.rand(like.shape, dtype=torch.float32, device=device, generator=generator)
        return (values + 0.5) * middle

    m, n = p.out.shape
    x = torch.empty_strided(p.x.shape, p.x.stride(), dtype=p.x.dtype, device=device)
    x.copy_(integers((m, p.x.shape[1]), p.x.dtype, 0 if p.unsigned else -128))
    packed = torch.ops.torchquant_aten.pack_weight(integers((n, p.k), torch.int8))
    bias = p.bias
    if bias is not None and bias.dtype == torch.int32:
        bias = integers((n,), torch.int32)
    elif bias is not None:
        bias = torch.randn(n, dtype=torch.float32, device=device, generator=generator)
    return replace(
        p,
        x=x,
        weight=packed[: padded_n(n), : padded_k(p.k)],
        sums=packed_sums(packed, n),
        out=torch.empty_strided(p.out.shape, p.out.stride(), dtype=p.out.dtype, device=device),
        scale=scales(p.scale),
        zero_point=zero_points(p.zero_point),
        row_sums=None if p.row_sums is None else x[:, : p.k].sum(1, dtype=torch.int32),
        weight_scale=scales(p.weight_scale),
        weight_zero_point=zero_points(p.weight_zero_point),
        bias=bias,
        output_scale=None if p.output_scale is None else torch.full_like(p.output_scale, 0.03),
    )


def poison(out: Tensor) -> None:
    """Overwrite an earlier candidate's output, so that it does not count for the next one."""
    out.fill_(torch.nan if out.is_floating_point() else 85)


def install() -> None:
    """Make this the chooser of :mod:`torchquant.triton.gemm.run`."""
    gemm.set_chooser(choose)
