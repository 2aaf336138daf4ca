"""What a verb may compute together with the layers that it quantizes."""

from __future__ import annotations

from dataclasses import dataclass

from torchquant.configs.part import require_booleans


@dataclass(frozen=True)
class Fusion:
    """What :func:`torchquant.quantize_` may compute together with the quantized layers.

    Values that code can see change by rounding only: layers compute more than their own output
    only in calls where nobody can notice it (:mod:`torchquant.nn.call_guard`).

    Args:
        activations: if True, an activation module after a layer uses the library's operator, and
            the layer applies the function itself, while the sums are in registers, where its output
            goes into the activation and nowhere else. Results change by rounding: the library's
            polynomials replace those of torch (:mod:`torchquant.functional.activations` states
            their errors). Whether the layer or the module applies the function changes no bit. In
            bfloat16 and float16 it would, so there only ReLU moves into the layer.
        projections: if True, layers that are applied to the same tensor (query, key and value; gate
            and up) are computed together, so that the tensor is quantized once. Results keep their
            bits. This takes effect from 64 rows on, while gradients (``torch.no_grad``,
            ``torch.inference_mode``) and autocast are off.

    Raises:
        TypeError: a flag is not a bool.

    Example:
        >>> Fusion(activations=False)
        Fusion(activations=False, projections=True)
    """

    activations: bool = True
    projections: bool = True

    def __post_init__(self) -> None:
        require_booleans(self, "activations")
        require_booleans(self, "projections")


def check_fusion(who: str, fusion: Fusion | None) -> Fusion:
    """Return ``fusion``, or the default value for None.

    Raises:
        TypeError: fusion is not a :class:`Fusion`; the message starts with ``who``.

    Example:
        >>> check_fusion("quantize_", None) == Fusion()
        True
    """
    if fusion is None:
        return Fusion()
    if not isinstance(fusion, Fusion):
        raise TypeError(f"{who}: fusion must be a torchquant.Fusion(), got {fusion!r}")
    return fusion
