"""The benchmarks' arithmetic and processes. Whole commands run in `test_docs.py` (`--smoke`)."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("shapes", "timing", "results", "peers", "peak", "machine", "workers")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules, importable by their short names for one test."""
    import importlib
    from types import SimpleNamespace

    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    yield modules
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_shapes_are_those_of_the_readme_and_come_layer_by_layer(bench: Any) -> None:
    shapes = bench.shapes.linear_shapes()
    assert {shape.m for shape in shapes} == {1, 4, 16, 64, 128, 256, 1024}
    assert {(11008, 4096), (384, 1536), (129, 257)} <= {(shape.n, shape.k) for shape in shapes}
    layers = [shape.layer for shape in shapes]
    assert sum(a != b for a, b in pairwise(layers)) == len(set(layers)) - 1


def test_shape_patterns_select_and_an_unknown_one_is_refused(bench: Any) -> None:
    shapes = bench.shapes.linear_shapes()
    selected = bench.shapes.select(shapes, ["1x*", "*x768x768"])
    assert {str(shape) for shape in selected} >= {"1x384x384", "1024x768x768"}
    assert all(shape.m == 1 or shape.layer == "768x768" for shape in selected)
    with pytest.raises(ValueError, match=r"--shapes: '2x\*' matches no MxNxK .* try '1x\*'"):
        bench.shapes.select(shapes, ["2x*"])


def test_geometric_mean_lets_double_and_half_cancel(bench: Any) -> None:
    assert bench.timing.geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert bench.timing.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(bench.timing.geometric_mean([]))


def test_seconds_per_call_is_per_call_even_in_batches(bench: Any) -> None:
    import time

    assert bench.timing.seconds_per_call(lambda: None, 0.002) < 5e-6
    assert bench.timing.seconds_per_call(lambda: time.sleep(0.002), 0.01) >= 0.002


def _result(bench: Any, m: int, **microseconds: list[float]) -> Any:
    result = bench.results.ShapeResult(bench.shapes.LinearShape(n=100, k=50, m=m))
    for peer, blocks in microseconds.items():
        for value in blocks:
            result.add(peer, {"module": value * 1e-6})
    return result


def test_a_result_compares_ours_with_the_best_way_of_the_best_peer(bench: Any) -> None:
    result = _result(bench, 4, torchquant=[9, 10, 90], fp32=[40, 40, 40])
    for value in (30e-6, 20e-6, 25e-6):
        result.add("onnxruntime", {"run": value, "io_binding": value / 2})
    assert result.best_peer() == "onnxruntime"
    assert result.variant("onnxruntime") == "io_binding"
    assert result.ratio() == pytest.approx(1.25)
    assert result.gops() == pytest.approx(2 * 4 * 100 * 50 / 10e-6 / 1e9)
    record = json.loads(json.dumps(result.record()))
    assert record["us"] == {"torchquant": 10, "fp32": 40, "onnxruntime": 12.5}
    assert record["variant"] == {"onnxruntime": "io_binding"}


def test_the_summary_separates_few_rows_from_many_and_names_the_lowest(bench: Any) -> None:
    results = [
        _result(bench, 1, torchquant=[10], fp32=[40]),
        _result(bench, 64, torchquant=[10], fp32=[9], bf16=[30]),
        _result(bench, 128, torchquant=[10]),
    ]
    summary = bench.results.summarise(results)
    assert summary["geometric_mean_few_rows"] == 4.0
    assert summary["geometric_mean_many_rows"] == 0.9
    assert (summary["lowest"], summary["lowest_shape"]) == (0.9, "64x100x50")
    assert summary["slower_than_best_peer"] == 1
    assert summary["best_peer_counts"] == {"fp32": 2}
    assert "lowest: 0.90x at 64x100x50" in "\n".join(bench.results.summary_lines(summary))


def test_without_ours_there_is_a_table_but_no_ratio(bench: Any) -> None:
    results = [_result(bench, 1, fp32=[40])]
    assert "no ratio" in bench.results.summary_lines(bench.results.summarise(results))[0]
    heading, row = bench.results.rows(results, None)
    assert dict(zip(heading, row, strict=True))["fp32"] == "40.0"


def test_the_limit_is_the_longer_of_arithmetic_and_memory(bench: Any) -> None:
    peaks = bench.peak.Peaks(gops={"avx2": 100.0}, read={1.0: 50.0, 16.0: 10.0})
    assert peaks.seconds(10**9, 1 << 20, "avx2") == pytest.approx(0.01)
    assert peaks.seconds(1, 16 << 20, "avx2") == pytest.approx((16 << 20) / 10e9)
    assert peaks.seconds(1, 1, "scalar") is None
    again = bench.peak.Peaks(gops={"avx2": 90.0}, read={1.0: 60.0, 16.0: 10.0})
    assert peaks.best_of(again) == bench.peak.Peaks({"avx2": 100.0}, {1.0: 60.0, 16.0: 10.0})
    assert peaks.best_of(None) == peaks


def test_the_header_cuts_absolute_paths_from_the_command(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["benchmarks/bench_linear.py", "--figure", "/home/me/a.png", "--output=/x/b"]
    )
    assert bench.machine.command_line() == (
        "python benchmarks/bench_linear.py --figure a.png --output=b"
    )


def test_a_worker_measures_and_reports_failure_in_its_peers_words(bench: Any) -> None:
    worker = bench.workers.Worker("fp32", 1)
    try:
        worker.ask(do="load", n=8, k=4)
        answer = worker.ask(do="input", m=2)
        assert answer["error"] < 1e-6
        assert worker.ask(do="block", seconds=0.001)["seconds"]["module"] > 0
        assert worker.wait_until_asleep(timeout=10)
        with pytest.raises(bench.workers.WorkerError, match=r"AttributeError: .*'nothing'"):
            worker.ask(do="nothing")
    finally:
        worker.close()


def test_a_peer_that_cannot_be_made_or_that_dies_says_so(bench: Any) -> None:
    worker = bench.workers.Worker("no-such-peer", 1)
    try:
        with pytest.raises(bench.workers.WorkerError, match=r"KeyError: 'no-such-peer'"):
            worker.ask(do="about")
        worker._process.kill()
        with pytest.raises(bench.workers.WorkerError, match=r"process ended with status -9"):
            worker.ask(do="about")
    finally:
        worker.close()


def test_packages_that_are_missing_are_named(bench: Any) -> None:
    info = bench.peers.PeerInfo("x:Y", ("json", "no_such_package"), "")
    assert info.missing() == ["no_such_package"]
    assert all(
        " " not in name and info.description for name, info in bench.peers.LINEAR_PEERS.items()
    )
