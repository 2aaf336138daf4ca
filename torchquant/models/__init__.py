"""Small models that ship with the package, for the demo, the examples and the tests."""

from torchquant.data.digits import DigitsData, load_digits_data
from torchquant.models.digits import DigitsTransformer, load_digits_model
from torchquant.models.resnet import SmallResNet, load_digits_resnet
from torchquant.models.vgg import SmallVGG, load_digits_vgg

__all__ = [
    "DigitsData",
    "DigitsTransformer",
    "SmallResNet",
    "SmallVGG",
    "load_digits_data",
    "load_digits_model",
    "load_digits_resnet",
    "load_digits_vgg",
]
