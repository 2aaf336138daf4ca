"""PACTQuantizer: the clip, its gradient and the dtypes."""

import pytest
import torch
from support import FLOATS, NAN, assert_same_bits, floats
from support.learned import gradients

from torchquant import PACTQuantizer, functional


def test_pact_clips_and_learns_from_the_clipped_side() -> None:
    quantizer = PACTQuantizer(2, alpha=3.0)
    x = torch.tensor([-1.0, 0.4, 1.6, 3.0, 5.0, NAN])
    assert_same_bits(quantizer(x).detach(), torch.tensor([0.0, 0.0, 2.0, 3.0, 3.0, NAN]))
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 0.0])
    got = gradients(quantizer, x, upstream)
    assert got["input"].tolist() == [0.0, 2.0, 4.0, 0.0, 0.0, 0.0]
    assert got["alpha"].item() == 24.0
    scale, zero_point = quantizer.qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pact_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = floats(4, 8, dtype=dtype)
    y = PACTQuantizer(4)(x)
    scale = torch.tensor([6.0]) / 15
    q = functional.quantize(x, scale, qmin=0, qmax=15, dtype=torch.uint8)
    clipped = functional.dequantize(q, scale, dtype=dtype)
    assert y.dtype == dtype
    # Clipping to alpha rounds once more than the integers do.
    torch.testing.assert_close(y, clipped, rtol=0, atol=0)
