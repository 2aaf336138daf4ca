"""Configurations of an integer matrix product: which kernel, in which blocks, what to try first.

A :class:`Config` describes one of three ways:

tma
    For large products on Hopper and later. There are as many programs as multiprocessors, and each
    computes one output tile after the other. The tensor memory accelerator loads both operands into
    ``stages`` buffers; the loads of the next tile start during the epilogue of the current one.
    Tiles are ordered in bands of ``band`` tile rows, so that programs which run at the same time
    share operands in the L2 cache. The output is written in ``subtiles`` parts, which leaves shared
    memory for more stages.
pointer
    For any shape, row stride and device. One program per output tile.
pointer with ``split`` > 1
    For few rows: the programs divide K, too, so that all multiprocessors work. They write partial
    sums to a workspace; a second kernel adds them and computes the epilogue. The sums are integers,
    so their order does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from torchquant.triton.gemm.problem import Problem
from torchquant.triton.launch import next_power_of_2


@dataclass(frozen=True)
class Config:
    """A kernel and its blocks (see this module's docstring). Plain fields, for a file."""

    kind: str  # "tma" or "pointer"
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    band: int = 8
    split: int = 1
    subtiles: int = 1


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that the choice of a configuration depends on."""

    capability: tuple[int, int]
    sms: int
    shared: int  # most bytes of shared memory per program

    @staticmethod
    def of(device: torch.device) -> Device:
        """The properties of a CUDA device; those of an H200 under Triton's interpreter."""
        if device.type != "cuda":
            return Device((9, 0), 132, 232448)
        found = torch.cuda.get_device_properties(device)
        shared = getattr(found, "shared_memory_per_block_optin", 101376)
        return Device((found.major, found.minor), found.multi_processor_count, shared)


# Tiles of the persistent kernel. Sums take at most 128 registers per thread, which leaves room for
# the epilogue of a quarter tile. Triton waits for an integer product before the next step, so
# either a step is long (K of 128 or 256 bytes), or two programs share a multiprocessor: one
# multiplies while the other waits.
_TMA = (
    Config("tma", 128, 256, 128, warps=8, stages=4, subtiles=4),
    Config("tma", 128, 128, 128, warps=4, stages=3, subtiles=4),
    Config("tma", 128, 256, 256, warps=8, stages=2, subtiles=4),
    Config("tma", 256, 128, 128, warps=8, stages=4, subtiles=4),
    Config("tma", 128, 128, 128, warps=8, stages=4, subtiles=2),
    Config("tma", 128, 64, 128, warps=4, stages=4, subtiles=2),
    Config("tma", 64, 128, 128, warps=4, stages=4, subtiles=2),
)
_POINTER = (
    Config("pointer", 128, 256, 64, warps=8, stages=3, subtiles=4),
    Config("pointer", 128, 128, 128, warps=8, stages=3, subtiles=2),
    Config("pointer", 128, 128, 64, warps=4, stages=3, subtiles=4),
    Config("pointer", 64, 128, 128, warps=4, stages=3, subtiles=2),
    Config("pointer", 64, 64, 128, warps=4, stages=3),
    Config("pointer", 32, 64, 128, warps=4, stages=4),
)
# Columns, K, warps, stages for few rows. The weight streams from memory, 16 bytes per thread, and
# (stages - 1) * block_n * block_k bytes of it are in flight per program.
_FEW_ROWS = ((16, 512, 4, 4), (32, 256, 4, 4), (32, 512, 4, 4), (64, 256, 4, 4), (128, 128, 4, 4))
# Configurations that can divide K, for 65 to _SPLIT_ROWS rows.
_SOME_ROWS = (
    Config("pointer", 128, 128, 128, warps=8, stages=3, subtiles=2),
    Config("pointer", 128, 64, 128, warps=4, stages=4, subtiles=2),
)
_SPLIT_ROWS = 512
_MOST_SPLIT = 16


def shared_bytes(config: Config, out_bytes: int = 4) -> int:
    """Approximate shared memory of a configuration: the buffers, and the staged output."""
    buffers = config.stages * (config.block_m + config.block_n) * config.block_k
    if config.kind == "tma":
        buffers += config.block_m * config.block_n // config.subtiles * out_bytes + 256
    return buffers


def resident(config: Config, problem: Problem, device: Device) -> int:
    """The number of programs that share a multiprocessor."""
    shared = shared_bytes(config, problem.out.element_size()) + 1024
    return 2 if config.warps == 4 and 2 * shared <= device.shared + 1024 else 1


def _splits(config: Config, problem: Problem, device: Device) -> list[Config]:
    """The configuration with K in one part, and in as many parts as there are multiprocessors."""
    there = tiles(config, problem)
    steps = triton.cdiv(problem.columns, config.block_k)
    fill = triton.cdiv(device.sms, there)
    configs = []
    for split in (1, fill, 2 * fill) if there < 2 * device.sms else (1,):
        share = triton.cdiv(steps, min(split, _MOST_SPLIT))
        # Every part must have at least one step.
        configs.append(replace(config, split=triton.cdiv(steps, share)))
    return configs


def tiles(config: Config, problem: Problem) -> int:
    """The number of output tiles."""
    rows: int = triton.cdiv(problem.m, config.block_m)
    columns: int = triton.cdiv(problem.n, config.block_n)
    return rows * columns


def _cost(config: Config, problem: Problem, device: Device) -> float:
    """Estimated cycles of a multiprocessor, to order the candidates; with the rates of an H200."""
    c, programs = config, tiles(config, problem) * config.split
    area, k = c.block_m * c.block_n, problem.columns / c.split
    rounds: int = triton.cdiv(programs, device.sms)
    rate = {128 * 256: 1.0, 128 * 128: 0.85, 128 * 64: 0.7}.get(area, 0.5)
    rate *= 1.0 if c.kind == "tma" else 0.7
    products = area * k / (2600 * rate)
    shared = (c.block_n + min(problem.m, c.block_m)) * k / 40  # from the L2 cache
    memory = 0.0
    if problem.m <= c.block_m:  # every weight is read once, from memory
        residents = max(1, min(rounds, device.shared // (shared_bytes(c) + 1024)))
        under_way = residents * (c.stages - 1) * c.block_n * c.block_k
        memory = c.block_n * k / (21 * min(1.0, under_way / 40960))
    return rounds * (max(products, shared, memory) + 1000) + (4000 if c.split > 1 else 0)


def candidates(problem: Problem, device: Device | None = None) -> list[Config]:
    """Every configuration that can run the problem, the probably fastest first."""
    device = device or Device.of(problem.x.device)
    found: list[Config] = []
    if problem.m <= 64:
        block_m = max(16, next_power_of_2(problem.m))
        for block_n, block_k, warps, stages in _FEW_ROWS:
            config = Config("pointer", block_m, block_n, block_k, warps, stages, band=1)
            found += _splits(config, problem, device)
    else:
        if device.capability[0] >= 9 and problem.loads_by_tma:
            found += _TMA
        found += _POINTER
        if problem.m <= _SPLIT_ROWS:
            for config in _SOME_ROWS:
                found += _splits(config, problem, device)
    found = [c for c in found if shared_bytes(c, problem.out.element_size()) <= device.shared]
    found = found or [Config("pointer", 32, 32, 64, warps=4, stages=2)]
    return sorted(dict.fromkeys(found), key=lambda config: _cost(config, problem, device))


def default_config(problem: Problem) -> Config:
    """The configuration to use without tuning."""
    return candidates(problem)[0]
