"""CountingObserver: what the observers share that decide on a histogram of the values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from torchquant.configs.calibration import MOST_BINS
from torchquant.scheme import PER_TENSOR, PerGroup
from torchquant.training.counts import (
    FINEST,
    bins_per_sign,
    merge_counts,
    update_counts,
    update_counts_operator,
)
from torchquant.training.observers import Observer
from torchquant.training.processes import ALONE
from torchquant.training.state import inside_backward

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from torchquant.training.observers import ObserverOptions


class CountingObserver(Observer):
    """An observer that counts values by bin, and derives the range from the counts.

    The counts need O(bins) memory for any number of batches of any shape. They are the same for
    every order of the batches and for every division of them into observers that are merged, see
    :mod:`torchquant.training.counts`.

    State: in addition to that of :class:`Observer`, ``counts`` int64 ``[scales, 2 N - 1]`` and
    ``exponent`` int64 ``[scales]``, with N a power of two that is at least ``4 * bins``.

    A forward sees the values of its own process only; :meth:`reduced` combines the processes.

    Args:
        bins: the resolution: the observed range consists of at least ``2 * bins`` bins. 2048 bins
            take 128 KiB for each scale.
        bits, signed, symmetric, granularity, narrow_range, shape, process_group, device: see
            :class:`Observer`. ``process_group`` is the default of :meth:`reduced`.

    Raises:
        TypeError, ValueError: see :class:`Observer`; ValueError also if bins is not an integer of
            at least 2, or granularity is PerGroup.

    Example:
        >>> observer = CountingObserver(bins=4)
        >>> _ = observer(torch.tensor([0.0, 0.5, -0.25, 0.99]))
        >>> observer.exponent, observer.counts.shape, int(observer.counts.sum())
        (tensor([-4]), torch.Size([1, 31]), 4)
    """

    counts: Tensor
    exponent: Tensor
    shaped: ClassVar[tuple[str, ...]] = ("min_val", "max_val", "counts", "exponent")
    per_channel: ClassVar[bool] = False

    def __init__(
        self,
        bins: int = 2048,
        **options: Unpack[ObserverOptions],
    ) -> None:
        super().__init__(**options)
        granularity = self.granularity
        who = type(self).__name__
        if isinstance(granularity, PerGroup) or (
            granularity != PER_TENSOR and not self.per_channel
        ):
            allowed = "PerTensor() or PerAxis(axis)" if self.per_channel else "PerTensor()"
            raise ValueError(
                f"{who}: granularity must be {allowed}, got {granularity}; MinMaxObserver takes "
                "all of them"
            )
        if isinstance(bins, bool) or not isinstance(bins, int) or not 2 <= bins <= MOST_BINS:
            raise ValueError(
                f"{who}: bins must be an integer from 2 to {MOST_BINS}, got {bins!r}; 2048 is usual"
            )
        self.bins = bins
        for name in ("counts", "exponent"):
            empty = torch.zeros(0, dtype=torch.int64, device=self.min_val.device)
            self.register_buffer(name, empty)
        if list(self.min_val.shape) != [0]:
            self._set_shape(tuple(self.min_val.shape))

    def forward(self, input: Tensor) -> Tensor:
        """Count the values of a float32, bfloat16 or float16 tensor and return the same object.

        Raises:
            TypeError: input is not a float32, bfloat16 or float16 tensor.
            ValueError: input is on another device, or its scales have another shape than those of
                earlier batches.
        """
        self.check_input(input, self.num_batches)
        self._take_shape(input)
        axis, _ = self.granularity.axis_and_group_size(input.shape)
        state = (self.min_val, self.max_val, self.num_batches, self.nonfinite)
        if torch.compiler.is_compiling():
            update_counts_operator(input.detach(), *state, self.counts, self.exponent, axis, ALONE)
            return input
        if input.is_meta or inside_backward():
            return input
        update_counts(input, *state, self.counts, self.exponent, axis, ALONE)
        if not self._warned and self.nonfinite.is_cpu and self.nonfinite.numpy()[0]:
            self._warn_nonfinite()
        return input

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self.counts.zero_()
        self.exponent.fill_(FINEST)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bins={self.bins}"

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        super()._set_shape(shape)
        with torch.inference_mode(False):
            options: Any = {"dtype": torch.int64, "device": self.num_batches.device}
            size = 2 * bins_per_sign(self.bins) - 1
            self.counts = torch.zeros(shape[0], size, **options)
            self.exponent = torch.full((shape[0],), FINEST, **options)

    def _merge_ranges(self, other: Any) -> None:
        super()._merge_ranges(other)
        merge_counts(self.counts, self.exponent, other.counts, other.exponent)


__all__ = ["CountingObserver"]
