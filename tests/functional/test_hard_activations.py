"""relu, relu6, hardswish, hardsigmoid and leaky_relu have the bits of torch on a CPU."""

import pytest
import torch
from support import INF, NAN, assert_same_bits, check_everywhere
from torch.nn import functional as F

from torchquant import ops
from torchquant.functional import ACTIVATIONS

TORCH = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
}


def every(step: int) -> torch.Tensor:
    """One of ``step`` fp32 numbers, of all of them: both signs, denormals, infinities, NaN."""
    bits = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32)
    return bits.view(torch.float32)


@pytest.mark.parametrize("name", TORCH)
def test_bits_are_torchs(name: str) -> None:
    near = torch.linspace(-7, 7, 1_000_003)  # where the functions bend
    for x in (every(997), near, near[::3]):  # in vectors and one by one
        assert_same_bits(ACTIVATIONS[name](x), TORCH[name](x), name)


@pytest.mark.parametrize("name", ["hardswish", "hardsigmoid"])
def test_kernels_divide_by_six_as_torch_does(name: str) -> None:
    """They multiply and correct the error instead; results may be denormal or infinite."""
    tiny = torch.arange(1, 200_000, dtype=torch.int32).view(torch.float32)
    x = torch.cat([every(4999), tiny, -tiny, tiny * 2.0**20])
    check_everywhere(lambda: ops.activation(x, name), TORCH[name](x), what=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH)
def test_bits_are_torchs_for_more_numbers(name: str) -> None:
    x = every(13)
    for part in x.split(1 << 22):
        assert_same_bits(ACTIVATIONS[name](part), TORCH[name](part), name)


SPECIAL = {
    "relu6": [0.0, -0.0, 6.0, 0.0, NAN, 6.0],
    "hardswish": [0.0, -0.0, INF, NAN, NAN, INF],
    "hardsigmoid": [0.5, 0.5, 1.0, 0.0, NAN, 1.0],
    "leaky_relu": [0.0, -0.0, INF, -INF, NAN, 3e38],
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name: str) -> None:
    x = torch.tensor([0.0, -0.0, INF, -INF, NAN, 3e38])
    assert_same_bits(ACTIVATIONS[name](x), torch.tensor(SPECIAL[name]))
