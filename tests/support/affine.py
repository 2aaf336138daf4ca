"""Numbers and comparison for the tests of quantize and dequantize."""

import math

import torch
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan
LARGEST = float(torch.finfo(torch.float32).max)
any_float = st.floats(width=32)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
scales = st.floats(2.0**-100, 2.0**100, width=32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, signs of zeros included; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers over many binades, with exact halves and the odd zero among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-12, 12, shape, generator=generator).float()
    )
    halves = torch.randint(-400, 400, shape, generator=generator).float() / 2
    pick = torch.randint(0, 3, shape, generator=generator)
    return torch.where(pick == 0, halves, x)
