"""Arguments for the tests of fake quantization."""

import torch

from support import (
    EXTREME,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    floats,
    generator,
    sprinkle,
)
from torchquant import functional
from torchquant.functional.affine import _expand
from torchquant.functional.fake_quantize import _sum_by_scale
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken

RANGES = ((-128, 127), (-127, 127), (0, 255), (-8, 7), (0, 15), (-2, 1), (0, 3))
LEARNED = ((-128, 127), (-8, 7), (0, 15), (-4, 3), (-2, 1), (0, 3))


def awkward(*shape, seed=0, dtype=torch.float32, share=0.1):
    """Values around the ends of every range, and all odd ones."""
    x = floats(*shape, seed=seed)
    return sprinkle(x, SPECIAL + EXTREME + NOT_FINITE, seed, share).to(dtype) if shape else x


def granularities(shape):
    found = [PerTensor()]
    if shape:
        found += [PerAxis(axis) for axis in range(len(shape))]
        found += [PerGroup(1), PerGroup(3), PerGroup(32), PerToken()]
    return found


def scales(shape, seed=0):
    """Ordinary steps and, now and then, the least and a huge one."""
    s = torch.rand(shape, generator=generator(seed)) * 0.3 + 1e-3
    pick = torch.randint(0, 40, shape, generator=generator(seed + 1))
    s[pick == 0] = 2.0**-126
    s[pick == 1] = 2.0**100
    return s


def zero_points(kind, shape, qmin, qmax, seed=0):
    if kind == "none":
        return None
    if kind == "integer":
        z = torch.randint(qmin, qmax + 1, shape, generator=generator(seed))
        return z.to(torch.int32)
    return torch.randn(shape, generator=generator(seed))


ZERO_POINTS = ("none", "integer", "real")


def check_learned_gradients(got, grad, x, s, z=None, *, qmin, qmax, granularity):
    """Within the rounding of fp32 of the float64 oracle, whose integers are the fp32 ones."""
    kwargs = {"qmin": qmin, "qmax": qmax}
    oracle = functional.fake_quantize_learned_backward(
        grad, x, s, z, **kwargs, granularity=granularity, dtype=torch.float64
    )
    assert_same_bits(got[0], oracle[0])
    # Every element with a scale of its own: the terms of the sums.
    each = [
        None if t is None else _expand(t, x, granularity).expand(x.shape).reshape(-1)
        for t in (s, z)
    ]
    _, *terms = functional.fake_quantize_learned_backward(
        grad.reshape(-1),
        x.reshape(-1),
        *each,
        **kwargs,
        granularity=PerAxis(0),
        dtype=torch.float64,
    )
    for value, want, term in zip(got[1:], oracle[1:], terms, strict=True):
        assert value.dtype == torch.float32 and value.shape == s.shape
        most = _sum_by_scale(term.abs().reshape(x.shape), s, granularity)
        # A lane adds up to 256 terms, 16 lanes are added, and a term is rounded thrice.
        assert ((value.double() - want).abs() <= most * (264 * 2.0**-24) + 1e-38).all()
