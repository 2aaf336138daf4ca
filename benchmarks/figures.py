"""Figures of a linear benchmark: where ours is ahead, and how throughput grows with the rows."""

from __future__ import annotations

import math
from pathlib import Path

from peers import OURS
from results import ShapeResult

OURS_COLOUR, PEER_COLOUR, GREY = "#0b5fa5", "#d1495b", "#8a8a8a"


def save_linear_figure(
    path: Path, results: list[ShapeResult], title: str, peak_gops: float | None
) -> None:
    """A map of the ratios (layers by rows) above one throughput panel per layer.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = list(dict.fromkeys(result.shape.layer for result in results))
    columns = min(4, len(layers))
    panel_rows = math.ceil(len(layers) / columns)
    map_height = 0.9 + 0.32 * len(layers)
    figure = plt.figure(figsize=(13, map_height + 2.6 * panel_rows), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    grid = figure.add_gridspec(2, 1, height_ratios=(map_height, 2.6 * panel_rows))
    upper, lower = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _ratio_map(upper.add_subplot(), results, layers)
    panels = lower.subplots(panel_rows, columns, sharex=True, squeeze=False).flatten()
    for axes, layer in zip(panels, layers, strict=False):
        _throughput(axes, [result for result in results if result.shape.layer == layer], peak_gops)
        axes.set_title(f"N x K = {layer}", fontsize=9)
    for axes in panels[len(layers) :]:
        axes.set_axis_off()
    for axes in panels[len(layers) - columns : len(layers)]:
        axes.tick_params(axis="x", labelbottom=True)  # also where the panel below is empty
    lower.supxlabel("rows M", fontsize=9)
    lower.supylabel("GOPS", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    lower.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _ratio_map(axes, results: list[ShapeResult], layers: list[str]) -> None:  # type: ignore[no-untyped-def]
    """A cell per shape, coloured by log2 of the ratio.

    Twice as fast and half as fast are then equally strong.
    """
    many_rows = sorted({result.shape.m for result in results})
    cells = [[math.nan] * len(many_rows) for _ in layers]
    for result in results:
        row, column = layers.index(result.shape.layer), many_rows.index(result.shape.m)
        ratio = result.ratio()
        if ratio is not None:
            cells[row][column] = math.log2(ratio)
            text = f"{ratio:.2f}  {result.best_peer()}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.imshow(cells, cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
    axes.set_xticks(range(len(many_rows)), [f"M = {m}" for m in many_rows], fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.tick_params(length=0)
    axes.set_ylabel("N x K", fontsize=9)
    axes.set_title(
        "best peer's time / ours, and who that is (blue: ours is faster)", fontsize=9, loc="left"
    )


def _throughput(axes, results: list[ShapeResult], peak_gops: float | None) -> None:  # type: ignore[no-untyped-def]
    peers = sorted({name for result in results for name in result.blocks} - {OURS})
    for index, peer in enumerate(peers):
        points = [(result.shape.m, result.gops(peer)) for result in results if result.gops(peer)]
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
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
