"""Sets of small images with labels, and their augmentation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32  # pixels of a side


class ImageData(NamedTuple):
    """Images with labels, split into a part to train on and a held-out part to test on.

    Images are fp32 ``[n, channels, 32, 32]`` with values from 0 to 1; labels are int64 ``[n]``,
    indices into ``classes``.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    shift: float = 0.1,
    rotation: float = 12.0,
    contrast: float = 0.3,
    noise: float = 0.05,
) -> Tensor:
    """Shift and rotate each image, change its contrast and add noise, each by a random amount.

    All pixels beyond the border of an image repeat the pixels at its border.

    Args:
        images: float ``[n, channels, height, width]`` with values from 0 to 1.
        generator: the source of all random numbers, on the device of the images.
        shift: the greatest shift along each axis, as a fraction of the image's side.
        rotation: the greatest angle in degrees.
        contrast: the contrast is multiplied by a factor from ``1 - contrast`` to ``1 + contrast``.
        noise: the standard deviation of the normal noise of each value.

    Returns:
        New images of the same shape and dtype, with values from 0 to 1.

    Raises:
        ValueError: images is not four-dimensional, or an amount is negative.

    Example:
        >>> images = torch.rand(5, 3, 32, 32)
        >>> first = augment(images, torch.Generator().manual_seed(0))
        >>> again = augment(images, torch.Generator().manual_seed(0))
        >>> torch.equal(first, again), first.shape
        (True, torch.Size([5, 3, 32, 32]))
    """
    if images.dim() != 4:
        raise ValueError(
            "augment: images must be [n, channels, height, width], got "
            f"{list(images.shape)}; use unsqueeze for single or grey images"
        )
    amounts = {"shift": shift, "rotation": rotation, "contrast": contrast, "noise": noise}
    for name, amount in amounts.items():
        if not amount >= 0:
            raise ValueError(f"augment: {name} must be at least 0, got {amount!r}")

    def uniform(limit: float) -> Tensor:
        drawn = torch.rand(len(images), generator=generator, device=images.device)
        return (2 * drawn - 1) * limit

    angle = uniform(math.radians(rotation))
    cos, sin = angle.cos(), angle.sin()
    # The grid's units: an image spans [-1, 1].
    top = torch.stack([cos, -sin, uniform(2 * shift)], dim=1)
    bottom = torch.stack([sin, cos, uniform(2 * shift)], dim=1)
    turn = torch.stack([top, bottom], dim=1).to(images.dtype)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    factor = (1 + uniform(contrast)).to(images.dtype).view(-1, 1, 1, 1)
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    noisy = torch.randn(images.shape, generator=generator, device=images.device) * noise
    return ((moved - mean) * factor + mean + noisy.to(images.dtype)).clamp(0, 1)


def require_count(who: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{who}: {name} must be an integer of at least {least}, got {value!r}")
