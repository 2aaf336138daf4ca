"""The report of a compression: its summary, its rows and its data."""

import json

import torch
from support.compressed_models import decoder, tokens
from torch import nn

import torchquant
from torchquant.algorithms.compression_report import (
    CompressedLayer,
    CompressionReport,
    compressed_layer,
)
from torchquant.algorithms.found import Found


def test_a_report_of_a_model() -> None:
    model = decoder(1)
    model.scale = nn.Parameter(torch.ones(3, 4, 5))
    config = torchquant.IntxWeightOnlyConfig(4, group_size=32)
    report = torchquant.gptq_(model, config, tokens(2), filter_fn="!head", progress=False)
    assert report.summary().startswith("6 compressed, 1 rounded, 2 left; ")
    assert "of the squared error of rounding is left; model " in report.summary()
    assert "norm" not in [row.name.rpartition(".")[2] for row in report], "norms have no integers"
    assert report["(model)"].action == "left"
    assert report["(model)"].reason.endswith("no integer path yet: scale")
    row = report["layers.0.q"]
    assert row.reason == f"error {row.nearest_error:.1e} to {row.error:.1e}"
    assert row.inputs == 2 * 4 * 24
    lines = str(report).splitlines()
    assert any("layers.0.q" in line and "compressed: error" in line for line in lines)
    data = json.loads(report.to_json())
    assert data["report"] == "CompressionReport"
    assert data["quantization"]["report" if "report" in data["quantization"] else "action"]


def test_a_summary_without_measured_errors_or_sizes() -> None:
    row = CompressedLayer("fc", "Linear", "rounded", "saw 3 inputs")
    assert CompressionReport((row,)).summary() == "0 compressed, 1 rounded, 0 left"
    assert repr(CompressionReport((row,))) == (
        "<CompressionReport: 0 compressed, 1 rounded, 0 left>"
    )


def test_a_list_of_reasons_says_how_far_the_damping_rose() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(100, 1).expand(100, 64).contiguous()  # all inputs are equal: rank 1
    report = torchquant.gptq_(
        model, torchquant.IntxWeightOnlyConfig(4, group_size=32), [x], damping=0.0, progress=False
    )
    assert report["0"].action == "compressed"
    assert "; damping raised to " in report["0"].reason


def test_errors_that_are_not_finite_are_said_in_words() -> None:
    nan = float("nan")
    row = compressed_layer("fc", "Linear", Found(None, "rounded", "overflow", nan, nan, 7), "tied")
    assert (row.nearest_error, row.error, row.inputs) == (0.0, 0.0, 7)
    assert row.reason == "overflow; its errors are not finite; tied"
