"""Calls that Triton's operators leave to the ATen fallback."""

import pytest
import torch
from support.triton_operators import (
    moved,
    operator,
    small_tiles_and_poisoned_memory,  # noqa: F401  (a fixture)
)

# The interpreter computes with numpy, which warns of overflow and NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("small_tiles_and_poisoned_memory"),
]


X, ONE = torch.randn(4, 6), torch.tensor([0.1])
LEFT = {
    "empty": ("fake_quantize", X[:0], ONE, None, -8, 7),
    "empty_bits": ("positive", X[:0]),
    "float64": ("fake_quantize", X.double(), ONE, None, -8, 7),
    "scale_of_another_type": ("fake_quantize", X, ONE.half(), None, -8, 7),
    "scale_of_another_shape": ("fake_quantize", X, torch.ones(5), None, -8, 7, 0),
    "several_scales": ("fake_quantize", X, torch.ones(4), None, -8, 7),
    "axis_and_group": ("fake_quantize", X, torch.ones(4), None, -8, 7, 0, 6),
    "no_such_axis": ("fake_quantize", X, torch.ones(4), None, -8, 7, 2),
    "zero_point_of_another_type": ("fake_quantize", X, ONE, ONE.double(), -8, 7),
    "zero_points_of_another_shape": ("fake_quantize", X, torch.ones(4), torch.ones(5), -8, 7, 0),
    "range": ("fake_quantize", X, ONE, None, 7, 7),
    "wide_range": ("fake_quantize", X, ONE, None, 0, 2**22),
    "offset": ("fake_quantize_learned", X, ONE, torch.ones(2), -8, 7, 1.0),
    "grad": ("fake_quantize_learned_backward", X.half(), X, ONE, None, -8, 7),
    "learned_zero": ("fake_quantize_learned_backward", X, X, ONE, ONE, -8, 7),
    "bits": ("mask_gradient", X, torch.zeros(2, dtype=torch.uint8)),
    "minmax": ("minmax", X.long()),
    "group": ("minmax", X, None, 0),
    "quantize_range": ("quantize", X, ONE, None, -128, 128),
    "quantize_type": ("quantize", X, ONE, None, -8, 7, None, None, torch.int32),
    "dequantize": ("dequantize", X.int(), ONE, None),
    "activation": ("activation", X, "swish"),
    "up": ("gated_activation", X, X[:1], "silu"),
    "norm_weight": ("rms_norm", X, torch.ones(5), 1e-6),
    "norm_eps": ("rms_norm", X, None, -1.0),
    "norm_bias": ("layer_norm", X, None, torch.ones(6), 1e-6),
    "norm_residual": ("layer_norm", X, None, None, 1e-6, X[:2]),
    "norm_scalar": ("rms_norm", torch.tensor(1.0), None, 1e-6),
    "product": ("mm_fake_quantized", X, X, ONE, None, -8, 7),
    "product_range": ("mm_fake_quantized", X, X.t(), ONE, None, 0, 255),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_others(case):
    name, *args = LEFT[case]
    assert operator(name)(*moved(*args)) is NotImplemented
