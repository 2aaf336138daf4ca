"""The report: on a screen, in a notebook, as data, and as an object that is not the model."""

import copy
import dataclasses
import json
import pickle
from html.parser import HTMLParser

import pytest
from support.float_models import Classifier
from torch import nn

from torchquant import (
    LayerReport,
    QuantizationReport,
    Report,
    RowReport,
    convert_,
    prepare_qat_,
    quantize_,
)
from torchquant.report import human_bytes, percent, size_change


def big() -> nn.Module:
    """300 linear layers and 80 norms in 40 blocks."""
    names = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    layers = nn.ModuleList()
    for _ in range(40):
        attention = nn.ModuleDict({name: nn.Linear(64, 64) for name in names[:4]})
        mlp = nn.ModuleDict({name: nn.Linear(64, 64) for name in names[4:]})
        parts = {"self_attn": attention, "mlp": mlp, "input_norm": nn.LayerNorm(64)}
        layers.append(nn.ModuleDict({**parts, "other_norm": nn.LayerNorm(64)}))
    more = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))
    inner = {"layers": layers, "more": more, "embed_tokens": nn.Embedding(1000, 64)}
    return nn.ModuleDict({"model": nn.ModuleDict(inner)})


def test_300_layers_fit_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    report = quantize_(big())
    assert len(report.quantized) == 300
    for width in (80, 110, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        text = str(report)
        assert len(text.splitlines()) <= 24
        assert max(map(len, text.splitlines())) <= width
        assert text.count("quantized (40)") == 7
        assert text.count("quantized (20)") == 1
        assert text.count("float (80): LayerNorm") == 1
        total = sum(row.bytes_after for row in report.layers[:280:7])
        assert text.count(human_bytes(total)) >= 7, "the sum of 40 layers, uncut"
    assert "model.layers.{0..39}.self_attn.q_proj" in text


def test_repr_is_one_short_line() -> None:
    text = repr(quantize_(big()))
    assert text.startswith("<QuantizationReport: 300 quantized (94 % of parameters), 0 skipped; ")
    assert text.endswith("x smaller)>")
    assert "\n" not in text and len(text) < 200


class Cells(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html() -> None:
    model = nn.ModuleDict({"<b>&amp;": nn.Linear(64, 64), "e": nn.Embedding(9, 4)})
    report = quantize_(model, filter_fn=["<b>*", "typo"])
    texts = Cells(report._repr_html_()).texts
    assert texts[:6] == ["layer", "weight", "before", "after", "share", "result"]
    assert texts[6:12] == ["<b>&amp;", "64 x 64", "16.25 KiB", "5.00 KiB", ">99 %", "quantized"]
    assert report.summary() in texts
    assert set(report.notes) <= set(texts)


def rebuilt(data: dict[str, object]) -> QuantizationReport:
    """The report from its JSON; fails if a field is missing or unknown."""

    def row(item: dict[str, object]) -> LayerReport:
        return LayerReport(**{**item, "shape": tuple(item["shape"])})  # type: ignore[arg-type]

    fields = {key: value for key, value in data.items() if key not in ("report", "summary")}
    for name in ("layers", "others"):
        fields[name] = tuple(row(item) for item in fields[name])  # type: ignore[union-attr, attr-defined]
    for name in ("notes", "fusions", "regions"):
        fields[name] = tuple(fields[name])  # type: ignore[arg-type]
    return QuantizationReport(**fields)  # type: ignore[arg-type]


def test_everything_is_in_the_json() -> None:
    model = nn.ModuleList([Classifier(), nn.Linear(64, 64)])
    for report in (quantize_(copy.deepcopy(model)), prepare_qat_(model), convert_(model)):
        data = json.loads(report.to_json())
        assert data == report.to_dict()
        assert data["summary"] == report.summary()
        assert len(data["fusions"]) == len(report.fusions)
        data["fusions"] = []
        assert rebuilt(data) == dataclasses.replace(report, fusions=())


def test_a_report_is_a_collection_of_rows() -> None:
    report = quantize_(Classifier())
    assert len(report) == len([*report]) == len(report.layers) + len(report.others)
    assert report["embedding"].action == "float"
    assert report["blocks.1.mlp.up"] is report.layers[2]
    assert "head" in report and "blocks" not in report
    with pytest.raises(KeyError, match="the report has no row with the name 'blocks'"):
        report["blocks"]
    assert bool(quantize_(nn.Sequential())) is True


def test_a_report_is_not_the_model() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model_or_report = prepare_qat_(model)
    with pytest.raises(TypeError, match="Report is not the model and cannot be called"):
        model_or_report(None)  # type: ignore[operator]
    with pytest.raises(AttributeError, match=r"no attribute 'eval'; .* use the model that you"):
        model_or_report.eval()  # type: ignore[attr-defined]
    assert not hasattr(model_or_report, "state_dict")


def test_a_report_can_be_copied_and_pickled() -> None:
    report = quantize_(Classifier())
    assert copy.deepcopy(report) == report
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_model_that_grows_is_said_to_grow() -> None:
    model = nn.Sequential(nn.Linear(4, 4))  # its integers are padded to 16 x 64
    report = quantize_(model, filter_fn="0")
    assert report.bytes_after > report.bytes_before
    ratio = report.bytes_after / report.bytes_before
    assert report.summary().endswith(f"({ratio:.2f}x larger)")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (399, 465, "1.17x larger"),
        (465, 399, "1.17x smaller"),
        (1000, 1001, "same size"),
        (0, 0, "same size"),
        (8, 8, "same size"),
    ],
)
def test_words_for_sizes(before: int, after: int, words: str) -> None:
    assert size_change(before, after) == words


def test_words_for_shares() -> None:
    shares = [percent(part, 1000) for part in (0, 1, 9, 10, 500, 990, 991, 1000)]
    assert shares == ["0 %", "<1 %", "<1 %", "1 %", "50 %", "99 %", ">99 %", "100 %"]
    assert percent(0, 0) == "0 %"


@dataclasses.dataclass(frozen=True, repr=False)
class Replaced(Report):
    """A report of another verb, with the base's columns."""

    rows: tuple[RowReport, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        return f"{len(self.rows)} norms"


def test_another_verb_uses_the_same_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [RowReport(f"h.{i}.norm", "RMSNorm", "replaced", "") for i in range(12)]
    odd = RowReport("odd", "GatedNorm", "left", "mean(x^2) of 2 probes differs by 0.5")
    report = Replaced((*rows, odd), ("A note.",))
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert [line for line in lines if line and "─" not in line] == [
        "name class result",
        "h.{0..11}.norm RMSNorm replaced (12)",
        "odd GatedNorm left: mean(x^2) of 2 probes differs by 0.5",
        "13 norms",
        "A note.",
    ]
    assert report["odd"].unchanged and not report["h.3.norm"].unchanged
    assert json.loads(report.to_json())["rows"][-1] == dataclasses.asdict(odd)
    assert repr(report) == "<Replaced: 13 norms>"
