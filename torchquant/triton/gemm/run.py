"""Integer matrix products on the rows layout (csrc/formats/int8_rows.h), with their epilogue.

One call computes the finished output from int8 rows: zero points, scales, bias, activation, output
type. The product is a :class:`~torchquant.triton.gemm.problem.Problem`. A chooser picks one of the
configurations of :mod:`torchquant.triton.gemm.configs`, or the ATen fallback; the kernels are in
:mod:`torchquant.triton.gemm.kernels`.

The caller must limit K to what 32-bit sums can represent
(:func:`~torchquant.triton.gemm.problem.greatest_k`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from torchquant.triton.gemm.configs import Config, Device, default_config, resident, tiles
from torchquant.triton.gemm.kernels import Epilogue, add_kernel, pointer_kernel, tma_kernel
from torchquant.triton.gemm.problem import Problem
from torchquant.triton.launch import launch, next_power_of_2

Chooser = Callable[[Problem], Config | None]
_choose: Chooser = default_config


def set_chooser(choose: Chooser | None) -> None:
    """Set the callback that picks a configuration (its result None: use the ATen fallback).

    On a GPU it is :mod:`torchquant.triton.gemm.tuning`. None restores :func:`default_config`.
    """
    global _choose
    _choose = default_config if choose is None else choose


def matmul(problem: Problem) -> Tensor:
    """Run the problem with the configuration that the chooser picks; returns its ``out``."""
    config = _choose(problem)
    if config is None:
        return problem.out.copy_(reference(problem))
    run(problem, config)
    return problem.out


def run(problem: Problem, config: Config) -> None:
    """Write ``problem.out``, with one of ``configs.candidates``."""
    p, c = problem, config
    device, x = p.x.device, p.x.view(torch.int8)
    strided = (p.scale, p.zero_point, p.weight_scale, p.weight_zero_point)
    compiled_in = (*(_stride(tensor) for tensor in strided), p.unsigned, p.activation)
    epilogue = Epilogue(
        *(p.k, p.scale, p.zero_point, p.row_sums, p.weight_scale, p.weight_zero_point, p.sums),
        *(p.bias, p.output_scale, *_constants(compiled_in)),
    )
    after = (epilogue, p.output_zero_point, p.output_qmin, p.output_qmax)
    blocks = {
        "BAND": c.band,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BLOCK_K": c.block_k,
        "SUBTILES": c.subtiles,
        "num_warps": c.warps,
        "num_stages": c.stages,
    }
    programs = tiles(c, p)
    shape = (p.m, p.n, p.columns)
    if c.kind == "tma":
        part = [c.block_m, c.block_n // c.subtiles]
        by_tma = p.stores_by_tma
        found = Device.of(device)
        programs = min(programs, found.sms * resident(c, p, found))
        launch(
            tma_kernel,
            (programs,),
            device,
            TensorDescriptor.from_tensor(x, [c.block_m, c.block_k]),
            TensorDescriptor.from_tensor(p.weight, [c.block_n, c.block_k]),
            TensorDescriptor.from_tensor(p.out, part) if by_tma else p.out,
            p.out.stride(0),
            *shape,
            *after,
            OUT_DESC=by_tma,
            **blocks,
        )
        return
    target = p.out
    if c.split > 1:
        target = torch.empty((c.split, p.m, p.n), dtype=torch.int32, device=device)
    launch(
        pointer_kernel,
        (programs, c.split),
        device,
        x,
        x.stride(0),
        p.weight,
        p.weight.stride(0),
        target,
        target.stride(-2),
        *shape,
        *after,
        EVEN_K=p.columns % c.block_k == 0,
        SPLIT=c.split,
        **blocks,
    )
    if c.split > 1:
        block_m, block_n = min(4, next_power_of_2(p.m)), 256
        launch(
            add_kernel,
            (triton.cdiv(p.n, block_n), triton.cdiv(p.m, block_m)),
            device,
            target,
            p.out,
            p.out.stride(0),
            p.m,
            p.n,
            *after,
            SPLIT=c.split,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
        )


@functools.cache
def _constants(values: tuple[Any, ...]) -> tuple[tl.constexpr, ...]:
    """Cached objects: Triton compares them at every call to find the compiled kernel."""
    return tuple(tl.constexpr(value) for value in values)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 1 else 1


def reference(problem: Problem) -> Tensor:
    """The problem's result from the ATen fallback, for comparison."""
    p = problem
    n16 = p.weight.shape[0]
    x = p.x[:, : p.k]
    packed = p.weight.as_strided(
        (n16 + -(-4 * n16 // p.weight.shape[1]), p.weight.shape[1]), p.weight.stride()
    )
    result: Tensor
    if p.scale is None:
        result = torch.ops.torchquant_aten.int8_mm(x, packed, p.n)
        return result
    per_row = p.scale if p.scale.numel() == 1 else p.scale.reshape(-1, 1)
    zero = p.zero_point
    result = torch.ops.torchquant_aten.linear_static(
        x,
        per_row,
        zero if zero is None or zero.numel() == 1 else zero.reshape(-1, 1),
        packed,
        p.weight_scale,
        p.weight_zero_point,
        p.bias,
        p.n,
        p.activation,
        p.out.dtype,
        p.output_scale,
        p.output_zero_point,
        p.output_qmin,
        p.output_qmax,
    )
    return result
