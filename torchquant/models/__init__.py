"""Small models that ship with the package, for the demo, the examples and the tests."""

from torchquant.models.digits import (
    DigitsData,
    DigitsTransformer,
    load_digits_data,
    load_digits_model,
)

__all__ = ["DigitsData", "DigitsTransformer", "load_digits_data", "load_digits_model"]
