"""The benchmarks of convolutions and of whole networks: shapes, peers, summaries, commands."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from torchquant.bench import conv, machine, networks, peers, tables
from torchquant.bench.cnn_worker import NetworkServer
from torchquant.bench.conv import CnnOptions, ConvOptions, installed
from torchquant.bench.conv_results import CnnRun, ConvRun, library_ratio
from torchquant.bench.conv_shapes import (
    FAMILIES,
    ConvShape,
    curves,
    network_shapes,
    select,
)
from torchquant.bench.conv_worker import ConvServer
from torchquant.bench.networks import NETWORKS, NetworkCase
from torchquant.bench.peers import CNN, CONV, OURS
from torchquant.bench.peers.base import NotInThisTorch
from torchquant.bench.results import CaseResult
from torchquant.bench.roofline import Roofline
from torchquant.cli import main as cli

VISION = find_spec("torchvision") is not None and find_spec("timm") is not None
needs_vision = pytest.mark.skipif(not VISION, reason="needs the package torchvision, timm")
PIXELS = 32
SLOW = ("ao-onednn", "ao-fbgemm", "bf16", "fp32", "onnxruntime-fp32", "ao-x86")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "200"})


# ---------------------------------------------------------------- shapes


def test_the_shapes_are_the_layers_of_four_networks_with_both_batches() -> None:
    shapes = network_shapes()
    assert len(shapes) == len(set(shapes))
    assert {shape.batch for shape in shapes} == {1, 8}
    found = {shape.family for shape in shapes}
    assert found == {"stem", "dense", "1x1", "depthwise"} < set(FAMILIES)
    for layer in (
        ConvShape(8, 3, 224, 224, 64, 7, 2),
        ConvShape(1, 512, 7, 7, 512, 3),
        ConvShape(1, 1024, 14, 14, 2048, 1, 2),
        ConvShape(8, 64, 224, 224, 64, 3),
        ConvShape(1, 960, 7, 7, 960, 3, 1, 960),
        ConvShape(1, 672, 14, 14, 672, 5, 2, 672),
        ConvShape(1, 48, 1, 1, 1152, 1),
    ):
        assert layer in shapes
    both = next(shape for shape in shapes if str(shape) == "1x32x112x112-32k3g32")
    assert both.networks == ("MobileNetV2", "EfficientNet")


@pytest.mark.parametrize("name", ["MobileNetV2", pytest.param("ResNet-50", marks=pytest.mark.slow)])
@needs_vision
def test_the_shapes_are_those_of_the_real_network(name: str) -> None:
    """Every convolution of torchvision's network is one of the benchmark's shapes."""
    found = set()

    def note(layer: torch.nn.Module, inputs: Any, result: Any) -> None:
        assert isinstance(layer, torch.nn.Conv2d)
        found.add(
            ConvShape(
                *inputs[0].shape,
                layer.out_channels,
                layer.kernel_size[0],
                layer.stride[0],
                layer.groups,
            )
        )

    with torch.device("meta"):
        model = networks.create(name).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, 224, 224))
    assert found == {s for s in network_shapes() if name in s.networks and s.batch == 1}


def test_a_shape_counts_its_operations_and_bytes() -> None:
    dense = ConvShape(2, 3, 224, 224, 64, 7, 2)
    assert dense.out_size == (112, 112)
    assert dense.operations == 2 * 2 * 112 * 112 * 64 * 3 * 49
    assert dense.weight_bytes == 64 * 3 * 49
    assert dense.limit_bytes == 64 * 3 * 49 + 2 * 3 * 224 * 224 + 2 * 64 * 112 * 112
    depthwise = ConvShape(1, 96, 7, 7, 96, 3, 1, 96)
    assert depthwise.operations == 2 * 49 * 96 * 9
    assert depthwise.family == "depthwise"
    assert ConvShape(1, 32, 7, 7, 64, 3, 1, 4).family == "grouped"


def test_patterns_select_by_text_family_and_network() -> None:
    shapes = network_shapes()
    assert {s.batch for s in select(shapes, ["8x*"])} == {8}
    assert {s.family for s in select(shapes, ["depthwise"])} == {"depthwise"}
    assert all("VGG-16" in s.networks for s in select(shapes, ["vgg*"]))
    own = select(shapes, ["2x8x9x7-12k3s2g4"])
    assert own == [ConvShape(2, 8, 9, 7, 12, 3, 2, 4)]
    assert str(own[0]) == "2x8x9x7-12k3s2g4"
    assert select(shapes, []) == shapes


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("9x*", "matches no shape, family or network"),
        ("1x8x9x9-12k3g5", "channels and outputs that the groups divide"),
        ("1x8x2x2-8k4s2g0", "at least 1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        select(network_shapes(), [pattern])


def test_the_curves_grow_in_one_dimension_and_are_left_out_where_shapes_are_chosen() -> None:
    pixels, images = curves()["pixels"], curves()["images"]
    assert [s.out_pixels for s in pixels] == sorted(s.out_pixels for s in pixels)
    assert len({(s.batch, str(s.load_request())) for s in pixels}) == 1
    assert len({(s.height, str(s.load_request())) for s in images}) == 1
    assert ConvOptions().curves() == curves()
    assert ConvOptions(shapes=("8x*",)).curves() == ConvOptions(curve=False).curves() == {}


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize(
    ("layer", "batch"),
    [
        ({"channels": 16, "outputs": 24, "kernel": 3, "stride": 2, "groups": 1}, (2, 9, 7)),
        ({"channels": 32, "outputs": 32, "kernel": 5, "stride": 1, "groups": 32}, (1, 8, 8)),
        ({"channels": 8, "outputs": 8, "kernel": 1, "stride": 1, "groups": 1}, (1, 8, 8)),
    ],
    ids=["dense", "depthwise", "1x1"],
)
def test_every_peer_computes_the_convolution(
    name: str, layer: dict[str, int], batch: tuple[int, int, int]
) -> None:
    info = CONV[name]
    if info.missing():
        pytest.skip(f"needs the package {', '.join(info.missing())}")
    engine = torch.backends.quantized.engine
    try:
        server = ConvServer.create("conv", name, 1)
        server.load(**layer)
        answer = server.input(*batch)
        assert answer["error"] < 0.02
        assert server.block(0.0001)["seconds"]
        assert server.about()
    except NotInThisTorch as error:
        pytest.skip(str(error))
    finally:
        torch.backends.quantized.engine = engine


def test_a_convolution_that_computes_something_else_is_found_out() -> None:
    server = ConvServer.create("conv", "fp32", 1)
    server.load(channels=8, outputs=8, kernel=3, stride=1, groups=1)
    server.peer.weight = server.peer.weight * 1.2  # type: ignore[attr-defined]
    assert server.input(1, 8, 8)["error"] > 0.05


# Ours, openvino and onnxruntime suffice: the other engines have run for the layers alone.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CNN],
)
@needs_vision
def test_every_peer_computes_the_network(name: str) -> None:
    info = CNN[name]
    if info.missing():
        pytest.skip(f"needs the package {', '.join(info.missing())}")
    engine = torch.backends.quantized.engine
    try:
        server = NetworkServer.create("cnn", name, 1)
        server.load("ResNet-18", PIXELS)
        answer = server.input(2)
        exact = name in ("fp32", "onnxruntime-fp32")
        assert answer["error"] < (1e-4 if exact else 0.12)
        block = server.block(0.0001)
        assert block["seconds"]
        assert block.get("megabytes", 1.0) > 0
    except NotInThisTorch as error:
        pytest.skip(str(error))
    finally:
        torch.backends.quantized.engine = engine


@pytest.mark.parametrize("name", ["MobileNetV2", "EfficientNet-Lite0"])
@needs_vision
def test_the_onnx_file_of_a_network_computes_it(name: str) -> None:
    """Relu6, timm's batch norms with activations, pools written as functions."""
    if CNN["onnxruntime"].missing():
        pytest.skip("needs the package onnxruntime, onnx")
    server = NetworkServer.create("cnn", "onnxruntime-fp32", 1)
    server.load(name, PIXELS)
    assert server.input(2)["error"] < 1e-3


@needs_vision
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_operations_and_weights_of_the_table(name: str) -> None:
    operations = weights = 0

    def count(layer: torch.nn.Module, inputs: Any, result: torch.Tensor) -> None:
        nonlocal operations, weights
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        operations += 2 * weight.numel() * result.shape[2:].numel()
        weights += weight.numel()

    with torch.device("meta"):
        model = networks.create(name).eval()
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, 224, 224))
    assert (operations, weights) == (NETWORKS[name].operations, NETWORKS[name].weights)
    assert NetworkCase(name, 8).operations == 8 * operations
    assert NetworkCase(name, 8).limit_bytes == weights


@needs_vision
def test_random_networks_are_the_same_each_time_and_keep_their_activations() -> None:
    one, other = (networks.random_network("ResNet-18", PIXELS) for _ in range(2))
    x = networks.images(4, PIXELS)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
        assert 0.05 < float(one(x).std()) < 20
    assert not one.training
    assert one.bn1.momentum == 0.1  # type: ignore[union-attr]


def test_networks_without_their_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "find_spec", lambda name: None if name == "timm" else 1)
    console = Console(record=True, width=200)
    cases = installed(CnnOptions().selected(), console)
    assert {case.network for case in cases} == set(NETWORKS) - {"EfficientNet-Lite0"}
    text = console.export_text()
    assert "without EfficientNet-Lite0: not installed; pip install --no-deps timm" in text


def test_descriptions_name_no_package_twice() -> None:
    for info in (*CONV.values(), *CNN.values()):
        assert info.description and " " not in info.target
        assert info.target.count(":") == 1


# ---------------------------------------------------------------- summaries


def _conv_run(results: list[CaseResult[ConvShape]]) -> ConvRun:
    return _run(ConvRun, "conv", results)


def _run(kind: Any, suite: str, results: Any) -> Any:
    facts = {
        "missing": {"openvino": "not installed; pip install openvino onnx"},
        "seconds": 1.0,
        "busy_before": 0.0,
        "busy_during": 0.0,
        "steal": 0.0,
    }
    header = {"kind": "run", **machine.describe(), "threads": 2, **facts}
    roofline = Roofline(2, {"avx512_vnni": 1000.0}, {1.0: 100.0})
    for result in results:
        shape = result.shape
        result.limit = roofline.limit(shape.operations, shape.limit_bytes, "avx512_vnni")
    return kind(suite, 2, "avx512_vnni", header, results, roofline)


def _result(shape: Any, **microseconds: float) -> Any:
    result: CaseResult[Any] = CaseResult(shape)
    for peer, value in microseconds.items():
        result.add(peer.replace("_", "-"), {"op": value * 1e-6}, 12.0)
    return result


DENSE, DEPTHWISE = ConvShape(1, 64, 56, 56, 64, 3), ConvShape(1, 96, 56, 56, 96, 3, 1, 96)


def test_the_summary_compares_with_every_library_by_family() -> None:
    gops = DENSE.operations / 500e9 * 1e6  # half of the peak
    run = _conv_run(
        [
            _result(DENSE, torchquant=gops, onednn=2 * gops, ao_onednn=gops * 0.8),
            _result(DEPTHWISE, torchquant=10, onednn=40, ao_fbgemm=20),
        ]
    )
    found = run.summary()["time_over_ours"]
    assert found["oneDNN"]["by_family"] == {"dense": 0.8, "depthwise": 4.0}
    assert found["oneDNN"]["geometric_mean"] == pytest.approx(math.sqrt(3.2), abs=1e-3)
    assert found["oneDNN"]["lowest_shape"] == str(DENSE)
    assert found["oneDNN"]["below_0.9"] == [str(DENSE)]
    assert found["FBGEMM"] == {
        "shapes": 1,
        "geometric_mean": 2.0,
        "by_family": {"depthwise": 2.0},
        "lowest": 2.0,
        "lowest_shape": str(DEPTHWISE),
        "below_0.9": [],
    }
    assert "openvino" not in found
    assert run.peak_shares()["dense"]["least"] == 0.5
    assert library_ratio(run.results[0], ("bf16",)) is None
    lines = "\n".join(run.lines())
    assert "oneDNN's time over ours, geometric mean over 2 shapes: 1.79x" in lines
    assert f"under 0.9x on 1: {DENSE}" in lines


def test_without_ours_the_lines_say_so() -> None:
    run = _conv_run([_result(DENSE, onednn=10)])
    assert run.lines() == ["1 shapes; no ratio, because torchquant or every peer is missing"]
    network = _run(CnnRun, "cnn", [_result(NetworkCase("ResNet-18", 1), fp32=10)])
    assert "no ratio, because torchquant" in network.lines()[0]
    assert network.summary()["networks"][0]["ms"] is None


def test_curves_are_apart_and_have_their_time_per_pixel() -> None:
    points = [ConvShape(1, 64, size, size, 64, 3) for size in (10, 20)]
    times = (50.0, 220.0)
    results = [_result(DENSE, torchquant=10, onednn=20)]
    results += [_result(s, torchquant=t) for s, t in zip(points, times, strict=True)]
    run = _conv_run(results)
    run.take_curves({"pixels": points})
    assert [str(r.shape) for r in run.results] == [str(DENSE)]
    (record,) = run.extra_records()
    assert [point["ns_per_pixel"] for point in record["points"]] == [
        {"torchquant": 500.0},
        {"torchquant": 550.0},
    ]
    assert record["spread"] == {"torchquant": 1.1}
    page = tables.markdown([run])
    assert "| 20 x 20 | 220 | 550.0 |" in page
    assert "| most / least |  | 1.10x |" in page
    kinds = [record["kind"] for record in tables.records(run)]
    assert kinds == ["run", "shape", "curve", "summary"]


def test_networks_have_milliseconds_memory_and_their_share_of_the_peak() -> None:
    case = NetworkCase("ResNet-18", 8)
    ours = case.operations / 700e9 * 1e6
    run = _run(CnnRun, "cnn", [_result(case, torchquant=ours, ao_x86=1.2 * ours, fp32=9 * ours)])
    assert run.lines() == ["ResNet-18, batch 8: 1.20x ao-x86, 70% of the measured peak"]
    (found,) = run.summary()["networks"]
    assert (found["best_peer"], found["of_peak"], found["megabytes"]) == ("ao-x86", 0.7, 12.0)
    page = tables.markdown([run])
    assert "Milliseconds per batch" in page
    assert "| ResNet-18, batch 8 | 12 | 12 | 12 |" in page
    assert run.extra_records() == []
    assert json.dumps(list(tables.records(run)))


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("command", ["conv", "cnn"])
def test_help(command: str) -> None:
    outcome = invoke(command, "--help")
    assert outcome.exit_code == 0
    assert "--json" in outcome.stdout
    assert "--smoke" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv", "--shapes", "x*"], "'x*' matches no shape"),
        (["conv", "--peers", "mkl"], "got 'mkl'"),
        (["conv", "--threads", "0"], "numbers of at least 1"),
        (["cnn", "--networks", "AlexNet"], "must be one of ResNet-18, ResNet-50"),
        (["cnn", "--batches", "0"], "numbers of at least 1"),
        (["cnn", "--peers", "onednn"], "got 'onednn'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_usage_is_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert message in " ".join(outcome.stderr.replace("│", " ").split())


def test_conv_writes_table_page_lines_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the torch peer and ours; a peer without its library is named."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    files = {name: tmp_path / f"a.{name}" for name in ("jsonl", "md", "png")}
    outcome = invoke(
        *("conv", "--shapes", "1x8x6x6-16k3,2x8x6x6-16k3", "--peers", "torchquant,fp32,openvino"),
        *("--threads", "1", "--rounds", "1", "--block", "0.001", "--no-progress"),
        *("--output", str(files["jsonl"]), "--markdown", str(files["md"])),
        *("--figure", str(files["png"])),
    )
    assert outcome.exit_code == 0, outcome.output
    assert "without openvino: not installed; pip install openvino onnx" in outcome.stderr
    assert "fp32's time over ours, geometric mean over 2 shapes" in outcome.stdout
    records = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    assert [record["kind"] for record in records] == ["run", "shape", "shape", "summary"]
    assert records[1]["us"].keys() == {"torchquant", "fp32"}
    assert records[0]["missing"].keys() == {"openvino"}
    assert records[1]["shape"] == "1x8x6x6-16k3"
    assert "| 1x8x6x6-16k3 |" in files["md"].read_text()
    assert files["png"].exists() or "matplotlib is not installed" in outcome.stderr


def test_conv_smoke_measures_a_curve_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "CONV_SMOKE_PEERS", (OURS,))
    outcome = invoke("conv", "--smoke", "--json", "--no-progress")
    assert outcome.exit_code == 0, outcome.output
    kinds = [record["kind"] for record in json.loads(outcome.stdout)]
    assert kinds == ["run", "shape", "shape", "shape", "curve", "summary"]


@needs_vision
def test_cnn_smoke_measures_time_and_memory() -> None:
    outcome = invoke("cnn", "--smoke", "--json", "--no-progress", "--peers", "torchquant")
    assert outcome.exit_code == 0, outcome.output
    header, case, summary = json.loads(outcome.stdout)
    assert header["isa"] != "-"
    assert case["us"].keys() == {"torchquant"}
    assert case["failures"] == {}
    assert summary["networks"][0]["ms"] > 0
