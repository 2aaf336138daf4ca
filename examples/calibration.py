"""Four ways to choose the range of static activations, with and without outliers.

    pip install "torchquant[examples]"
    python examples/calibration.py                     # under a minute
    python examples/calibration.py --bits 4 --figure calibration.png
    python examples/calibration.py --smoke             # tiny sizes: only shows that it works

Values are observed batch by batch and then quantized with the range that each observer chose:
min-max (the observed range), percentile 99.99, entropy (least divergence) and MSE (least squared
error). The first table compares three kinds of activations, as they are and with one value in
20,000 replaced by an outlier. The error counts the values that are not outliers, as signal to noise
in decibels: 6 dB are one bit. The second table does the same with a transformer that reads
handwritten digits: calibrated with its training images, and with images of which some have a broken
pixel; the test images are intact.

What it shows: without outliers, min-max is good enough, and clipping costs little. With outliers,
min-max gives most of its integers to them; the histogram observers do not. MSE weighs an outlier by
its squared error, so it clips large ones less than percentile and entropy do. At 4 bits clipping
pays even without outliers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import torchquant
from torchquant.configs import Static
from torchquant.models import load_digits_data, load_digits_model
from torchquant.observers import observer_for

METHODS = {
    "min-max": "minmax",
    "percentile": "percentile",
    "entropy": "entropy",
    "MSE": "histogram",
}
COLOURS = {"min-max": "#6c757d", "percentile": "#0b5fa5", "entropy": "#2a9d4e", "MSE": "#d1495b"}
OUTLIER = 40.0  # times the standard deviation
RARE = 20_000  # one value in so many becomes an outlier
KINDS = {
    "normal (before a linear layer)": lambda x: x,
    "ReLU": torch.relu,
    "GELU": F.gelu,
}


class Case(NamedTuple):
    """One kind of activations, and which of its values are outliers."""

    name: str
    values: Tensor
    planted: Tensor
    outliers: bool


class Result(NamedTuple):
    """The range that a method chose, and the signal to noise of the values in dB."""

    low: float
    high: float
    decibels: float


def cases(count: int) -> list[Case]:
    """Each kind of activations, without and with outliers."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, function in KINDS.items():
        values = function(torch.randn(count, generator=generator))
        planted = torch.zeros(count, dtype=torch.bool)
        found.append(Case(name, values, planted, False))
        planted = torch.rand(count, generator=generator) < 1 / RARE
        planted[0] = True
        sizes = OUTLIER * (0.5 + torch.rand(count, generator=generator) / 2)
        found.append(Case(name, torch.where(planted, sizes, values), planted, True))
    return found


def quantized(case: Case, method: str, bits: int, batches: int) -> Result:
    """Observe the values in batches, quantize them, and measure the error."""
    part = torchquant.Int8StaticActivationInt8WeightConfig(observer=METHODS[method])
    activations: Any = part.activations.with_bits(bits)
    assert isinstance(activations, Static)
    observer = observer_for(activations)
    for batch in case.values.chunk(batches):
        observer(batch)
    scale, zero_point = observer.calculate_qparams()
    low, high = (float(end) for end in observer.calculate_range())
    rounded = torchquant.ops.fake_quantize(
        case.values, scale, zero_point, qmin=observer.qmin, qmax=observer.qmax
    )
    ordinary = case.values[~case.planted]
    return Result(low, high, decibels(ordinary, rounded[~case.planted] - ordinary))


def tensors(bits: int, count: int, batches: int) -> list[tuple[Case, dict[str, Result]]]:
    """Every case with every method."""
    return [
        (case, {method: quantized(case, method, bits, batches) for method in METHODS})
        for case in cases(count)
    ]


def show_tensors(
    console: Console, found: Sequence[tuple[Case, dict[str, Result]]], bits: int
) -> None:
    """The first table; the best signal to noise of each line is bold."""
    table = Table(
        title=f"{bits} bits: chosen range, and signal to noise of the other values in dB",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for heading in ("activations", "outliers", *METHODS):
        table.add_column(heading, justify="right" if heading in METHODS else "left")
    for case, results in found:
        best = max(result.decibels for result in results.values())
        cells = [
            f"[{'bold' if r.decibels == best else 'none'}]{r.decibels:.1f}[/] "
            f"({r.low:.1f} to {r.high:.1f})"
            for r in results.values()
        ]
        table.add_row(case.name, f"1 in {RARE:,}" if case.outliers else "none", *cells)
    console.print(table)


def network(bits: int, images: int) -> list[list[str]]:
    """Errors of the transformer after each calibration, as lines of the second table."""
    data = load_digits_data()
    clean = data.train_images[:images]
    broken = clean.clone()
    broken[::16, 3, 3] = OUTLIER
    with torch.no_grad():
        expected = load_digits_model().eval()(data.test_images)
    lines = []
    for method, name in METHODS.items():
        config = torchquant.IntxActivationIntxWeightConfig(8, bits, static=True, observer=name)
        cells = []
        for calibration in (clean, broken):
            model = load_digits_model().eval()
            torchquant.prepare_(model, config, strict=False)
            torchquant.calibrate(model, calibration.split(64), progress=False)
            torchquant.convert_(model)
            with torch.no_grad():
                output = model(data.test_images)
            right = (output.argmax(-1) == data.test_labels).double().mean()
            cells.append(f"{decibels(expected, output - expected):.1f} ({right:.1%})")
        lines.append([method, *cells])
    return lines


def decibels(signal: Tensor, noise: Tensor) -> float:
    """Signal to noise."""
    powers = (float(x.double().square().mean()) for x in (signal, noise))
    return 10 * math.log10(next(powers) / next(powers))


def show_network(console: Console, lines: list[list[str]], bits: int) -> None:
    """The second table."""
    table = Table(
        title=f"Digits, {bits} bits: signal to noise of the logits in dB (test accuracy)",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for heading in ("calibrated by", "intact images", "1 in 16 images with a broken pixel"):
        table.add_column(heading, justify="left" if heading == "calibrated by" else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def save_figure(path: Path, found: Sequence[tuple[Case, dict[str, Result]]], bits: int) -> None:
    """Draw each distribution with the chosen ranges, and the signal to noise below it.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        4, len(KINDS), figsize=(13, 13), layout="constrained", height_ratios=(3, 2, 3, 2)
    )
    figure.suptitle(
        f"Ranges for {bits} bits: values per bin (logarithmic), and signal to noise", fontsize=13
    )
    most = max(result.decibels for _, results in found for result in results.values())
    for place, (case, results) in enumerate(found):
        row, column = 2 * (place % 2), place // 2
        top, bottom = axes[row][column], axes[row + 1][column]
        top.hist(case.values.numpy(), bins=200, log=True, color="#c9ced6")
        for style, (method, result) in zip(("-", "--", "-.", ":"), results.items(), strict=True):
            for end, label in ((result.high, method), (result.low, None)):
                top.axvline(end, color=COLOURS[method], linestyle=style, lw=1.8, label=label)
        with_outliers = "with outliers" if case.outliers else "without outliers"
        top.set_title(f"{case.name.partition(' (')[0]}, {with_outliers}", fontsize=11)
        top.set_xlabel("value", fontsize=10)
        bars = bottom.bar(
            list(results),
            [result.decibels for result in results.values()],
            color=[COLOURS[method] for method in results],
        )
        bottom.bar_label(bars, fmt="%.1f", fontsize=10, padding=2)
        bottom.set_ylim(min(0.0, *(r.decibels for r in results.values())), most * 1.15)
        bottom.tick_params(axis="x", labelsize=10)
        for part in (top, bottom):
            part.grid(alpha=0.25)
            part.set_axisbelow(True)
            part.spines[["top", "right"]].set_visible(False)
        if column == 0:
            top.set_ylabel("values per bin", fontsize=10)
            bottom.set_ylabel("signal to noise in dB", fontsize=10)
    axes[0][0].legend(fontsize=10, loc="lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], choices=range(2, 9))
    parser.add_argument("--values", type=int, default=1_000_000, help="values of each kind")
    parser.add_argument("--batches", type=int, default=8, help="number of batches")
    parser.add_argument("--figure", type=Path, default=Path("calibration.png"))
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    options = parser.parse_args(arguments)
    if min(options.values, options.batches) < 1:
        parser.error("--values and --batches must be at least 1")
    if options.smoke:
        options.values, options.batches, options.bits = 20_000, 2, options.bits[:1]
    console = Console()
    for place, bits in enumerate(options.bits):
        found = tensors(bits, options.values, options.batches)
        show_tensors(console, found, bits)
        show_network(console, network(bits, 128 if options.smoke else 1024), bits)
        if place == 0:
            try:
                save_figure(options.figure, found, bits)
                console.print(f"figure: {options.figure}", highlight=False)
            except ImportError:
                console.print("no figure: matplotlib is not installed; pip install matplotlib")


if __name__ == "__main__":
    main()
