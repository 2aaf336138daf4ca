"""Images for the demo, the examples and the tests: what ships, and what pip brings."""

from torchquant.data.digits import DigitsData, digit_images, load_digits_data
from torchquant.data.images import ImageData, augment
from torchquant.data.photographs import photograph_patches

__all__ = [
    "DigitsData",
    "ImageData",
    "augment",
    "digit_images",
    "load_digits_data",
    "photograph_patches",
]
