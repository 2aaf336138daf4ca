"""Argument checks of the specification, with one wording for all functions.

Every message reads ``function: argument must be ..., got ...; remedy``.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below this scale, 1/scale would not be finite on a CPU that flushes denormals.
MIN_SCALE = 2.0**-126


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.int8`` -> ``int8``."""
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """Describe an argument for error messages: ``int8 [768, 256]``, or a Python type and value."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def require_tensor(who: str, name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {name} must be a torch.Tensor, got {type(value).__name__}")


def require_dtype(who: str, name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless ``value`` is a tensor of one of ``dtypes``."""
    require_tensor(who, name, value)
    if value.dtype not in dtypes:
        names = [dtype_name(dtype) for dtype in dtypes]
        wanted = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
        raise TypeError(
            f"{who}: {name} must be {wanted}, got {describe(value)}; convert it with .to()"
        )


def require_device(
    who: str, name: str, value: Tensor, device: torch.device, first: str = "input"
) -> None:
    """Raise unless ``value`` is on ``device``, that of the argument ``first``."""
    if value.device != device:
        raise ValueError(
            f"{who}: {name} must be on the {first}'s device {device}, got {value.device}; "
            "move it with .to(device)"
        )


def require_range(who: str, qmin: int, qmax: int) -> None:
    """Raise unless ``[qmin, qmax]`` is a range of integers whose differences fp32 holds exactly."""
    limit = 2**22
    if not -limit <= qmin < qmax <= limit:
        raise ValueError(
            f"{who}: qmin must be less than qmax, both within [-2^22, 2^22], "
            f"got qmin = {qmin}, qmax = {qmax}"
        )


def scale_tensor(
    who: str,
    name: str,
    scale: float | Tensor,
    device: torch.device,
    *shapes: tuple[int, ...],
) -> Tensor:
    """``scale`` as an fp32 tensor of one of ``shapes`` (the first is the one messages name).

    A Python number and a 0-dimensional tensor count as ``[1]``; both are accepted only where
    ``(1,)`` is one of ``shapes``. A number must be at least 2^-126 (the contract on scales);
    the values of a tensor are not checked, because reading them would stall an accelerator.
    """
    wanted = " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes))
    if isinstance(scale, Tensor):
        require_dtype(who, name, scale, (torch.float32,))
        require_device(who, name, scale, device)
        tensor = scale.reshape(1) if scale.dim() == 0 and (1,) in shapes else scale
    elif isinstance(scale, (int, float)) and not isinstance(scale, bool):
        if not MIN_SCALE <= float(scale) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{who}: {name} must be finite and at least 2^-126, got {scale!r}")
        # torch.tensor would copy from the host, which waits for a GPU's stream.
        tensor = torch.full((1,), float(scale), dtype=torch.float32, device=device)
    else:
        raise TypeError(
            f"{who}: {name} must be a float or a float32 tensor of shape {wanted}, "
            f"got {describe(scale)}"
        )
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{who}: {name} must have shape {wanted}, got {list(tensor.shape)}")
    return tensor


def zero_point_tensor(
    who: str,
    name: str,
    zero_point: int | Tensor | None,
    device: torch.device,
    low: int,
    high: int,
    *shapes: tuple[int, ...],
    allow_real: bool = False,
) -> Tensor:
    """A zero point as an int32 tensor of one of ``shapes`` (a number or None, which is 0: ``[1]``).

    A Python integer must be in ``[low, high]``; the values of a tensor are not checked. With
    ``allow_real``, a float32 tensor is accepted as a real-valued zero point.
    """
    wanted = " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes))
    if zero_point is None:
        return torch.zeros(1, dtype=torch.int32, device=device)
    if isinstance(zero_point, Tensor):
        dtypes = (torch.int32, torch.float32) if allow_real else (torch.int32,)
        require_dtype(who, name, zero_point, dtypes)
        require_device(who, name, zero_point, device)
        if zero_point.dim() == 0 and (1,) in shapes:
            return zero_point.reshape(1)
        if tuple(zero_point.shape) not in shapes:
            raise ValueError(
                f"{who}: {name} must have shape {wanted}, got {list(zero_point.shape)}"
            )
        return zero_point
    if isinstance(zero_point, bool) or not isinstance(zero_point, int):
        real = "; pass a float32 tensor for a real-valued zero point" if allow_real else ""
        raise TypeError(
            f"{who}: {name} must be None, an int or an int32 tensor of shape {wanted}, "
            f"got {describe(zero_point)}{real}"
        )
    if not low <= zero_point <= high:
        raise ValueError(f"{who}: {name} must be from {low} to {high}, got {zero_point}")
    return torch.full((1,), zero_point, dtype=torch.int32, device=device)
