"""Recognises the activation that a module computes by its values, not by the name of its class.

Libraries and users define classes of their own (``GELUActivation``, ``SiLUActivation``) with the
same function, or with another function under the same name. So a module is run on a grid of values,
in both modes and in every dtype that it takes; its values and gradients are compared with those of
the known functions in float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchquant.graph.purity import is_pure

_REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu6": F.relu6,
    "hardswish": lambda x: torch.where(x < _HARDSWISH_OVERFLOW, F.hardswish(x), torch.inf),
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
}
_EXACT = ("relu", "relu6", "leaky_relu")
_HARDSWISH_OVERFLOW = 3.4e38 / 6  # the product by 6 comes before the division
# Error of an fp32 result divided by max(1, abs(x)), of those that are not exact. Usual formulas in
# fp32 have errors up to 2e-7; different functions differ by 1e-4 and more.
_TOLERANCE = 4e-7
_GRADIENT_TOLERANCE = 1e-4
_LOW_PRECISION_TOLERANCE = 8  # in eps: one rounding for each operation of a formula
_EDGES = (0.0, 1e-30, 1e-10, 1e-4, 40.0, 87.0, 100.0, 1e3, 1e4, 1e38)


def activation_of(module: nn.Module) -> str | None:
    """The name of the activation that a module computes, or None if it computes no known one.

    A copy of the module is run, if its forward only computes
    (:func:`torchquant.graph.purity.is_pure`); the module itself does not change. Modules with
    parameters or buffers are not recognised.

    Example:
        >>> activation_of(nn.SiLU()), activation_of(nn.LeakyReLU(0.2)), activation_of(nn.Dropout())
        ('silu', None, None)
    """
    if "forward" in module.__dict__:
        return None
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    if type(module).__module__ != "torch.nn.modules.activation" and not is_pure(
        module, in_place=True, fixed=True
    ):
        return None
    try:
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            # Neither a copy of the hooks nor a call of them: both would run user code.
            grid, own = _grid(), copy.copy(module)
            for name, reference in _REFERENCES.items():
                if _computes(own, name, reference, grid):
                    return name
    except Exception:  # not a function of one tensor
        return None
    return None


def _grid() -> Tensor:
    """Float32 [125, 16], small and large values mixed; few enough for torch to use one thread."""
    edges = torch.tensor(_EDGES, dtype=torch.float32, device="cpu")
    steps = 2000 - 2 * len(_EDGES)
    inner = torch.linspace(-30, 30, steps, dtype=torch.float32, device="cpu")
    values = torch.cat([inner, edges, -edges])
    generator = torch.Generator("cpu").manual_seed(0)
    order = torch.randperm(values.numel(), generator=generator, device="cpu")
    return values[order].reshape(-1, 16)


def _computes(
    module: nn.Module, name: str, reference: Callable[[Tensor], Tensor], grid: Tensor
) -> bool:
    if not _close(module, name, reference, grid[:8]):  # a short test rules out most functions
        return False
    for training in (False, True):
        module.train(training)
        shaped = grid.reshape(5, 25, 16)
        if not _close(module, name, reference, grid) or not _close(module, name, reference, shaped):
            return False
        if not _same_gradient(module, reference, grid):
            return False
        for dtype in (torch.bfloat16, torch.float16):
            if not _close_in(dtype, module, reference, grid):
                return False
        nan: Tensor = module.forward(torch.full_like(grid[:1], torch.nan))
        if not nan.isnan().all():
            return False
    return True


def _close(module: nn.Module, name: str, reference: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    got = module.forward(x.clone())
    if type(got) is not Tensor or got.dtype != torch.float32 or got.shape != x.shape:
        return False
    if name in _EXACT:
        return torch.equal(got, reference(x))
    allowed = _TOLERANCE * x.double().abs().clamp(min=1)
    wanted = reference(x.double())
    return bool(((got == wanted) | ((got.double() - wanted).abs() <= allowed)).all())


def _same_gradient(module: nn.Module, reference: Callable[[Tensor], Tensor], grid: Tensor) -> bool:
    inside = grid[(grid.abs() <= 30) & (grid != 0)]  # the subgradient at 0 is a convention; skip it
    gradients = []
    for function, dtype in ((module.forward, torch.float32), (reference, torch.float64)):
        x = inside.to(dtype).requires_grad_()
        y = function(x * 1)  # not a leaf: the function may work in place
        if not y.requires_grad:
            return False
        gradients.append(torch.autograd.grad(y.sum(), x)[0].double())
    return bool(((gradients[0] - gradients[1]).abs() <= _GRADIENT_TOLERANCE).all())


def _close_in(
    dtype: torch.dtype, module: nn.Module, reference: Callable[[Tensor], Tensor], grid: Tensor
) -> bool:
    x = grid[(grid.abs() <= 30).all(1)].to(dtype)
    try:
        got = module.forward(x.clone())
    except (RuntimeError, TypeError):  # it does not take this dtype, so no model passes it
        return True
    if got.dtype != dtype:
        return False
    allowed = _LOW_PRECISION_TOLERANCE * torch.finfo(dtype).eps * x.double().abs().clamp(min=1)
    return bool(((got.double() - reference(x.double())).abs() <= allowed).all())


__all__ = ["activation_of"]
