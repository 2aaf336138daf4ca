"""FloatForm: the float class that a linear layer was made from, and the layout of its weight.

A layer that replaces an ``nn.Linear`` restores an ``nn.Linear``. A layer that replaces another
class (transformers' Conv1D, FalconLinear) keeps a copy of the module without its parameters. The
layer restores that class from it, and has its plain attributes (``nf`` of Conv1D).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchquant.nn.linear_probe import is_transposed


@dataclass(frozen=True)
class FloatForm:
    """The class of a float linear layer and the layout of its weight.

    Args:
        empty: a module of the class without parameters, in a tuple so that ``nn.Module`` does not
            register it as a child; () for ``nn.Linear``.
        transposed: True if the weight is ``[inputs, outputs]``.

    Example:
        >>> FloatForm.of(nn.Linear(4, 2)).shape((2, 4))
        (2, 4)
    """

    empty: tuple[nn.Module, ...] = ()
    transposed: bool = False

    @staticmethod
    def of(module: nn.Module) -> FloatForm:
        """The form of a linear layer: a float module, or a layer that already has a form."""
        form = module.__dict__.get("float_form")
        if isinstance(form, FloatForm):
            return form
        if type(module) is nn.Linear or "weight" not in module._parameters:
            return NN_LINEAR
        return FloatForm((_without_parameters(module),), is_transposed(module))

    def give_to(self, layer: nn.Module) -> None:
        """Store the form in a layer, with the attributes of the class that the layer lacks."""
        if not self.empty:
            layer.__dict__.pop("float_form", None)
            return
        layer.__dict__["float_form"] = self
        for name, value in _attributes(self.empty[0]).items():
            if not hasattr(layer, name):
                setattr(layer, name, value)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight in this layout as ``[outputs, inputs]``, or the other way round: a view."""
        return weight.t() if self.transposed else weight

    def shape(self, matrix: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the float weight; ``matrix`` is ``(outputs, inputs)``."""
        return (matrix[1], matrix[0]) if self.transposed else matrix

    def module(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        """A float module with these parameters, the same objects."""
        if self.empty:
            module = copy.deepcopy(self.empty[0])
        else:
            rows, columns = weight.shape
            module = nn.Linear(columns, rows, bias is not None, device="meta")
        module._parameters["weight"], module._parameters["bias"] = weight, bias
        return module


NN_LINEAR = FloatForm()


def _without_parameters(module: nn.Module) -> nn.Module:
    """A module of the same class with the same plain attributes, and without hooks."""
    empty = type(module).__new__(type(module))
    nn.Module.__init__(empty)
    empty.__dict__.update(_attributes(module))
    for name in ("weight", "bias"):
        empty.register_parameter(name, None)
    return empty


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that the class of a module added to those of ``nn.Module``."""
    own = nn.Module().__dict__
    return {name: value for name, value in module.__dict__.items() if name not in own}


__all__ = ["FloatForm"]
