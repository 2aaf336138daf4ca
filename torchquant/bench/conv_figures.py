"""Figures of the benchmarks of convolutions and of whole networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torchquant.bench.conv_results import LIBRARIES, CnnRun, ConvResult, ConvRun, library_ratio
from torchquant.bench.conv_shapes import FAMILIES
from torchquant.bench.figures import GREY, OURS_COLOUR, PEER_COLOUR, plain
from torchquant.bench.peers import OURS

FAMILY_COLOURS = ("#e09f3e", "#0b5fa5", "#5aa9a3", "#d1495b", "#8a8a8a")
COMPARED = ("oneDNN", "FBGEMM")  # in the figure: the libraries that torch itself calls


def save_figure(path: Path, run: ConvRun | CnnRun) -> None:
    """Write the figure of a run.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = _networks(plt, run) if isinstance(run, CnnRun) else _layers(plt, run)
    figure.suptitle(run.title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _layers(plt: Any, run: ConvRun) -> Any:
    """Ratios and fractions of the peak at the top, the curves below."""
    curves = [(name, results) for name, results in run.curves.items() if results]
    rows = 2 if curves else 1
    figure, panels = plt.subplots(
        rows, 3, figsize=(14, 4.4 * rows), layout="constrained", squeeze=False
    )
    for axes, library in zip(panels[0], COMPARED, strict=False):
        _points(axes, run, partial(library_ratio, names=LIBRARIES[library]))
        axes.axhline(1, color="black", lw=0.8)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"{library}'s time / ours", fontsize=9, loc="left")
    peak = run.peak_gops
    _points(panels[0][2], run, lambda r: 100 * gops / peak if peak and (gops := r.gops()) else None)
    panels[0][2].set_title("% of the measured peak", fontsize=9, loc="left")
    for axes, (name, results) in zip(panels[1] if curves else (), curves, strict=False):
        _curve(axes, name, results)
    for axes in panels[1][len(curves) :] if curves else ():
        axes.set_axis_off()
    return figure


def _points(axes: Any, run: ConvRun, value: Callable[[ConvResult], float | None]) -> None:
    """A figure for each shape over its operations, coloured by family."""
    for family, colour in zip(FAMILIES, FAMILY_COLOURS, strict=True):
        points = [
            (r.shape.operations, found)
            for r in run.results
            if r.shape.family == family and (found := value(r))
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, label=family)
    axes.set_xscale("log")
    axes.set_xlabel("operations of a call", fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    plain(axes)


def _curve(axes: Any, name: str, results: list[ConvResult]) -> None:
    """Time over pixels or images, both logarithmic: a line of slope 1 is linear growth."""
    peers = list(dict.fromkeys(peer for r in results for peer in r.blocks))
    for peer in peers:
        points = [(r.shape.out_pixels, 1e6 * s) for r in results if (s := r.seconds(peer))]
        colour = OURS_COLOUR if peer == OURS else PEER_COLOUR if peer == "onednn" else GREY
        width = 1.6 if colour != GREY else 0.7
        label = peer if colour != GREY else None
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            lw=width,
            marker="o",
            markersize=2.5,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("pixels of the result", fontsize=9)
    shape = results[0].shape
    axes.set_title(
        f"microseconds over {name}: {shape.channels} to {shape.outputs} channels, "
        f"{shape.kernel} x {shape.kernel} (grey: other peers)",
        fontsize=9,
        loc="left",
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    plain(axes)


def _networks(plt: Any, run: CnnRun) -> Any:
    """A panel per network and batch: milliseconds of every peer, and their memory."""
    columns = min(4, max(1, len(run.results)))
    rows = -(-len(run.results) // columns) or 1
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    names = run.columns()
    for axes, result in zip(panels.flatten(), run.results, strict=False):
        shown = [name for name in names if result.seconds(name)]
        times = [1e3 * (result.seconds(name) or 0.0) for name in shown]
        colours = [OURS_COLOUR if name == OURS else GREY for name in shown]
        best = result.best_peer()
        if best in shown:
            colours[shown.index(best)] = PEER_COLOUR
        axes.barh(range(len(shown)), times, color=colours)
        axes.set_yticks(range(len(shown)), shown, fontsize=7)
        axes.invert_yaxis()
        for index, (name, value) in enumerate(zip(shown, times, strict=True)):
            memory = result.megabytes.get(name)
            text = f" {value:.3g}" + ("" if memory is None else f" ({memory:.0f} MB)")
            axes.text(value, index, text, va="center", fontsize=7)
        axes.set_xlim(0, 1.45 * max(times, default=1.0))
        axes.set_title(f"{result.shape}: ms", fontsize=9, loc="left")
        plain(axes)
    for axes in panels.flatten()[len(run.results) :]:
        axes.set_axis_off()
    return figure
