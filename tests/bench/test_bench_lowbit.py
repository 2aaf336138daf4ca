"""The low-bit benchmark: cases, formats, peers, summaries, command."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from torchquant.bench import machine, tables
from torchquant.bench.lowbit import LowbitOptions
from torchquant.bench.lowbit_results import LowbitRun
from torchquant.bench.lowbit_shapes import (
    OUT_OF_CACHE_BYTES,
    Format,
    LowbitCase,
    copies,
    lowbit_cases,
    parse_format,
    select,
)
from torchquant.bench.lowbit_worker import LowbitServer, most_error
from torchquant.bench.peers import LOWBIT_SUITES, OURS
from torchquant.bench.peers.lowbit_base import LowbitLayer, NoSuchFormat, in_turn
from torchquant.bench.peers.onnx_nbits import OnnxNBits
from torchquant.bench.peers.torch_lowbit import TorchFloat, TorchInt4
from torchquant.bench.results import CaseResult
from torchquant.bench.roofline import Roofline
from torchquant.bench.shapes import LinearShape
from torchquant.cli import main as cli

LARGE = LinearShape(n=4096, k=4096, m=1)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "200"})


# ---------------------------------------------------------------- cases


def test_the_cases_are_those_that_are_asked_for() -> None:
    cases = lowbit_cases()
    assert len(cases) == len(set(cases))
    for m, n, k in ((1, 4096, 4096), (16, 4096, 4096), (256, 4096, 4096), (1, 11008, 4096)):
        assert LowbitCase(LinearShape(n=n, k=k, m=m), Format(4, 128)) in cases
    assert LowbitCase(LARGE, Format(2, 128), cold=True) in cases
    assert LowbitCase(LinearShape(n=1536, k=576, m=1), Format(4, 64)) in cases
    found = {case.format for case in cases if case.shape == LARGE and not case.cold}
    assert {format.bits for format in found} == {2, 3, 4, 5, 6, 8}
    assert {format.group_size for format in found} == {32, 64, 128, None}


def test_a_format_counts_bits_and_scales() -> None:
    assert Format(4, 128).bytes_of(4096, 4096) == 4096 * 4096 // 2 + 4 * 4096 * 32
    assert Format(3, 32).bytes_of(2, 40) == 30 + 4 * 2 * 2  # the last group has 8 inputs
    assert Format(8).bytes_of(10, 20) == 200 + 40
    assert [str(parse_format(text)) for text in ("4g128", "8", "2g7")] == ["4g128", "8", "2g7"]


@pytest.mark.parametrize("text", ["9g32", "1", "4g0", "4-128", "g32", "4g"])
def test_a_text_that_is_no_format_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no format; try '4g128'"):
        parse_format(text)


def test_cold_weights_are_copies_that_no_cache_holds() -> None:
    cold = LowbitCase(LARGE, Format(4, 128), cold=True)
    assert cold.cycle_bytes >= OUT_OF_CACHE_BYTES
    assert cold.limit_bytes == cold.weight_bytes
    assert LowbitCase(LARGE, Format(4, 128)).cycle_bytes == cold.weight_bytes
    assert copies(1 << 40) == 2  # at least: one layer again and again is not what was asked for


def test_patterns_choose_cases_and_formats_choose_more() -> None:
    cases = lowbit_cases()
    assert all(case.shape.m == 1 and not case.cold for case in select(cases, ["1x4096x4096"], []))
    assert all(case.cold for case in select(cases, ["*c"], []))
    own = select(cases, ["7x500x300"], ["3g20", "8"])
    shape = LinearShape(n=500, k=300, m=7)
    assert own == [LowbitCase(shape, Format(3, 20)), LowbitCase(shape, Format(8))]
    assert select(cases, ["7x500x300c"], ["8"]) == [LowbitCase(shape, Format(8), True)]
    assert {str(case.format) for case in select(cases, ["7x500x300"], [])} >= {"4g128", "2g128"}
    assert {case.format for case in select(cases, [], ["5g32"])} == {Format(5, 32)}
    with pytest.raises(ValueError, match=r"'2x\*' matches no MxNxK of the benchmark"):
        select(cases, ["2x*"], [])


# ---------------------------------------------------------------- peers

FORMATS = {4: 32, 8: 64, 2: 32}
PEERS = [(suite, name) for suite, peers in LOWBIT_SUITES.items() for name in peers]


@pytest.mark.parametrize(("suite", "name"), PEERS, ids=["-".join(peer) for peer in PEERS])
def test_every_peer_computes_the_layer(
    suite: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pool of threads for the whole process would stay, and other tests make sessions.
    monkeypatch.setattr(OnnxNBits, "shares_threads", False)
    info = LOWBIT_SUITES[suite][name]
    if "llama_cpp" in info.missing():
        pytest.skip("llama-cpp-python takes minutes to build; tested where it is present")
    if info.missing():
        pytest.skip(f"needs the package {', '.join(info.missing())}")
    server = LowbitServer.create(suite, name, 1)
    measured = 0
    for bits, group in FORMATS.items():
        for cold in (False, True):
            try:
                server.load(n=48, k=256, bits=bits, group_size=group, cold=cold)
            except NoSuchFormat:
                continue
            answer = server.input(m=3)
            assert answer["error"] <= most_error(bits)
            assert server.block(0.0001)["seconds"]
            measured += 1
    assert measured
    assert server.about()


def test_a_peer_that_computes_something_else_is_found_out() -> None:
    server = LowbitServer.create("lowbit", "fp32", 1)
    server.load(n=8, k=16, bits=8, group_size=None, cold=False)
    peer = server.peer
    assert isinstance(peer, TorchFloat)
    peer.layers[0].weight = torch.nn.Parameter(peer.layers[0].weight * 1.2)
    with pytest.raises(ValueError, match=r"relative error 0\.200 against float, at most 0\.036"):
        server.input(m=2)


def test_weights_that_no_format_changes_are_converted_once() -> None:
    server = LowbitServer.create("lowbit", "fp32", 1)
    server.load(n=8, k=16, bits=8, group_size=None, cold=False)
    peer = server.peer
    assert isinstance(peer, TorchFloat)
    before = peer.layers
    server.load(n=8, k=16, bits=4, group_size=8, cold=False)
    assert peer.layers is before
    server.load(n=8, k=16, bits=4, group_size=8, cold=True)
    assert len(peer.layers) > 1
    assert len({layer.weight.data_ptr() for layer in peer.layers}) == len(peer.layers)


def test_the_int4_operator_of_torch_has_few_formats() -> None:
    weight = torch.randn(32, 96)
    peer = TorchInt4(1)
    for layer, text in (
        (LowbitLayer(weight, 8, 32, False), "4 bits in groups"),
        (LowbitLayer(weight, 4, None, False), "4 bits in groups"),
        (LowbitLayer(weight, 4, 64, False), "no multiple of the group size"),
    ):
        with pytest.raises(NoSuchFormat, match=text):
            peer.load(layer)


def test_copies_take_turns() -> None:
    seen: list[int] = []
    call = in_turn([lambda i=i: seen.append(i) for i in range(3)])  # type: ignore[misc]
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


# ---------------------------------------------------------------- summaries


def _result(case: LowbitCase, **microseconds: float) -> CaseResult[LowbitCase]:
    result = CaseResult(case)
    for peer, value in microseconds.items():
        name = {"llama": "llama.cpp", "int8": "torchquant-int8"}.get(peer, peer)
        result.add(name, {"way": value * 1e-6})
    return result


def _run(results: list[CaseResult[LowbitCase]], suite: str = "lowbit") -> LowbitRun:
    facts = {"missing": {}, "seconds": 1.0, "busy_before": 0.0, "busy_during": 0.0, "steal": 0.0}
    header = {"kind": "run", **machine.describe(), "threads": 2, **facts}
    gops = {"avx512_vnni": 1000.0, "fp32_fma_512": 300.0, "fp32_fma_256": 200.0}
    roofline = Roofline(2, gops, {8.0: 100.0, 128.0: 40.0})
    run = LowbitRun(suite, 2, "avx512_vnni", header, results, roofline)
    run.take_limits()
    return run


def test_the_summary_answers_what_the_formats_cost() -> None:
    cold, warm = ([LowbitCase(LARGE, Format(b, 128), c) for b in (8, 4, 2)] for c in (True, False))
    many = LowbitCase(LinearShape(n=4096, k=4096, m=256), Format(4, 128))
    times = (500, 220, 110)
    run = _run(
        [
            *(_result(c, torchquant=t, int8=440) for c, t in zip(cold, times, strict=True)),
            _result(warm[1], torchquant=60, int8=120, onnxruntime=150, llama=90),
            _result(LowbitCase(LARGE, Format(4, 32)), torchquant=75, int8=120, onnxruntime=200),
            _result(many, torchquant=11000, int8=10000, onnxruntime=24000),
        ]
    )
    ratios = run.summary()["time_over_ours"]
    assert ratios["onnxruntime"]["cases"] == 3
    assert ratios["onnxruntime"]["least"] == pytest.approx(24 / 11, abs=1e-3)
    assert ratios["llama.cpp"]["least_at"] == "1x4096x4096 4g128"
    answers = run.answers()
    assert answers["one row, the int8 layer's time over ours"]["most"] == 2.0
    assert answers["one row, cold, 4 bits' time over that of 2 bits"]["least"] == 2.0
    assert answers["time in groups of 128 over the time in groups of 32"]["least"] == 0.8
    assert answers["128 rows and more, the int8 layer's time over ours"]["least"] == 0.909
    share = answers["one row, cold, share of the read bandwidth"]
    assert share["least"] == pytest.approx(cold[0].weight_bytes / 500e-6 / 40e9, abs=1e-3)
    assert run.gigabytes(run.results[-1]) is None
    lines = "\n".join(run.lines())
    assert "onnxruntime's time over ours, geometric mean over 3 cases" in lines
    page = tables.markdown([run])
    assert "| 1x4096x4096 4g128 cold |" in page
    assert json.dumps(list(tables.records(run)))


def test_without_ours_the_line_says_so() -> None:
    run = _run([_result(LowbitCase(LARGE, Format(4, 128)), onnxruntime=10)])
    assert run.lines() == ["1 cases; no ratio, because torchquant or every peer is missing"]


def test_float_activations_are_bounded_by_the_peak_of_floats() -> None:
    case = LowbitCase(LinearShape(n=4096, k=4096, m=256), Format(4, 128))
    run = _run([_result(case, torchquant=50000)], "lowbit-float")
    assert run.peak_gops == 300.0
    limit = run.results[0].limit
    assert limit is not None
    assert limit.bound_by == "arithmetic"
    assert limit.seconds == pytest.approx(case.operations / 300e9)


# ---------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "x*"], "'x*' matches no MxNxK"),
        (["--formats", "4x128"], "'4x128' is no format"),
        (["--suite", "int4"], "must be one of lowbit, lowbit-float"),
        (["--peers", "mkl"], "got 'mkl'"),
        (["--threads", "0"], "numbers of at least 1"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    outcome = invoke("lowbit", *arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert message in " ".join(outcome.stderr.replace("│", " ").split())


def test_the_command_measures_and_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchquant.bench import peers

    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    outcome = invoke(
        *("lowbit", "--smoke", "--suite", "lowbit", "--json", "--no-progress"),
        *("--peers", f"{OURS},fp32,llama.cpp"),
    )
    assert outcome.exit_code == 0, outcome.output
    assert "without llama.cpp: not installed; pip install llama-cpp-python" in outcome.stderr
    header, *cases, summary = json.loads(outcome.stdout)
    assert header["missing"].keys() == {"llama.cpp"}
    assert [case["us"].keys() for case in cases] == [{OURS, "fp32"}] * 3
    assert [case["cold"] for case in cases] == [False, True, False]
    assert summary["answers"]


def test_the_default_is_every_case_in_both_suites() -> None:
    options = LowbitOptions()
    assert options.selected() == lowbit_cases()
    assert options.suites == tuple(LOWBIT_SUITES)
