"""The linear benchmark's arithmetic and processes. Whole commands run in `test_docs.py`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from torchquant.bench import machine, tables, timing, workers
from torchquant.bench.layer_worker import LayerServer
from torchquant.bench.linear import Options
from torchquant.bench.peers import OURS, SUITES, PeerInfo, make_linear_peer
from torchquant.bench.peers.base import NotInThisTorch
from torchquant.bench.results import Run, ShapeResult, summarise, summary_lines
from torchquant.bench.roofline import Limit, Roofline
from torchquant.bench.shapes import (
    LinearShape,
    linear_shapes,
    named_shapes,
    prequantized_shapes,
    random_shapes,
    select,
)
from torchquant.bench.side_by_side import Bench, Entry, Pace


def test_the_shapes_are_those_of_the_readme_and_come_layer_by_layer() -> None:
    shapes = named_shapes()
    assert {shape.m for shape in shapes} == {1, 4, 16, 64, 128, 256, 1024}
    assert {(11008, 4096), (384, 1536), (129, 257)} <= {(shape.n, shape.k) for shape in shapes}
    layers = [shape.layer for shape in shapes]
    assert sum(a != b for a, b in pairwise(layers)) == len(set(layers)) - 1


def test_random_shapes_are_the_same_every_time_and_odd_ones_are_among_them() -> None:
    shapes = random_shapes()
    assert len(set(shapes)) == 40
    assert shapes == random_shapes()
    assert all(1 <= s.m <= 2048 and min(s.n, s.k) >= 32 and max(s.n, s.k) <= 8192 for s in shapes)
    assert sum(s.n % 2 or s.k % 2 for s in shapes) > 10
    assert sum(s.m <= 16 for s in shapes) > 5
    assert linear_shapes() == named_shapes() + shapes


def test_the_prequantized_suite_holds_what_is_judged_by_the_limits() -> None:
    shapes = prequantized_shapes()
    assert sum(shape.is_large for shape in shapes) >= 5
    for m in (1, 2, 4, 8, 16):
        assert {LinearShape(n=11008, k=4096, m=m), LinearShape(n=4096, k=11008, m=m)} < set(shapes)


def test_a_shape_of_ones_own_is_taken_by_every_suite_a_pattern_only_where_it_matches() -> None:
    options = Options(shapes=("7x500x300", "16x4096x11008"))
    own, streamed = LinearShape(n=500, k=300, m=7), LinearShape(n=4096, k=11008, m=16)
    assert options.selected() == {"dynamic": [own, streamed], "prequantized": [own, streamed]}
    only = Options(shapes=("*x384x384",)).selected()
    assert list(only) == ["dynamic"]
    assert len(only["dynamic"]) == 7


def test_shape_patterns_select_and_an_unknown_one_is_refused() -> None:
    shapes = named_shapes()
    selected = select(shapes, ["1x*", "*x768x768"])
    assert {str(shape) for shape in selected} >= {"1x384x384", "1024x768x768"}
    assert all(shape.m == 1 or shape.layer == "768x768" for shape in selected)
    with pytest.raises(ValueError, match=r"'2x\*' matches no MxNxK .* try '1x\*'"):
        select(shapes, ["2x*"])


def test_geometric_mean_lets_double_and_half_cancel() -> None:
    assert timing.geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert timing.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(timing.geometric_mean([]))


def test_seconds_per_call_is_per_call_even_in_batches() -> None:
    assert timing.seconds_per_call(lambda: None, 0.002) < 5e-6
    assert timing.seconds_per_call(lambda: time.sleep(0.002), 0.01) >= 0.002


def _result(m: int, **microseconds: list[float]) -> Any:
    result = ShapeResult(LinearShape(n=100, k=50, m=m))
    for peer, blocks in microseconds.items():
        for value in blocks:
            result.add(peer, {"module": value * 1e-6})
    return result


def test_a_result_compares_ours_with_the_best_way_of_the_best_peer() -> None:
    result = _result(4, torchquant=[9, 10, 90], fp32=[40, 40, 40])
    for value in (30e-6, 20e-6, 25e-6):
        result.add("onnxruntime", {"run": value, "io_binding": value / 2})
    assert result.best_peer() == "onnxruntime"
    assert result.variant("onnxruntime") == "io_binding"
    assert result.ratio() == pytest.approx(1.25)
    assert result.gops() == pytest.approx(2 * 4 * 100 * 50 / 10e-6 / 1e9)
    record = json.loads(json.dumps(result.record()))
    assert record["us"] == {"torchquant": 10, "fp32": 40, "onnxruntime": 12.5}
    assert record["variant"] == {"onnxruntime": "io_binding"}


def test_the_summary_separates_few_rows_from_many_and_names_the_lowest() -> None:
    results = [
        _result(1, torchquant=[10], fp32=[40]),
        _result(64, torchquant=[10], fp32=[9], bf16=[30]),
        _result(128, torchquant=[10]),
    ]
    summary = summarise(results)
    assert summary["geometric_mean_few_rows"] == 4.0
    assert summary["geometric_mean_many_rows"] == 0.9
    assert (summary["lowest"], summary["lowest_shape"]) == (0.9, "64x100x50")
    assert summary["slower_than_best_peer"] == 1
    assert summary["best_peer_counts"] == {"fp32": 2}
    assert "lowest: 0.90x at 64x100x50" in "\n".join(summary_lines(summary))


def _run(results: list[ShapeResult], isa: str = "avx512_vnni", suite: str = "dynamic") -> Run:
    facts = {
        "missing": {"openvino": "not installed; pip install openvino"},
        "seconds": 1.0,
        "busy_before": 0.0,
        "busy_during": 0.0,
        "steal": 0.0,
    }
    header = {"kind": "run", **machine.describe(), "threads": 2, **facts}
    roofline = Roofline(2, {"avx512_vnni": 1000.0, "avx2": 200.0}, {1.0: 100.0, 64.0: 50.0})
    for result in results:
        shape = result.shape
        result.limit = roofline.limit(shape.operations, shape.weight_bytes, isa)
    return Run(suite, 2, isa, header, results, roofline)


def test_without_ours_there_is_a_table_but_no_ratio() -> None:
    results = [_result(1, fp32=[40])]
    assert "no ratio" in summary_lines(summarise(results))[0]
    heading, row = tables.rows(_run(results))
    cells = dict(zip(heading, row, strict=True))
    assert (cells["fp32"], cells["ratio"], cells["bound by"]) == ("40.0", "-", "bandwidth")


def test_another_way_of_using_torchquant_is_no_peer() -> None:
    result = _result(4, torchquant=[10], fp32=[40])
    result.add("torchquant-bf16-in", {"module": 1e-6})
    result.uncompared = frozenset({"torchquant-bf16-in"})
    assert result.best_peer() == "fp32"


def test_limits_are_answered_for_the_shapes_they_are_about() -> None:
    large = ShapeResult(LinearShape(n=2048, k=1024, m=1024))
    large.add(OURS, {"op": large.shape.operations / 500e9})  # half of the peak
    one, few = (ShapeResult(LinearShape(n=8192, k=8192, m=m)) for m in (1, 16))
    one.add(OURS, {"op": one.shape.weight_bytes / 40e9})
    few.add(OURS, {"op": few.shape.operations / 800e9})
    small = _result(1, torchquant=[1000])
    run = _run([large, one, few, small], suite="prequantized")
    limits = run.limit_summary()
    assert limits["large_of_peak"] == {"least": 0.5, "most": 0.5, "least_shape": str(large.shape)}
    assert limits["large_of_vpdpbusd"]["least"] == 0.5
    assert limits["one_row_of_bandwidth"]["least"] == 0.8
    assert few.limit == Limit(few.shape.operations / 1e12, "arithmetic")
    assert limits["few_rows_of_limit"]["least"] == 0.8
    assert any("0.80 to 0.80, least at 1x8192x8192" in line for line in run.lines())
    assert run.summary()["limits"] == limits


def test_a_page_names_limits_and_who_was_missing_and_a_reason_only_once() -> None:
    results = [_result(m, torchquant=[10], fp32=[5]) for m in (1, 4)]
    for result in results:
        result.failures["torchao"] = "broken"
    run = _run(results)
    page = tables.markdown([run])
    assert "without: openvino (not installed; pip install openvino)" in page
    assert page.count("torchao, 2 shapes: broken") == 1
    assert "measured peaks, GOPS: avx512_vnni 1000, avx2 200" in page
    assert "under 0.95x on 2: 1x100x50, 4x100x50" in page
    assert [record["kind"] for record in tables.records(run)] == [
        "run",
        "shape",
        "shape",
        "summary",
    ]


def test_the_header_cuts_absolute_paths_from_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["benchmarks/bench_linear.py", "--figure", "/home/me/a.png", "--output=/x/b"]
    )
    assert machine.command_line() == ("python benchmarks/bench_linear.py --figure a.png --output=b")


def test_a_worker_measures_and_reports_failure_in_its_peers_words() -> None:
    worker = Entry("dynamic", "fp32").start(1)
    try:
        worker.ask("load", n=8, k=4)
        answer = worker.ask("input", m=2)
        assert answer["error"] < 1e-6
        assert worker.ask("block", seconds=0.001)["seconds"]["module"] > 0
        assert worker.wait_until_asleep(timeout=10)
        with pytest.raises(workers.WorkerError, match=r"AttributeError: .*'nothing'"):
            worker.ask("nothing")
    finally:
        worker.close()


def test_a_peer_that_hangs_is_ended() -> None:
    worker = workers.Worker(["-c", "import time; time.sleep(60)"], answer_seconds=0.01)
    try:
        with pytest.raises(workers.WorkerError, match=r"no answer within 0 s"):
            worker.ask("about")
        with pytest.raises(workers.WorkerError):
            worker.ask("about")
    finally:
        worker.close()


class EchoServer:
    """Answers with its environment and with seconds; fails on request."""

    def variable(self, name: str) -> dict[str, Any]:
        return {"value": os.environ.get(name)}

    def block(self, values: list[float]) -> dict[str, Any]:
        print("a library's own words")  # must not reach the parent as an answer
        return {"seconds": values}

    def fail(self) -> dict[str, Any]:
        raise ValueError("first line\nsecond line")


ECHO = ["-c", "from test_benchmarks import EchoServer, workers; workers.serve(EchoServer)"]
HERE = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}


def test_any_object_can_be_served_and_blocks_take_turns() -> None:
    peers = {name: workers.Worker(ECHO, HERE | {"PEER": name}) for name in ("a", "b")}
    try:
        assert peers["b"].ask("variable", name="PEER") == {"value": "b"}
        kept = peers["a"].ask("variable", name="MALLOC_TRIM_THRESHOLD_")["value"]
        assert kept == os.environ.get("MALLOC_TRIM_THRESHOLD_", str(2**33))
        with pytest.raises(workers.WorkerError, match=r"^ValueError: first line$"):
            peers["a"].ask("fail")
        blocks = workers.measure_blocks(peers, 3, "block", values=[3.0, 1.0, 2.0])
        assert blocks == {"a": [2.0] * 3, "b": [2.0] * 3}
        assert timing.medians(blocks) == {"a": 2.0, "b": 2.0}
    finally:
        for peer in peers.values():
            peer.close()


def test_workers_need_neither_torchquant_nor_torch() -> None:
    """The examples load the file by its path: a process of onnxruntime must not hold torch."""
    code = f"import runpy, sys; runpy.run_path({workers.__file__!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_slow_way_of_calling_is_measured_once_only() -> None:
    server = LayerServer(make_linear_peer("dynamic", "fp32", 1))
    server.load(n=8, k=4)
    server.input(m=2)
    server.calls = {"fast": lambda: None, "slow": lambda: time.sleep(0.001)}
    assert server.block(0.002)["seconds"].keys() == {"fast", "slow"}
    assert server.block(0.002)["seconds"].keys() == {"fast"}


def test_a_peer_that_cannot_be_made_or_that_dies_says_so() -> None:
    worker = Entry("dynamic", "no-such-peer").start(1)
    try:
        with pytest.raises(workers.WorkerError, match=r"KeyError: 'no-such-peer'"):
            worker.ask("about")
        worker._process.kill()
        with pytest.raises(workers.WorkerError, match=r"process ended with status -9"):
            worker.ask("about")
    finally:
        worker.close()


def test_packages_that_are_missing_are_named() -> None:
    info = PeerInfo("x:Y", ("json", "no_such_package"), "")
    assert info.missing() == ["no_such_package"]
    assert info.how_to_install() == "pip install no_such_package"
    assert all(
        " " not in name and info.description
        for peers in SUITES.values()
        for name, info in peers.items()
    )


ALL_PEERS = [(suite, name) for suite, peers in SUITES.items() for name in peers]


@pytest.mark.parametrize(("suite", "name"), ALL_PEERS, ids=["-".join(peer) for peer in ALL_PEERS])
def test_every_peer_computes_the_layer(suite: str, name: str) -> None:
    info = SUITES[suite][name]
    if info.missing():
        pytest.skip(f"needs the package {', '.join(info.missing())}")
    if name == "torchao-compiled":
        pytest.skip("compiles for seconds; torchao itself is tested")
    engine = torch.backends.quantized.engine
    try:
        server = LayerServer(make_linear_peer(suite, name, 1))
        server.load(n=48, k=80)
        answer = server.input(m=3)
    except NotInThisTorch as error:
        pytest.skip(str(error))
    finally:
        torch.backends.quantized.engine = engine
    assert answer["error"] < 0.05
    assert answer["seconds"]
    assert server.about()


@pytest.mark.parametrize(
    ("suite", "name"),
    [peer for peer in ALL_PEERS if "torch_ao" in SUITES[peer[0]][peer[1]].target],
)
def test_a_torch_without_quantized_tensors_has_no_such_peer(
    suite: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch, "quint8")
    with pytest.raises(NotInThisTorch, match=r"has no torch\.quint8 any more"):
        make_linear_peer(suite, name, 1)


def test_a_torch_without_torch_ao_has_no_such_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = torch.backends.quantized.engine
    peer = make_linear_peer("dynamic", "ao-fbgemm", 1)
    torch.backends.quantized.engine = engine
    monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)
    with pytest.raises(NotInThisTorch, match=r"has no torch\.ao: "):
        peer.load(torch.randn(4, 8), torch.randn(4))


def test_a_peer_that_computes_something_else_is_found_out() -> None:
    peer = make_linear_peer("dynamic", "fp32", 1)
    server = LayerServer(peer)
    server.load(n=8, k=4)
    peer.layer.weight = torch.nn.Parameter(peer.layer.weight * 1.2)  # type: ignore[attr-defined]
    assert server.input(m=2)["error"] > 0.05


class FakeWorker:
    """Answers at once: `first` seconds for the first call, `block` for every block."""

    def __init__(self, first: float, block: float, error: float = 0.01) -> None:
        self.first, self.block, self.error = first, block, error
        self.blocks = 0

    def send(self, do: str, **rest: Any) -> None:
        pass

    def receive(self) -> dict[str, Any]:
        return {}

    def ask(self, do: str, **rest: Any) -> dict[str, Any]:
        if do == "input":
            return {"error": self.error, "seconds": {"way": self.first}}
        self.blocks += 1
        return {"seconds": {"way": self.block}}

    def wait_until_asleep(self) -> bool:
        return True

    def close(self) -> None:
        pass


def _bench_of(fakes: dict[str, FakeWorker], minutes: float | None = None) -> Bench:
    from rich.console import Console

    entries = {name: Entry("dynamic", name) for name in fakes}
    bench = Bench(entries, 1, Options(), Console(quiet=True), Pace(minutes, 1))
    bench.workers = fakes  # type: ignore[assignment]
    bench.run([LinearShape(n=8, k=4, m=2)], lambda shape: None)
    return bench


def test_the_slow_sit_out_and_the_hopeless_do_not_start() -> None:
    fakes = {
        OURS: FakeWorker(1e-3, 9e-3),  # slowest of all in its blocks, and yet measured to the end
        "fp32": FakeWorker(1e-3, 1e-3),
        "bf16": FakeWorker(1e-3, 1.5e-3),
        "onednn": FakeWorker(1e-3, 4e-3),
        "torchao": FakeWorker(1.0, 1.0),
        "openvino": FakeWorker(1e-3, 1e-4, error=0.2),
    }
    (result,) = _bench_of(fakes).results
    counts = {name: fake.blocks for name, fake in fakes.items()}
    assert counts == {OURS: 5, "fp32": 5, "bf16": 2, "onednn": 1, "torchao": 0, "openvino": 0}
    assert result.seconds("torchao") == 1.0
    assert result.failures == {"openvino": "relative error 0.200 against float"}
    assert result.best_peer() == "fp32"


def test_where_time_is_up_every_shape_still_gets_two_rounds() -> None:
    fakes = {OURS: FakeWorker(1e-3, 1e-3), "fp32": FakeWorker(1e-3, 1e-3)}
    _bench_of(fakes, minutes=0.0)
    assert [fake.blocks for fake in fakes.values()] == [2, 2]
