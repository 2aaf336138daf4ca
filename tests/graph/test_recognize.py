"""torchquant.graph.recognize: the table of reference functions is complete."""

import pytest

from torchquant.functional import ACTIVATIONS
from torchquant.graph.recognize import activation_of
from torchquant.nn import Activation


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_of_the_library_is_recognised(name: str) -> None:
    """Only a function of one tensor that changes values counts: the identity has no name."""
    assert activation_of(Activation(name)) == (None if name == "none" else name)
