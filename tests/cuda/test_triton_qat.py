"""The products of quantization-aware training on Triton's kernels."""

import pytest
import torch
from support import assert_same_bits, generator, in_layout
from support.triton import DEVICE
from support.triton_operators import (
    moved,
    operator,
    run,
    scales_of,
    small_tiles_and_poisoned_memory,  # noqa: F401  (a fixture)
    zero_points,
)

# The interpreter computes with numpy, which warns of overflow and NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("small_tiles_and_poisoned_memory"),
]


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 30, 70), (33, 65, 17)], ids=str)
@pytest.mark.parametrize("kind", ["none", "integer", "one_integer"])
def test_product_with_a_fake_quantized_weight(shape, kind):
    m, n, k = shape
    grad = torch.randn(m, n, generator=generator(0))
    weight = in_layout(torch.randn(n, k, generator=generator(1)), "sliced")
    for s in (scales_of(weight, {"axis": 0}).nan_to_num(0.1).clamp(0.01, 1.0), torch.tensor([0.1])):
        z = zero_points(kind, (n,), -8, 7)
        got, expected = run("mm_fake_quantized", grad, weight, s, z, -8, 7)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            again = operator("mm_fake_quantized")(*moved(grad, weight, s, z), -8, 7)
        assert_same_bits(again, got)
