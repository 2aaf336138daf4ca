"""quantize_ and prepare_qat_: parameters that are being trained as adapters stay in float."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.layers import outcome
from torch import Tensor, nn

from torchquant import QuantizationReport, prepare_qat_, quantize_
from torchquant.nn import QATLinear, QuantizedLinear

Verb = Callable[..., QuantizationReport]
BOTH: tuple[Verb, ...] = (quantize_, prepare_qat_)
TRAINED = (
    "skipped: is being trained (requires_grad) while the other layers are frozen; quantize it with "
    "a filter_fn that selects only such layers"
)
ADAPTER = (
    "skipped: an adapter{}; merge it into its layer, or quantize it with a filter_fn that selects "
    "only such layers"
)


class Lora(nn.Module):
    """LoRA as people write it themselves."""

    def __init__(self, base: nn.Linear, rank: int = 16) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("verb", BOTH)
@pytest.mark.parametrize(
    "chosen",
    [
        None,
        lambda module, name: True,
        lambda module, name: name != "head",
        lambda module, name: name.startswith("0"),
        "0.*",
        "!head",
    ],
    ids=["none", "all", "but one", "prefix", "pattern", "exclusion"],
)
def test_an_adapter_is_not_quantized_unasked(verb: Verb, chosen: Any) -> None:
    model = nn.Sequential(Lora(nn.Linear(256, 256)), nn.ReLU())
    if chosen == "!head":
        model.add_module("head", nn.Linear(256, 256).requires_grad_(False))
    before = trainable(model)
    report = verb(model, filter_fn=chosen)
    assert outcome(report)["0.down"] == outcome(report)["0.up"] == TRAINED
    assert report["0.base"].action in ("quantized", "prepared")
    assert trainable(model) == before, "16 x 256 weights twice"
    assert trainable(model) == 2 * 16 * 256
    model[0](torch.randn(2, 256)).sum().backward()
    assert model[0].down.weight.grad is not None


@pytest.mark.parametrize("verb", BOTH)
@pytest.mark.parametrize(
    "chosen",
    [lambda module, name: name in ("0.down", "0.up"), ["*.down", "*.up"], "0.[du]*"],
    ids=["function", "patterns", "glob"],
)
def test_an_adapter_that_is_asked_for_is_quantized(verb: Verb, chosen: Any) -> None:
    model = nn.Sequential(Lora(nn.Linear(256, 256)))
    report = verb(model, filter_fn=chosen, strict=True)
    assert [row.name for row in report.changed] == ["0.down", "0.up"]


def test_one_pattern_of_several_may_ask_for_an_adapter() -> None:
    report = quantize_(nn.Sequential(Lora(nn.Linear(256, 256))), filter_fn=["*", "*.down"])
    assert [row.name for row in report.changed] == ["0.base", "0.down"]


def test_a_configuration_under_its_full_name_asks_for_an_adapter() -> None:
    from torchquant import Int8DynamicActivationInt8WeightConfig as Config

    model = nn.Sequential(Lora(nn.Linear(256, 256)))
    report = quantize_(model, {"0.down": Config(), "*": Config()})
    assert [row.name for row in report.changed] == ["0.base", "0.down"]


@pytest.mark.parametrize(
    "freeze",
    [
        lambda model: None,
        lambda model: model.requires_grad_(False),
        lambda model: model[0].requires_grad_(False),  # the first layers of a fine-tuned model
        lambda model: model[3].requires_grad_(False),  # an embedding, however large
    ],
    ids=["all trained", "all frozen", "first layer frozen", "embedding frozen"],
)
def test_other_models_are_quantized_as_a_whole(freeze: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Embedding(5000, 64))
    freeze(model)
    assert [row.name for row in quantize_(model).quantized] == ["0", "1", "2"]


def test_a_quantized_base_counts_as_frozen() -> None:
    model = nn.Sequential(nn.Linear(256, 256).requires_grad_(False))
    quantize_(model)
    model.add_module("adapter", nn.Linear(256, 16))
    assert outcome(quantize_(model))["adapter"] == TRAINED


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_can_be_quantized_in_several_calls(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=bias), nn.Linear(256, 16, bias=bias))
    quantize_(model, filter_fn="0")
    assert outcome(quantize_(model))["1"] == "quantized"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.top = nn.Linear(512, 512), nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.top(self.q_proj(x))
        return y


@pytest.mark.parametrize("verb", BOTH)
@pytest.mark.parametrize("training", [True, False])
def test_adapters_of_peft(verb: Verb, training: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, target_modules=["q_proj"], modules_to_save=["top"])
    model = peft.get_peft_model(Net(), config)
    if not training:
        model.requires_grad_(False)
    before = trainable(model)
    names = "base_model.model.q_proj.lora_A.default", "base_model.model.q_proj.lora_B.default"
    report = verb(model)
    reason = ADAPTER.format(" that is being trained" if training else "")
    for name in (*names, "base_model.model.top.modules_to_save.default"):
        assert outcome(report)[name] == reason
    assert trainable(model) == before
    changed = {row.name for row in report.changed}
    assert changed == {
        "base_model.model.q_proj.base_layer",
        "base_model.model.top.original_module",
    }


@pytest.mark.parametrize("selected", ["*lora_A*", lambda module, name: "lora_A" in name])
def test_an_adapter_of_peft_that_is_asked_for(selected: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=16, target_modules=["q_proj"]))
    report = quantize_(model, filter_fn=selected, strict=True)
    assert [row.name.rpartition("q_proj.")[2] for row in report.changed] == ["lora_A.default"]
    assert isinstance(model.base_model.model.q_proj.lora_A.default, (QuantizedLinear, QATLinear))
