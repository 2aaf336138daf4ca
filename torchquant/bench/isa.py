"""The prequantized product on every instruction set, against that instruction set's own peak.

The AVX2 path is compared with FBGEMM, in a process where FBGEMM_ENABLE_INSTRUCTIONS excludes its
wider kernels; the scalar path is compared with a plain triple loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from torchquant import cpu
from torchquant._extension import load
from torchquant.bench import machine
from torchquant.bench.linear import Options
from torchquant.bench.peers import OURS
from torchquant.bench.results import ShapeResult
from torchquant.bench.roofline import Roofline, measure_roofline
from torchquant.bench.shapes import LinearShape
from torchquant.bench.side_by_side import Bench, Entry, Pace, Progress

FBGEMM_AVX2 = "fbgemm, AVX2"
LARGE = ((1024, 1024, 1024), (1024, 4096, 4096), (1024, 3072, 768))  # M, N, K
FEW = tuple((m, 4096, 4096) for m in (1, 2, 4, 8, 16))
NAIVE_SHAPE = (16, 1024, 1024)
SMOKE = ((4, 100, 100),)


def isa_shapes() -> list[LinearShape]:
    """Large products, and few rows on 16 MiB of weights; layer by layer."""
    return sorted(LinearShape(n=n, k=k, m=m) for m, n, k in LARGE + FEW)


def entries() -> dict[str, Entry]:
    """A process per instruction set that this CPU has, and FBGEMM's AVX2 kernels."""
    chosen = {
        name: Entry("prequantized", OURS, {"TORCHQUANT_ISA": name}) for name in cpu.available_isas()
    }
    if "avx2" in chosen:
        environment = {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
        chosen[FBGEMM_AVX2] = Entry("prequantized", "ao-fbgemm", environment)
    return chosen


def run_isa(options: Options, console: Console, on_step: Progress) -> list[dict[str, Any]]:
    """A record per number of threads: limits, seconds by shape and instruction set, fractions."""
    shapes = [LinearShape(n=n, k=k, m=m) for m, n, k in SMOKE] if options.smoke else isa_shapes()
    total, done = len(shapes) * len(options.threads), 0
    pace, records = Pace(options.minutes, total), []
    for threads in options.threads:

        def on_shape(shape: LinearShape, threads: int = threads) -> None:
            nonlocal done
            on_step(f"{shape}, threads: {threads}", done / total)
            done += 1

        records.append(_run_threads(options, shapes, threads, pace, console, on_shape))
    return records


def _run_threads(
    options: Options,
    shapes: list[LinearShape],
    threads: int,
    pace: Pace,
    console: Console,
    on_shape: Callable[[LinearShape], None],
) -> dict[str, Any]:
    start, facts = time.monotonic(), machine.describe()
    machine.warn_if_busy(console, machine.busy_neighbours())
    seconds = 0.01 if options.smoke else 0.2
    sizes = [shape.weight_bytes for shape in shapes]
    before = measure_roofline(threads, sizes, seconds)
    bench: Bench[LinearShape] = Bench(
        entries(), threads, options, console, pace, all_to_the_end=True
    )
    try:
        bench.start()
        bench.run(shapes, on_shape)
    finally:
        bench.close()
    after = measure_roofline(threads, sizes, seconds)
    roofline = before.best_of(after)
    naive = {
        name: _naive_gops(vectorised)
        for name, vectorised in (("as written", False), ("vectorised by the compiler", True))
    }
    return {
        "kind": "isa",
        **facts,
        "threads": threads,
        "roofline_before": before.to_dict(),
        "roofline_after": after.to_dict(),
        "naive_gops": {name: round(value, 2) for name, value in naive.items()},
        "shapes": [_record(result, roofline) for result in bench.results],
        "answers": answers(bench.results, roofline, naive, threads),
        "seconds": round(time.monotonic() - start, 1),
    }


def _naive_gops(vectorised: bool) -> float:
    m, n, k = NAIVE_SHAPE
    shortest = min(load().naive_product_seconds(m, n, k, vectorised) for _ in range(5))
    return float(2 * m * n * k / shortest / 1e9)


def _record(result: ShapeResult, roofline: Roofline) -> dict[str, Any]:
    shape, found = result.shape, {}
    for name in result.blocks:
        gops = result.gops(name)
        limit = roofline.limit(shape.operations, shape.weight_bytes, name)
        seconds = result.seconds(name)
        found[name] = {
            "gops": round(gops or 0, 1),
            "us": round(1e6 * (seconds or 0), 2),
            "of_limit": round(limit.seconds / seconds, 3) if limit and seconds else None,
            "bound_by": limit.bound_by if limit else None,
        }
    return {"m": shape.m, "n": shape.n, "k": shape.k, "isas": found, "failures": result.failures}


def answers(
    results: list[ShapeResult], roofline: Roofline, naive: dict[str, float], threads: int
) -> dict[str, float]:
    """For each path the ratios that it is judged by: minima over the large shapes."""
    large = [result for result in results if result.shape.m > 16] or results
    peaks = roofline.gops
    found: dict[str, float] = {}

    def least(words: str, value: Callable[[ShapeResult], float | None]) -> None:
        values = [value(result) for result in large]
        if values and all(values):
            found[words] = round(min(v for v in values if v), 3)

    for name in ("amx_int8", "avx512_vnni", "avx_vnni", "avx2"):
        if name in peaks:
            least(f"{name} over its own peak", partial(_share, name, peaks[name]))
    if fma := peaks.get("fp32_fma_256"):
        least("avx2 over the 256-bit fp32 FMA peak", partial(_share, "avx2", fma))
        if "avx2" in peaks:
            found["avx2's own peak over the 256-bit fp32 FMA peak"] = round(peaks["avx2"] / fma, 3)
    least("avx2 over FBGEMM's AVX2", lambda r: _over(r.gops("avx2"), r.gops(FBGEMM_AVX2)))
    for name, gops in naive.items():
        words = f"scalar, per thread, over the triple loop {name}"
        least(words, partial(_share, "scalar", gops * threads))
    return found


def _share(name: str, peak: float, result: ShapeResult) -> float | None:
    return _over(result.gops(name), peak)


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def isa_table(record: dict[str, Any]) -> Table:
    """GOPS and the fraction of the limit, one column per instruction set."""
    names = list(dict.fromkeys(name for shape in record["shapes"] for name in shape["isas"]))
    peaks = {
        name: max(
            record[when]["gops"].get(name, 0) for when in ("roofline_before", "roofline_after")
        )
        for name in names
    }
    table = Table(
        title=f"prequantized product, threads: {record['threads']}, {record['cpu']}: GOPS and "
        "fraction of the limit (a: arithmetic, b: bandwidth)",
        title_justify="left",
    )
    table.add_column("M x N x K", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for shape in record["shapes"]:
        cells = []
        for name in names:
            found = shape["isas"].get(name)
            share = found and found["of_limit"]
            text = f"{found['gops']:.0f}" if found else "-"
            cells.append(f"{text}  {share:.0%} {found['bound_by'][0]}" if found and share else text)
        table.add_row(f"{shape['m']}x{shape['n']}x{shape['k']}", *cells)
    table.add_section()
    table.add_row("peak", *(f"{peaks[name]:.0f}" if peaks[name] else "-" for name in names))
    return table
