"""The report: its table at any width, its counts, and its numbers of bytes."""

import io

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from torchquant import (
    FusionReport,
    IntxWeightOnlyConfig,
    LayerReport,
    QuantizationReport,
    quantize_,
)
from torchquant.report import human_bytes, percent


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)),
            "attention": nn.MultiheadAttention(128, 4),
            "head": nn.Linear(128, 10),
            "a_layer_with_quite_a_long_name[red]": nn.Linear(64, 64),
            ":smile:": nn.Linear(64, 64),
        }
    )


@pytest.fixture
def report() -> QuantizationReport:
    return quantize_(model())


def printed(report: QuantizationReport, width: int, color: bool = False) -> str:
    file = io.StringIO()
    system = "standard" if color else None
    Console(file=file, width=width, color_system=system, force_terminal=color).print(report)
    return file.getvalue()


def test_str_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    report = quantize_(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    rule = next(line for line in lines if set(line) == {"─"})
    assert [line for line in lines if line and line != rule] == [
        "layer weight before after share result",
        "0 256 x 64 65.00 KiB 20.00 KiB 87 % quantized",
        "2 10 x 256 10.04 KiB 10.04 KiB 13 % skipped: too small to benefit",
        "1 quantized (87 % of parameters), 1 skipped; 13 % stay in float: linear layers 13 %; "
        "model 75.04 KiB -> 30.04",
        "KiB (2.50x smaller)",
        "fused: 0 with 1 (relu)",
    ]
    assert not any(line != line.rstrip() for line in str(report).splitlines())


@pytest.mark.parametrize("width", [20, 30, 40, 60, 71, 72, 80, 100, 110, 160, 300])
def test_all_text_is_printed_at_any_width(report: QuantizationReport, width: int) -> None:
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    if width >= 72:  # a table: a word may be folded within its column, and columns may be left out
        titles = text.split("\n")[1].split()
        for layer in report.layers:
            assert human_bytes(layer.bytes_after) in text
            if "before" in titles:
                assert human_bytes(layer.bytes_before) in text
            if "weight" in titles:
                assert " x ".join(map(str, layer.shape)) in text
        assert ("before" in titles, "weight" in titles) == (width >= 100, width >= 110)
    else:
        together = "".join(text.split())
        for layer in report.layers:
            row = (
                f"{layer.name}{layer.shape[0]}x{layer.shape[1]},"
                f"{human_bytes(layer.bytes_before)}->{human_bytes(layer.bytes_after)},"
                f"{percent(layer.parameters, report.parameters)},{layer.action}"
            )
            assert "".join(row.split()) in together
    assert "".join(report.summary().split()) in "".join(text.split())


def test_a_table_that_just_fits_loses_no_text() -> None:
    embedding, head = nn.Embedding(300, 64), nn.Linear(64, 300, bias=False)
    head.weight = embedding.weight
    tied = nn.ModuleDict({"embedding_of_a_long_name": embedding, "fc": head})
    report = quantize_(tied, IntxWeightOnlyConfig(4, group_size=32))
    for width in range(72, 170):
        words = printed(report, width).split("\n\n")[0].split()
        for row in report.layers:
            assert all(words.count(word) >= 1 for word in row.reason.split()), width


def test_the_table_has_the_width_of_the_terminal(
    report: QuantizationReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (50, 90, 150):
        monkeypatch.setenv("COLUMNS", str(width))
        assert 0.6 * width < max(map(len, str(report).splitlines())) <= width


def test_names_are_not_interpreted_as_markup(report: QuantizationReport) -> None:
    for width in (60, 300):
        text = printed(report, width, color=True)
        assert "a_layer_with_quite_a_long_name[red]" in text
        assert ":smile:" in text


def test_counts(report: QuantizationReport) -> None:
    assert len(report.layers) == 9
    assert [layer.name for layer in report.quantized] == [
        "encoder.0",
        "encoder.2",
        *(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
        "a_layer_with_quite_a_long_name[red]",
        ":smile:",
    ]
    assert [(layer.name, layer.kind) for layer in report.skipped] == [("head", "Linear")]
    assert report.summary().startswith(
        "8 quantized (>99 % of parameters), 1 skipped; <1 % stay in float: linear layers <1 %; "
        "model "
    )


def memory(module: nn.Module) -> int:
    """The bytes of the storages of its tensors."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_the_memory_of_the_tensors(dtype: torch.dtype) -> None:
    net = model().to(dtype)
    net["tied"] = nn.Embedding(64, 64, _weight=net[":smile:"].weight)
    before = {name: memory(module) for name, module in net.named_modules()}
    report = quantize_(net)
    after = {name: memory(module) for name, module in net.named_modules()}
    assert (report.bytes_before, report.bytes_after) == (before[""], after[""])
    parts = [layer for layer in report.layers if layer.name.startswith("attention.")]
    assert sum(layer.bytes_before for layer in parts) == before["attention"]
    assert sum(layer.bytes_after for layer in parts) == after["attention"]
    for layer in set(report.layers) - set(parts):  # three of the parts share their memory
        assert (layer.bytes_before, layer.bytes_after) == (before[layer.name], after[layer.name])
    for layer in report.layers:
        assert (layer.action == "quantized") == (layer.bytes_after < layer.bytes_before)


def test_notes_and_an_empty_report() -> None:
    text = str(quantize_(nn.Sequential(nn.ReLU())))
    assert text.splitlines() == [
        "0 quantized, 0 skipped; model 0 B -> 0 B (same size)",
        "The model has no linear, conv1d or conv2d layers; there was nothing to quantize.",
    ]


def test_fusions_that_differ_only_in_numbers_share_a_line() -> None:
    fusions = tuple(
        FusionReport("activation", (f"layers.{i}.fc1",), f"layers.{i}.act2 (gelu)", "fused", "")
        for i in (0, 1, 12)
    )
    alone = FusionReport("activation", ("head.1",), "", "not fused", "a reason")
    report = QuantizationReport((), 0, 0, ("A note.",), (*fusions, alone))
    assert str(report).splitlines() == [
        "0 quantized, 0 skipped; model 0 B -> 0 B (same size)",
        "fused: layers.{0,1,12}.fc1 with layers.{0,1,12}.act2 (gelu) (3 times)",
        "not fused: head.1: a reason",
        "A note.",
    ]


def test_a_report_is_a_value() -> None:
    row = LayerReport("a", "Linear", "quantized", "", (4, 4), 80, 40)
    report = QuantizationReport((row,), 80, 40)
    assert report == QuantizationReport((row,), 80, 40)
    assert hash(report) == hash(QuantizationReport((row,), 80, 40))
    with pytest.raises(AttributeError):
        report.bytes_after = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20, "1.00 MiB"),
        (5 * 2**30, "5.00 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (5000 * 2**40, "5000.00 TiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text
