"""Figures of a linear benchmark: roofline, ratios, and throughput over rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torchquant.bench.peers import OURS
from torchquant.bench.results import Run, ShapeResult

OURS_COLOUR, PEER_COLOUR, GREY = "#0b5fa5", "#d1495b", "#8a8a8a"
ROOFS_DRAWN = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "fp32_fma_512", "fp32_fma_256")


def save_linear_figure(path: Path, run: Run) -> None:
    """Roofline and ratios at the top, then a map of the ratios and one throughput panel per layer.

    Layers with only one number of rows (the random ones) are in the upper two panels only.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = _layers_with_many_rows(run.results)
    columns = max(1, min(4, len(layers)))
    panel_rows = math.ceil(len(layers) / columns)
    heights = [5.2] + ([0.9 + 0.32 * len(layers), 2.6 * panel_rows] if layers else [])
    figure = plt.figure(figsize=(13, sum(heights)), layout="constrained")
    figure.suptitle(run.title, fontsize=11, x=0.01, ha="left")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    left, right = figure.add_subfigure(grid[0]).subplots(1, 2)
    _roofline(left, run)
    _ratios(right, run.results)
    if layers:
        _ratio_map(figure.add_subfigure(grid[1]).add_subplot(), run.results, layers)
        panels = figure.add_subfigure(grid[2])
        _throughput_panels(panels, run, layers, panel_rows, columns)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _layers_with_many_rows(results: list[ShapeResult]) -> list[str]:
    rows: dict[str, set[int]] = {}
    for result in results:
        rows.setdefault(result.shape.layer, set()).add(result.shape.m)
    return [layer for layer, found in rows.items() if len(found) > 1]


def _roofline(axes: Any, run: Run) -> None:
    """Operations per byte against 10^12 operations per second, under the measured roofs.

    The bytes are the int8 weights, fp32 activations and result, each once. A slanted roof is a read
    bandwidth: points above the lowest one have weights that a nearer cache holds.
    """
    roofline = run.roofline
    shapes = [result.shape for result in run.results]
    intensities = [shape.operations / shape.traffic_bytes for shape in shapes]
    low, high = min(intensities) / 2, max(intensities) * 2
    top = max(roofline.gops.values(), default=1.0) / 1e3
    for size in sorted({min(roofline.read), max(roofline.read)} if roofline.read else ()):
        bandwidth = roofline.read[size]
        ridge = min(high, 1e3 * top / bandwidth)
        axes.plot([low, ridge], [low * bandwidth / 1e3, ridge * bandwidth / 1e3], "k:", lw=0.8)
        label = f"{bandwidth:.0f} GB/s ({size:.3g} MiB)"
        axes.text(low * 1.1, low * bandwidth / 1e3 * 1.25, label, fontsize=7, rotation=33)
    for name in ROOFS_DRAWN:
        if name in roofline.gops:
            level = roofline.gops[name] / 1e3
            axes.axhline(level, color="black", lw=1.2 if name == run.isa else 0.5)
            axes.text(high, level * 1.03, name, fontsize=7, ha="right")
    for index, (result, intensity) in enumerate(zip(run.results, intensities, strict=True)):
        best = result.best_peer()
        points = [(result.gops(best) if best else None, PEER_COLOUR, "best peer", "x")]
        points.append((result.gops(), OURS_COLOUR, OURS, "o"))
        for gops, colour, label, marker in points:
            if gops:
                axes.scatter(
                    intensity,
                    gops / 1e3,
                    s=14,
                    color=colour,
                    marker=marker,
                    linewidths=0.8,
                    label=None if index else label,
                    zorder=3,
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("operations per byte (weights, activations, result, once each)", fontsize=9)
    axes.set_ylabel("10¹² operations per second", fontsize=9)
    axes.set_title("roofline: measured limits of this machine, this run", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    plain(axes)


def _ratios(axes: Any, results: list[ShapeResult]) -> None:
    """Every shape's ratio over its operations; random shapes have another marker."""
    often = set(_layers_with_many_rows(results))
    for named, colour, label in ((True, OURS_COLOUR, "named layers"), (False, GREY, "others")):
        points = [
            (result.shape.operations, ratio)
            for result in results
            if (ratio := result.ratio()) and (result.shape.layer in often) is named
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, label=label)
            axes.legend(fontsize=8, frameon=False)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xlabel("operations of a call", fontsize=9)
    axes.set_title("best peer's time / ours", fontsize=9, loc="left")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    plain(axes)


def _ratio_map(axes: Any, results: list[ShapeResult], layers: list[str]) -> None:
    """A cell per shape, coloured by log2 of the ratio.

    Twice as fast and half as fast then have equally strong colours.
    """
    shown = [result for result in results if result.shape.layer in layers]
    many_rows = sorted({result.shape.m for result in shown})
    cells = [[math.nan] * len(many_rows) for _ in layers]
    for result in shown:
        row, column = layers.index(result.shape.layer), many_rows.index(result.shape.m)
        ratio = result.ratio()
        if ratio is not None:
            cells[row][column] = math.log2(ratio)
            text = f"{ratio:.2f}  {result.best_peer()}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7)
    axes.imshow(cells, cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
    axes.set_xticks(range(len(many_rows)), [f"M = {m}" for m in many_rows], fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.tick_params(length=0)
    axes.set_ylabel("N x K", fontsize=9)
    axes.set_title(
        "best peer's time / ours, and who that is (blue: ours is faster)", fontsize=9, loc="left"
    )


def _throughput_panels(figure: Any, run: Run, layers: list[str], rows: int, columns: int) -> None:
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for axes, layer in zip(panels, layers, strict=False):
        here = [result for result in run.results if result.shape.layer == layer]
        _throughput(axes, here, run.peak_gops)
        axes.set_title(f"N x K = {layer}", fontsize=9)
    for axes in panels[len(layers) :]:
        axes.set_axis_off()
    for axes in panels[len(layers) - columns : len(layers)]:
        axes.tick_params(axis="x", labelbottom=True)  # also if the panel below is empty
    figure.supxlabel("rows M", fontsize=9)
    figure.supylabel("GOPS", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=9, frameon=False)


def _throughput(axes: Any, results: list[ShapeResult], peak_gops: float | None) -> None:
    uncompared = {name for result in results for name in result.uncompared}
    peers = sorted({name for result in results for name in result.blocks} - {OURS} - uncompared)
    for index, peer in enumerate(peers):
        points = [(result.shape.m, gops) for result in results if (gops := result.gops(peer))]
        axes.plot(
            *zip(*points, strict=True),
            color=GREY,
            linewidth=0.7,
            alpha=0.6,
            label="other peers" if not index else None,
        )
    best = [(r.shape.m, r.gops(name)) for r in results if (name := r.best_peer()) is not None]
    if best:
        axes.plot(
            *zip(*best, strict=True), color=PEER_COLOUR, marker="o", markersize=3, label="best peer"
        )
    ours = [(result.shape.m, result.gops()) for result in results if result.gops()]
    if ours:
        axes.plot(*zip(*ours, strict=True), color=OURS_COLOUR, marker="o", markersize=3, label=OURS)
    if peak_gops:
        axes.axhline(peak_gops, color="black", linestyle=":", linewidth=0.8, label="measured peak")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(
        [result.shape.m for result in results],
        [str(result.shape.m) for result in results],
        fontsize=7,
    )
    axes.tick_params(axis="y", labelsize=7)
    axes.minorticks_off()
    plain(axes)


def plain(axes: Any) -> None:
    """A light grid, and no frame at the top and on the right."""
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
