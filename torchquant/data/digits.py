"""The handwritten digits that ship with the package: as they are, and as images for a CNN."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant.data.files import packaged
from torchquant.data.images import SIZE, ImageData, augment, require_count

MAX_PIXEL = 16  # each pixel counts the ink dots in a 4 x 4 square of the scanned bitmap
DATA_FILE = "digits.npz"


class DigitsData(NamedTuple):
    """The digits, split into a part to train on and a part to test on.

    Images are fp32 ``[n, 8, 8]`` with values from 0 (white) to 1 (ink), labels int64 ``[n]`` with
    values from 0 to 9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits_data() -> DigitsData:
    """The handwritten digits that ship with the package, without scikit-learn.

    1797 images from the UCI "Optical Recognition of Handwritten Digits" data set (CC BY 4.0), as
    scikit-learn distributes them; see ``torchquant/data/README.md``. The split is fixed.

    Returns:
        :class:`DigitsData`; images fp32 ``[n, 8, 8]`` from 0 to 1, labels int64 ``[n]``.

    Raises:
        FileNotFoundError: the data file is missing from the installed package.

    Example:
        >>> from torchquant.models import load_digits_data
        >>> data = load_digits_data()
        >>> data.train_images.shape, data.test_images.shape
        (torch.Size([1347, 8, 8]), torch.Size([450, 8, 8]))
    """
    with np.load(packaged(DATA_FILE, "train_digits.py")) as file:
        images = torch.from_numpy(file["images"]).to(torch.float32) / MAX_PIXEL
        labels = torch.from_numpy(file["labels"]).to(torch.int64)
        train = torch.from_numpy(file["train_indices"]).to(torch.int64)
        test = torch.from_numpy(file["test_indices"]).to(torch.int64)
    return DigitsData(images[train], labels[train], images[test], labels[test])


def digit_images(*, channels: int = 1, test_copies: int = 8, seed: int = 0) -> ImageData:
    """The handwritten digits, enlarged to 32 x 32 pixels, with an augmented test set.

    The training images are not augmented, because training augments them anew in each epoch (see
    :func:`augment`). The split is the one of :func:`load_digits_data`, so that no test image is a
    copy of a training image.

    Args:
        channels: 1 for grey images, 3 for the same values in red, green and blue.
        test_copies: how often each of the 450 test images occurs, each time augmented differently;
            0 for the test images without augmentation.
        seed: the augmentation of the test images follows from it.

    Returns:
        1347 training images, and ``450 * test_copies`` test images.

    Raises:
        ValueError: channels is neither 1 nor 3, or test_copies is not an integer from 0.
        FileNotFoundError: the data file is missing from the installed package.

    Example:
        >>> data = digit_images(test_copies=2)
        >>> data.train_images.shape, data.test_images.shape, data.classes[3]
        (torch.Size([1347, 1, 32, 32]), torch.Size([900, 1, 32, 32]), '3')
    """
    if channels not in (1, 3):
        raise ValueError(
            f"digit_images: channels must be 1 (grey) or 3 (red, green, blue), got {channels!r}"
        )
    require_count("digit_images", "test_copies", test_copies, 0)
    data = load_digits_data()
    train, test = (_enlarged(images, channels) for images in (data[0], data[2]))
    test_labels = data.test_labels
    if test_copies:
        generator = torch.Generator().manual_seed(seed)
        test = augment(test.repeat(test_copies, 1, 1, 1), generator)
        test_labels = test_labels.repeat(test_copies)
    classes = tuple(str(digit) for digit in range(10))
    return ImageData(train, data.train_labels, test, test_labels, classes)


def _enlarged(images: Tensor, channels: int) -> Tensor:
    """Images ``[n, 8, 8]`` as ``[n, channels, 32, 32]``."""
    large = F.interpolate(images.unsqueeze(1), (SIZE, SIZE), mode="bicubic", align_corners=False)
    return large.clamp(0, 1).repeat(1, channels, 1, 1)
