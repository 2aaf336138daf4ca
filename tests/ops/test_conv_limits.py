"""Convolutions on inputs and scales at the edge of what they take."""

import pytest
import torch
from support import check_everywhere, integers
from torch import Tensor

from torchquant import functional, ops


def run(x: Tensor, w: Tensor, scale: Tensor, groups: int, **options: object) -> None:
    """The operator has the bits of the specification, under all instruction sets."""
    zero = torch.tensor([3], dtype=torch.int32)
    sizes: dict[str, object] = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1]}
    sizes |= {"groups": groups, **options}
    wanted = functional.conv_static(x, torch.ones(1), zero, w, scale, None, **sizes)  # type: ignore[arg-type]
    packed = ops.pack_conv_weight(w, groups)
    check_everywhere(
        lambda: ops.conv_static(
            x,
            torch.ones(1),
            zero,
            packed,
            scale,
            None,
            weight_shape=list(w.shape),
            **sizes,  # type: ignore[arg-type]
        ),
        wanted,
    )


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("groups", [2, 1], ids=["depthwise", "dense"])
@pytest.mark.parametrize("axis", [2, 3])
def test_expanded_images(axis: int, groups: int, multiplier: int) -> None:
    shape = [1, 2, 8, 8]
    shape[axis] = 1
    x = integers(*shape).contiguous(memory_format=torch.channels_last).expand(1, 2, 8, 8)
    w = integers(2 * multiplier, 2 // groups, 3, 3)
    run(x, w, torch.full((2 * multiplier,), 0.01), groups)


@pytest.mark.parametrize("groups", [64, 1], ids=["depthwise", "dense"])
@pytest.mark.parametrize("scale", [-1e-3, -1e6, -1e30, -3e38])
def test_negative_scales_of_weights(scale: float, groups: int) -> None:
    x, w = integers(1, 64, 5, 5), integers(64, 64 // groups, 3, 3)
    options = {"output_dtype": torch.int8, "output_scale": torch.tensor([0.5])}
    run(x, w, torch.full((64,), scale), groups, **options)


def test_depthwise_kernels_whose_sums_could_overflow_are_refused() -> None:
    w = torch.zeros((2, 1, 66000), dtype=torch.int8)
    with pytest.raises(ValueError, match="a depthwise convolution must have at most 65793"):
        ops.pack_conv_weight(w, 2)
