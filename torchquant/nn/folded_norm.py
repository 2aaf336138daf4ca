"""FoldedNorm: replaces a batch norm that the layer before it computes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class FoldedNorm(nn.Identity):
    """An identity in place of a batch norm that became part of the layer before it.

    It has the name of the batch norm, and no state. The surrounding forward does not change. A
    batch norm that applies modules of its own afterwards, such as timm's ``BatchNormAct2d``, leaves
    these modules here, and a call still applies them.

    Args:
        original: the batch norm, if the layer still trains it; None once its values are in the
            layer's weight and bias. It is not registered as a child of this module.
        dimensions: the number of dimensions that an input must have; None for any. ``BatchNorm1d``
            normalizes dimension 1 of ``[n, c]`` and of ``[n, c, length]``, which the layer before
            it can stand for in one of the two only.

    Example:
        >>> norm = nn.BatchNorm2d(8)
        >>> place = FoldedNorm(norm)
        >>> place, place.original is norm
        (FoldedNorm(), True)
    """

    dimensions: int | None = None

    def __init__(self, original: nn.Module | None = None, dimensions: int | None = None) -> None:
        super().__init__()
        self.dimensions = dimensions
        # The tuple keeps nn.Module from registering a child.
        self._original = () if original is None else (original,)

    @classmethod
    def in_place_of(cls, norm: nn.Module, dimensions: int | None = None) -> FoldedNorm:
        """The module that replaces a batch norm whose values are in the layer before it.

        Example:
            >>> FoldedNorm.in_place_of(nn.BatchNorm2d(8))
            FoldedNorm()
        """
        place = cls(dimensions=dimensions)
        for name, child in norm.named_children():
            place.add_module(name, child)
        return place.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, or what the modules of the batch norm make of it.

        Raises:
            ValueError: the input has other dimensions than the folded layer stands for.
        """
        if self.dimensions is not None and input.dim() != self.dimensions:
            raise ValueError(
                f"FoldedNorm: input must have {self.dimensions} dimensions, because a batch norm "
                "became part of the layer before it, got a tensor of the shape "
                f"{list(input.shape)}; pass such inputs to prepare_ as example_inputs, so that "
                "the batch norm stays as it is"
            )
        for module in self.children():
            input = module(input)
        return input

    @property
    def original(self) -> nn.Module | None:
        """The batch norm that was replaced, if the layer still trains it."""
        return self._original[0] if self._original else None

    def release(self) -> None:
        """Forget the batch norm: its values are in the layer's weight and bias now."""
        self._original = ()


def places_of(model: nn.Module, norms: Iterable[nn.Module]) -> list[FoldedNorm]:
    """The identities of a model that stand for some batch norms.

    Example:
        >>> norm = nn.BatchNorm2d(8)
        >>> places_of(nn.Sequential(FoldedNorm(norm), FoldedNorm()), [norm])
        [FoldedNorm()]
    """
    wanted = {id(norm) for norm in norms}
    return [
        module
        for module in model.modules()
        if isinstance(module, FoldedNorm) and id(module.original) in wanted
    ]


def restore_norms(model: nn.Module, norms: Iterable[nn.Module]) -> None:
    """Put batch norms back into the places of the identities that stand for them.

    Example:
        >>> norm = nn.BatchNorm2d(8)
        >>> model = nn.Sequential(FoldedNorm(norm))
        >>> restore_norms(model, [norm])
        >>> model[0] is norm
        True
    """
    places = {id(place): place for place in places_of(model, norms)}
    for parent in [*model.modules()]:
        for name, child in parent._modules.items():
            if id(child) in places:
                parent._modules[name] = places[id(child)].original


__all__ = ["FoldedNorm", "places_of", "restore_norms"]
