"""Patches of photographs: which photograph does a patch come from?

The photographs belong to scikit-learn and scikit-image, which install them with their code; nothing
is downloaded. Neither package is a requirement of torchquant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchquant.data.images import SIZE, ImageData, require_count

_SQUARE = 2 * SIZE  # a square of a photograph serves either the training or the test
_TEST_SQUARES = 4  # one of so many squares
_SCIKIT_IMAGE = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")


def photograph_patches(
    *, train_patches: int = 512, test_patches: int = 512, seed: int = 0
) -> ImageData:
    """Patches of 32 x 32 pixels of photographs; the class of a patch is its photograph.

    Each photograph is cut into squares of 64 x 64 pixels. A random quarter of the squares is held
    out: test patches lie inside of them, training patches inside of the others. No pixel is in
    both.

    Args:
        train_patches: number of training patches of each photograph.
        test_patches: number of test patches of each photograph.
        seed: the squares and the places of the patches follow from it.

    Returns:
        Colour images ``[n, 3, 32, 32]``. ``classes`` names the photographs: two with scikit-learn
        alone, eight with scikit-image.

    Raises:
        ModuleNotFoundError: neither scikit-learn nor scikit-image is installed.
        ValueError: a number of patches is not an integer of at least 1.

    Example:
        >>> data = photograph_patches(train_patches=10, test_patches=5)
        >>> data.test_images.shape[1:], len(data.test_images) == 5 * len(data.classes)
        (torch.Size([3, 32, 32]), True)
    """
    require_count("photograph_patches", "train_patches", train_patches, 1)
    require_count("photograph_patches", "test_patches", test_patches, 1)
    photographs = dict(_photographs())
    if not photographs:
        raise ModuleNotFoundError(
            "photograph_patches: the photographs of scikit-learn or scikit-image must be "
            "installed, neither was found; pip install scikit-learn scikit-image pillow"
        )
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for photograph in photographs.values():
        kept, held_out = _squares(photograph, generator)
        train.append(_patches(kept, train_patches, generator))
        test.append(_patches(held_out, test_patches, generator))
    labels = torch.arange(len(photographs))
    return ImageData(
        torch.cat(train),
        labels.repeat_interleave(train_patches),
        torch.cat(test),
        labels.repeat_interleave(test_patches),
        tuple(photographs),
    )


def _photographs() -> Iterator[tuple[str, Tensor]]:
    """Name and pixels ``[3, height, width]`` from 0 to 1 of the photographs that are installed."""
    sklearn: Any = _module("sklearn.datasets")
    if sklearn is not None:
        for name in ("china", "flower"):
            yield from _read(name, partial(sklearn.load_sample_image, f"{name}.jpg"))
    skimage: Any = _module("skimage.data")
    if skimage is not None:
        for name in _SCIKIT_IMAGE:
            yield from _read(name, getattr(skimage, name))


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def _read(name: str, read: Callable[[], Any]) -> Iterator[tuple[str, Tensor]]:
    try:
        pixels = np.asarray(read())[..., :3]
    except ImportError:  # the package that decodes images, which is optional there
        return
    yield name, torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(torch.float32) / 255


def _squares(photograph: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The squares ``[n, 3, 64, 64]`` to train on, and those that are held out."""
    rows = photograph.unfold(1, _SQUARE, _SQUARE).unfold(2, _SQUARE, _SQUARE)
    squares = rows.permute(1, 2, 0, 3, 4).flatten(0, 1)
    squares = squares[torch.randperm(len(squares), generator=generator)]
    count = max(1, len(squares) // _TEST_SQUARES)
    return squares[count:], squares[:count]


def _patches(squares: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` patches ``[count, 3, 32, 32]`` at random places in random squares."""
    places = torch.randint(0, _SQUARE - SIZE + 1, (count, 2), generator=generator).tolist()
    chosen = torch.randint(0, len(squares), (count,), generator=generator).tolist()
    return torch.stack(
        [
            squares[square, :, top : top + SIZE, left : left + SIZE]
            for square, (top, left) in zip(chosen, places, strict=True)
        ]
    )
