"""A figure of the low-bit benchmark: the time of every format, and every library's time over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchquant.bench.figures import GREY, OURS_COLOUR, PEER_COLOUR, plain
from torchquant.bench.lowbit_results import OTHERS, LowbitRun, time_over_ours
from torchquant.bench.peers import OURS

COLOURS = (PEER_COLOUR, "#e09f3e", "#5aa9a3", OURS_COLOUR, GREY, "black")


def save_lowbit_figure(path: Path, run: LowbitRun) -> None:
    """Times over each other on the left, GB/s and their limit on the right; a line per case.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.6 + 0.2 * len(run.results)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, height), layout="constrained", sharey=True
    )
    figure.suptitle(run.title, fontsize=11, x=0.01, ha="left")
    _ratios(left, run)
    _bandwidth(right, run)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _ratios(axes: Any, run: LowbitRun) -> None:
    ran = [(name, peer) for name, peer in OTHERS.items() if peer in run.columns()]
    for (name, peer), colour in zip(ran, COLOURS, strict=False):
        points = [
            (ratio, index)
            for index, result in enumerate(run.results)
            if (ratio := time_over_ours(result, peer))
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=16, color=colour, label=name)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(run.results)), [str(r.shape) for r in run.results], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(f"time over that of {OURS}", fontsize=9, loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    plain(axes)


def _bandwidth(axes: Any, run: LowbitRun) -> None:
    found = [(index, r, gb) for index, r in enumerate(run.results) if (gb := run.gigabytes(r))]
    axes.barh([i for i, _, _ in found], [gb for _, _, gb in found], color=OURS_COLOUR, height=0.6)
    limits = [(run.roofline.bandwidth(r.shape.cycle_bytes), i) for i, r, _ in found]
    known = [(limit, index) for limit, index in limits if limit]
    if known:
        axes.scatter(*zip(*known, strict=True), marker="|", s=60, color="black")
    axes.set_title(
        "GB/s of weights and scales (line: measured read bandwidth)", fontsize=9, loc="left"
    )
    plain(axes)
