"""``torchquant bench``: options, errors, files, and the breakdown of a call. Tiny measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import torchquant
from torchquant._extension import load
from torchquant.bench.files import results_file, write_json_lines
from torchquant.bench.isa import FBGEMM_AVX2, answers, entries, isa_shapes
from torchquant.bench.overhead import GRAD_MODES, measure_call, overhead_table, run_overhead
from torchquant.bench.results import ShapeResult
from torchquant.bench.roofline import Roofline
from torchquant.bench.shapes import LinearShape
from torchquant.cli import main as cli

TINY = ("--threads", "1", "--rounds", "1", "--block", "0.001", "--no-progress")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("command", ["linear", "roofline", "isa", "overhead"])
def test_help(command: str) -> None:
    outcome = invoke(command, "--help")
    assert outcome.exit_code == 0
    assert "--json" in outcome.stdout
    assert "--smoke" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["linear", "--shapes", "x*"], "'x*' matches no MxNxK", id="pattern"),
        pytest.param(["linear", "--peers", "mkl"], "got 'mkl'", id="peer"),
        pytest.param(["linear", "--suite", "static"], "must be one of dynamic, preq", id="suite"),
        pytest.param(["linear", "--threads", "1,0"], "numbers of at least 1", id="threads"),
        pytest.param(["isa", "--threads", "two"], "numbers of at least 1", id="no number"),
        pytest.param(["linear", "--isa", "sse9"], "got 'sse9' (unknown)", id="isa"),
        pytest.param(["linear", "--rounds", "0"], "--rounds", id="rounds"),
        pytest.param(["roofline", "--mib", "much"], "must be numbers of MiB", id="mib"),
        pytest.param(["roofline", "--mib", "0"], "must be more than 0", id="no mib"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert message in " ".join(outcome.stderr.replace("│", " ").split())


def test_linear_writes_table_page_lines_and_figure(tmp_path: Path) -> None:
    files = {name: tmp_path / f"a.{name}" for name in ("jsonl", "md", "png")}
    outcome = invoke(
        *("linear", "--shapes", "2x48x80,5x33x17", "--peers", "torchquant,fp32,onednn", *TINY),
        *("--output", str(files["jsonl"]), "--markdown", str(files["md"])),
        *("--figure", str(files["png"])),
    )
    assert outcome.exit_code == 0, outcome.output
    assert "2x48x80" in outcome.stdout
    assert "geometric mean of best peer's time / ours over 2 shapes" in outcome.stdout
    records = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    kinds = ["run", "shape", "shape", "summary"]
    assert [record["kind"] for record in records] == 2 * kinds
    assert [record["suite"] for record in records if record["kind"] == "run"] == [
        "dynamic",
        "prequantized",
    ]
    assert records[1]["us"].keys() == {"torchquant", "fp32", "onednn"}
    assert records[0]["roofline_before"]["gops"].keys() == set(load().peak_names())
    assert files["md"].read_text().count("| M x N x K |") == 2
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "matplotlib is not installed; pip install matplotlib" in outcome.stderr
    else:
        drawn = sorted(path.name for path in tmp_path.glob("*.png"))
        assert drawn == ["a-dynamic.png", "a-prequantized.png"]


def test_linear_runs_without_any_peer_and_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchquant.bench import peers

    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    outcome = invoke(
        *("linear", "--suite", "dynamic", "--shapes", "2x48x80", "--json", *TINY),
        *("--peers", "torchquant,onnxruntime,openvino,torchao"),
    )
    assert outcome.exit_code == 0, outcome.output
    assert "without openvino: not installed; pip install openvino" in outcome.stderr
    assert "pip install onnxruntime onnx" in outcome.stderr
    header, shape, summary = json.loads(outcome.stdout)
    assert header["missing"].keys() == {"onnxruntime", "openvino", "torchao"}
    assert shape["us"].keys() == {"torchquant"}
    assert shape["bound_by"] in ("arithmetic", "bandwidth", None)
    assert summary["kind"] == "summary"


def test_linear_measures_the_instruction_set_that_was_asked_for() -> None:
    outcome = invoke(
        *("linear", "--suite", "prequantized", "--shapes", "2x48x80", "--json", *TINY),
        *("--peers", "torchquant", "--isa", "scalar"),
    )
    assert json.loads(outcome.stdout)[0]["isa"] == "scalar"


def test_saved_files_are_named_by_date_cpu_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert results_file("isa").parent == Path()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    path = results_file("linear", "2threads", None, suffix=".md")
    assert path.parent == Path("benchmarks/results")
    assert path.name.startswith("linear-")
    assert path.name.endswith("-2threads.md")


def test_a_results_file_has_a_record_per_line_and_six_digits(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a", [{"kind": "header"}, {"us": [12.3456789, 1234567.0], "n": 3}])
    lines = (tmp_path / "a").read_text().splitlines()
    assert lines == ['{"kind": "header"}', '{"us": [12.3457, 1234570.0], "n": 3}']


def test_roofline_as_json() -> None:
    outcome = invoke("roofline", "--threads", "1", "--mib", "0.125", "--seconds", "0.002", "--json")
    (record,) = json.loads(outcome.stdout)
    assert record["gops"].keys() == set(load().peak_names())
    assert record["threads"] == 1


def test_isa_smoke() -> None:
    outcome = invoke("isa", "--smoke", "--json", "--no-progress")
    assert outcome.exit_code == 0, outcome.output
    (record,) = json.loads(outcome.stdout)
    (shape,) = record["shapes"]
    assert shape["isas"].keys() == entries().keys()
    assert "scalar" in shape["isas"]
    assert record["naive_gops"].keys() == {"as written", "vectorised by the compiler"}


def test_isa_answers_are_the_least_over_the_large_shapes() -> None:
    results = []
    for m, seconds in ((1024, 2.0), (512, 4.0), (1, 1e9)):
        result = ShapeResult(LinearShape(n=1000, k=1000, m=m))
        operations = result.shape.operations
        result.add("avx2", {"op": operations / 100e9 * seconds})
        result.add("scalar", {"op": operations / 10e9 * seconds})
        result.add(FBGEMM_AVX2, {"op": operations / 50e9 * seconds})
        results.append(result)
    roofline = Roofline(2, {"avx2": 100.0, "fp32_fma_256": 50.0}, {})
    found = answers(results, roofline, {"as written": 0.5}, threads=2)
    assert found == {
        "avx2 over its own peak": 0.25,
        "avx2 over the 256-bit fp32 FMA peak": 0.5,
        "avx2's own peak over the 256-bit fp32 FMA peak": 2.0,
        "avx2 over FBGEMM's AVX2": 2.0,
        "scalar, per thread, over the triple loop as written": 2.5,
    }
    assert {shape.m for shape in isa_shapes()} == {1, 2, 4, 8, 16, 1024}


def test_a_calls_parts_grow_from_the_kernel_to_the_module() -> None:
    cost = measure_call((1, 64, 64), "inference mode", 0.02)
    order = ["kernel", "operator, from C++", "operator, from Python", "forward()", "nn.Module call"]
    assert list(cost.parts)[: len(order)] == order
    assert 0 < cost.parts["kernel"] < cost.parts["operator, from C++"] < cost.parts["forward()"]
    assert cost.above_kernel > 0
    assert cost.most == 3.0
    assert measure_call((1, 32, 32), "no_grad", 0.001).most == 5.0


def test_overhead_covers_every_mode_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    result = run_overhead(0.0005)
    assert torch.get_num_threads() == threads
    assert {cost["mode"] for cost in result["costs"]} == set(GRAD_MODES)
    assert overhead_table(result).row_count == len(result["costs"])


def test_the_kernel_that_is_timed_is_the_operators() -> None:
    """Its parts run on the layer's own tensors: a wrong size would be a crash or nonsense."""
    layer = torchquant.nn.QuantizedLinear.from_float(torch.nn.Linear(80, 48))
    x = torch.randn(3, 80)
    tensors = (x, layer.packed, layer.weight_scale, layer.bias)
    for part in ("kernel", "allocation", "operator"):
        assert load().part_seconds(part, *tensors, 48, 0.001) > 0
    with pytest.raises(ValueError, match="part must be kernel, allocation or operator, got magic"):
        load().part_seconds("magic", *tensors, 48, 0.001)
    with pytest.raises(ValueError, match=r"input must be contiguous float32 \[M, K\]"):
        load().part_seconds("kernel", x.bfloat16(), *tensors[1:], 48, 0.001)
