"""How the range of static activations is chosen: the parts that name an observer."""

from __future__ import annotations

from dataclasses import dataclass

from torchquant.configs.part import Part

MOST_BINS = 1 << 20


@dataclass(frozen=True)
class Calibration(Part):
    """The base class of the parts that name an observer.

    Example:
        >>> [calibration_named("calibrate", name) for name in ("minmax", "entropy")]
        [MinMax(), Entropy(bins=2048, levels=128)]
    """

    def __str__(self) -> str:
        return repr(self)


@dataclass(frozen=True)
class MinMax(Calibration):
    """The least and the greatest value of all batches; one outlier widens the range.

    Example:
        >>> str(MinMax())
        'MinMax()'
    """


@dataclass(frozen=True)
class MovingAverage(Calibration):
    """Moving averages of the least and the greatest value of each batch.

    The only choice that depends on the order of the batches.

    Args:
        averaging_constant: the weight of the newest batch, above 0 and at most 1.

    Raises:
        ValueError: averaging_constant is not a number above 0 and at most 1.

    Example:
        >>> MovingAverage().averaging_constant
        0.01
    """

    averaging_constant: float = 0.01

    def __post_init__(self) -> None:
        if not _is_number(self.averaging_constant) or not 0 < self.averaging_constant <= 1:
            raise ValueError(
                "MovingAverage: averaging_constant must be a number above 0 and at most 1, got "
                f"{self.averaging_constant!r}"
            )


@dataclass(frozen=True)
class Percentile(Calibration):
    """The range beyond which at most ``100 - percentile`` percent of the values lie at each end.

    Args:
        percentile: above 50 and at most 100.
        bins: bins of the histogram, see :class:`Histogram`.

    Raises:
        ValueError: percentile or bins is out of its range.

    Example:
        >>> Percentile(99.9).bins
        2048
    """

    percentile: float = 99.99
    bins: int = 2048

    def __post_init__(self) -> None:
        if not _is_number(self.percentile) or not 50 < self.percentile <= 100:
            raise ValueError(
                "Percentile: percentile must be a number above 50 and at most 100, got "
                f"{self.percentile!r}"
            )
        _require_bins("Percentile", self.bins)


@dataclass(frozen=True)
class Histogram(Calibration):
    """The range of least squared error of quantization, found on a histogram; the default.

    Args:
        bins: the observed range consists of at least twice as many bins.

    Raises:
        ValueError: bins is not an integer of at least 2.

    Example:
        >>> Histogram()
        Histogram(bins=2048)
    """

    bins: int = 2048

    def __post_init__(self) -> None:
        _require_bins("Histogram", self.bins)


@dataclass(frozen=True)
class Entropy(Calibration):
    """The range of least Kullback-Leibler divergence between the values and their levels.

    Args:
        bins: bins of the histogram of the magnitudes.
        levels: number of levels on one side of 0, from 2 to bins; 128 for 8 bits.

    Raises:
        ValueError: bins or levels is out of its range.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017.

    Example:
        >>> Entropy(levels=8)
        Entropy(bins=2048, levels=8)
    """

    bins: int = 2048
    levels: int = 128

    def __post_init__(self) -> None:
        _require_bins("Entropy", self.bins)
        levels = self.levels
        if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= self.bins:
            raise ValueError(
                f"Entropy: levels must be an integer from 2 to bins = {self.bins}, got {levels!r}"
            )


_NAMES: dict[str, type[Calibration]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "histogram": Histogram,
    "entropy": Entropy,
}


def calibration_named(who: str, observer: Calibration | str | None) -> Calibration | None:
    """The part for its name; a part and None are returned unchanged.

    Raises:
        TypeError: observer is not one of these; the message starts with ``who``.
        ValueError: observer is a string that is no name.

    Example:
        >>> calibration_named("config", "percentile")
        Percentile(percentile=99.99, bins=2048)
    """
    if observer is None or isinstance(observer, Calibration):
        return observer
    names = ", ".join(map(repr, _NAMES))
    if isinstance(observer, str):
        if observer not in _NAMES:
            raise ValueError(f"{who}: observer must be one of {names}, got {observer!r}")
        return _NAMES[observer]()
    hint = "; call it to make a part" if isinstance(observer, type) else ""
    raise TypeError(
        f"{who}: observer must be None, one of {names}, or a part such as Percentile(99.9), got "
        f"{observer!r}{hint}"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_bins(who: str, bins: object) -> None:
    if isinstance(bins, bool) or not isinstance(bins, int) or not 2 <= bins <= MOST_BINS:
        raise ValueError(f"{who}: bins must be an integer from 2 to {MOST_BINS}, got {bins!r}")
