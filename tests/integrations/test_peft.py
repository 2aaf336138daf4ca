"""Adapters of peft on quantized and prepared layers: training, merging, saving."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import (
    MODELS,
    QUANTIZED,
    Net,
    add,
    batch,
    cosine,
    float_net,
    ia3,
    integers,
    lora,
    peft,
    prepared,
    quantized,
    readable_weight,
    static,
    train,
    trained,
)
from torch import nn

import torchquant
from torchquant.nn import QuantizedModule, TrainedModule

__all__ = ["readable_weight"]  # a fixture

CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "lora_bias": lambda: lora(lora_bias=True, target_modules=["q_proj"]),
    "rslora": lambda: lora(use_rslora=True, init_lora_weights="gaussian"),
    "dora": lambda: lora(use_dora=True),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "dropout": lambda: lora(lora_dropout=0.1),
    "ia3": ia3,
}
pytestmark = pytest.mark.usefixtures("readable_weight")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_adapters_train_on_frozen_integers(
    make: Callable[[], nn.Module], config: Callable[[], Any]
) -> None:
    model = make()
    before, bits = model(batch()), integers(model)
    adapted = add(model, config())
    prefixes = ("lora_", "ia3_")
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert names and all(any(prefix in n for prefix in prefixes) for n in names)
    losses = train(adapted)
    assert losses[-1] < losses[0]
    assert not torch.equal(adapted(batch()), before)
    with adapted.disable_adapter():
        assert torch.equal(adapted(batch()), before)
    assert integers(adapted).keys() == bits.keys()
    assert all(torch.equal(value, bits[key]) for key, value in integers(adapted).items())


@pytest.mark.parametrize("make", [quantized, static])
def test_gradients_are_those_of_the_float_layer_around_the_base(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(5)
    adapted = add(make(), lora(target_modules=["head"], init_lora_weights=False))
    layer = adapted.base_model.model.head
    x = torch.randn(4, 96)
    layer(x).sum().backward()
    ones = torch.ones(4, 64)
    scaling = layer.scaling["default"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(b.grad, scaling * ones.T @ (x @ a.T))
    torch.testing.assert_close(a.grad, scaling * (ones @ b).T @ x)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("make", QUANTIZED.values(), ids=QUANTIZED)
def test_merging_rounds_again_and_says_so(
    make: Callable[[], nn.Module], config: Callable[[], Any]
) -> None:
    adapted = trained(make(), config())
    wanted, bits = adapted(batch()), integers(adapted)
    with pytest.warns(UserWarning, match="rounds the weights to integers again"):
        adapted.merge_adapter()
    assert cosine(adapted(batch()), wanted) > 0.99
    assert any(not torch.equal(value, bits[key]) for key, value in integers(adapted).items())
    adapted.unmerge_adapter()
    assert all(torch.equal(value, bits[key]) for key, value in integers(adapted).items())
    assert torch.equal(adapted(batch()), wanted)
    with pytest.warns(UserWarning, match="rounds the weights to integers again"):
        plain = adapted.merge_and_unload()
    assert cosine(plain(batch()), wanted) > 0.99
    assert {type(m) for m in plain.children()} == {type(m) for m in make().children()}


def test_merged_integers_are_those_of_the_sum() -> None:
    """Dequantize, add, quantize: the bits of a layer that is quantized from the sum."""
    adapted = trained(quantized(), lora())
    layer = adapted.base_model.model.up
    total = layer.base_layer.to_float()
    total.weight.data += layer.get_delta_weight("default")
    wanted = type(layer.base_layer).from_float(total, layer.base_layer.config)
    with pytest.warns(UserWarning, match="rounds"):
        layer.merge()
    assert torch.equal(layer.base_layer(batch()), wanted(batch()))
    assert layer.merged_adapters == ["default"]


def test_a_static_layer_keeps_the_range_of_its_input() -> None:
    adapted = trained(static(), lora())
    layer = adapted.base_model.model.up.base_layer
    scale, zero_point = layer.input_scale.clone(), layer.input_zero_point.clone()
    with pytest.warns(UserWarning, match="rounds"):
        adapted.merge_adapter()
    assert torch.equal(layer.input_scale, scale)
    assert torch.equal(layer.input_zero_point, zero_point)


def test_to_float_first_merges_exactly() -> None:
    """The remedy that the warning names."""
    adapted = trained(quantized(), lora())
    torchquant.to_float_(adapted)
    wanted = adapted(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = adapted.merge_and_unload()
    torch.testing.assert_close(plain(batch()), wanted)


@pytest.mark.parametrize("config", [lora, ia3])
def test_a_layer_that_became_float_or_quantized_while_merged(config: Callable[[], Any]) -> None:
    adapted = trained(quantized(), config())
    wanted = adapted(batch())
    with pytest.warns(UserWarning, match="rounds"):
        adapted.merge_adapter()
    torchquant.to_float_(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.unmerge_adapter()
    assert cosine(adapted(batch()), wanted) > 0.999
    adapted.merge_adapter()
    torchquant.quantize_(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.unmerge_adapter()
    assert cosine(adapted(batch()), wanted) > 0.999


def test_a_merge_that_would_give_nan_changes_nothing() -> None:
    adapted = trained(quantized(), lora())
    layer = adapted.base_model.model.up
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    bits = integers(adapted)
    with pytest.raises(ValueError) as raised:
        layer.merge()
    assert str(raised.value) == (
        "merge: the merged weights must be finite, adapter 'default' makes some of them NaN or "
        "infinite; its training has diverged"
    )
    assert not layer.merged
    assert all(torch.equal(value, bits[key]) for key, value in integers(adapted).items())


def test_several_adapters() -> None:
    adapted = trained(quantized(), lora())
    first = adapted(batch())
    adapted.add_adapter("second", lora(r=4))
    adapted.set_adapter("second")
    train(adapted)
    second = adapted(batch())
    assert not torch.equal(first, second)
    adapted.set_adapter("default")
    assert torch.equal(adapted(batch()), first)
    with pytest.warns(UserWarning, match="rounds"):
        adapted.merge_adapter(["default", "second"])
    adapted.unmerge_adapter()
    assert torch.equal(adapted(batch()), first)
    mixed = adapted(batch(), adapter_names=["default"] * 4 + ["second"] * 4)
    adapted.set_adapter("second")
    torch.testing.assert_close(mixed, torch.cat([first[:4], adapted(batch())[4:]]))


@pytest.mark.parametrize("make", [quantized, static, prepared])
def test_adapters_are_saved_and_loaded(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    adapted = trained(make(), lora())
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 40_000, "adapters only"
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(again(batch()), adapted(batch()))


def test_the_whole_model_is_saved_and_loaded(tmp_path: Path) -> None:
    adapted = trained(quantized(), lora())
    torchquant.save(adapted, tmp_path / "model.safetensors")
    other = torchquant.load(tmp_path / "model.safetensors", add(float_net(), lora())).eval()
    assert torch.equal(other(batch()), adapted(batch()))


def test_copies_and_pickles_of_a_merged_model_can_be_unmerged() -> None:
    adapted = trained(quantized(), lora())
    wanted = adapted(batch())
    with pytest.warns(UserWarning, match="rounds"):
        adapted.merge_adapter()
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(other(batch()), adapted(batch()))
        other.unmerge_adapter()
        assert torch.equal(other(batch()), wanted)


@pytest.mark.parametrize("config", [lora, ia3])
def test_adapters_first_and_quantized_afterwards(config: Callable[[], Any]) -> None:
    adapted = trained(float_net(), config())
    wanted = adapted(batch())
    torchquant.quantize_(adapted, filter_fn=lambda module, name: "lora_" not in name)
    assert isinstance(adapted.base_model.model.up.base_layer, QuantizedModule)
    assert cosine(adapted(batch()), wanted) > 0.999
    losses = train(adapted)
    assert losses[-1] < losses[0]
    wanted, bits = adapted(batch()), integers(adapted)
    with pytest.warns(UserWarning, match="rounds"):
        adapted.merge_adapter()
    assert cosine(adapted(batch()), wanted) > 0.999
    adapted.unmerge_adapter()
    assert all(torch.equal(value, bits[key]) for key, value in integers(adapted).items())
    with pytest.warns(UserWarning, match="rounds"):
        plain = adapted.merge_and_unload()
    assert cosine(plain(batch()), wanted) > 0.999


def test_a_prepared_layer_merges_into_its_float_weight_and_converts_exactly() -> None:
    adapted = trained(prepared(), lora())
    wanted = adapted(batch())
    layer = adapted.base_model.model.up
    sum_of_both = layer.base_layer.weight + layer.get_delta_weight("default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = adapted.merge_and_unload()
    assert isinstance(plain.up, TrainedModule)
    torch.testing.assert_close(plain.up.weight, sum_of_both)
    assert cosine(plain(batch()), wanted) > 0.999
    before = copy.deepcopy(plain)
    torchquant.convert_(plain)
    assert torchquant.verify(before, plain, [batch()]).exact


def test_adapters_on_prepared_layers_survive_the_conversion() -> None:
    adapted = add(prepared(), lora())
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("base_layer" in name or "lora_" in name)
    losses = train(adapted, rate=0.05)
    assert losses[-1] < losses[0]
    before = copy.deepcopy(adapted)
    torchquant.convert_(adapted)
    assert torchquant.verify(before, adapted, [batch()]).exact
    assert torch.equal(adapted(batch()), before(batch()))


@pytest.mark.parametrize("make", [quantized, prepared])
def test_modules_to_save_train_in_float(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    before = model(batch())
    config = lora(target_modules=["q_proj"], modules_to_save=["head"])
    adapted = add(model, config)
    copied = adapted.base_model.model.head.modules_to_save["default"]
    assert not isinstance(copied, QuantizedModule)
    assert copied.weight.requires_grad
    train(adapted)
    assert copied.weight.grad is None and not torch.equal(adapted(batch()), before)
    with adapted.disable_adapter():
        assert torch.equal(adapted(batch()), before)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(again(batch()), adapted(batch()))


def test_modules_to_save_that_hold_quantized_layers() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classifier = Net(), nn.Sequential(nn.Linear(64, 64), nn.Tanh())

        def forward(self, x: Any) -> Any:
            return self.classifier(self.body(x))

    model = Outer().eval()
    torchquant.quantize_(model, fusion=torchquant.Fusion(activations=False))
    adapted = add(model, lora(modules_to_save=["classifier"]))
    wrapper = adapted.base_model.model.classifier
    assert type(wrapper.modules_to_save["default"][0]) is nn.Linear
    assert isinstance(wrapper.original_module[0], QuantizedModule)
    weight = wrapper.modules_to_save["default"][0].weight.clone()
    train(adapted)
    assert not torch.equal(wrapper.modules_to_save["default"][0].weight, weight)


@pytest.mark.parametrize("make", [quantized, prepared])
def test_all_linear_includes_the_layers(make: Callable[[], nn.Module]) -> None:
    model = make()
    model.extra = nn.Linear(64, 64)
    adapted = add(model, lora(target_modules="all-linear"))
    names = {n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert names == {"q_proj", "up", "head", "extra"}
    adapted.add_adapter("second", lora(target_modules="all-linear"))
    assert adapted.peft_config["second"].target_modules == names


def test_inject_adapter_in_model() -> None:
    model = quantized()
    before = model(batch())
    peft.inject_adapter_in_model(lora(init_lora_weights=False), model)
    assert isinstance(model.up.base_layer, QuantizedModule)
    assert not torch.equal(model(batch()), before)


def test_gradient_checkpointing_and_kbit_preparation() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    torchquant.quantize_(model, fusion=torchquant.Fusion(activations=False))
    model = peft.prepare_model_for_kbit_training(model)
    model.gradient_checkpointing_enable()
    adapted = peft.get_peft_model(model, lora(target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = torch.arange(12).reshape(2, 6)
    adapted.train()(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert len(gradients) == 2 * 2 * 7
    assert all(g is not None for g in gradients)
    assert "lm_head" not in adapted.peft_config["default"].target_modules


def test_lora_on_an_embedding_that_is_quantized_afterwards() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64))
    adapted = add(model, lora(target_modules=["0"]))
    x = torch.arange(100)
    before = adapted(x)
    report = torchquant.quantize_(adapted, torchquant.Int8WeightOnlyConfig())
    assert len(report.quantized) == 2
    assert cosine(adapted(x), before) > 0.999
    train_on(adapted, x)


def train_on(adapted: nn.Module, x: torch.Tensor) -> None:
    before, optimizer = (
        adapted(x),
        torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0),
    )
    adapted(x).sum().backward()
    optimizer.step()
    assert not torch.equal(adapted(x), before)


def test_lora_on_an_embedding_beside_quantized_layers() -> None:
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 64))
    torchquant.quantize_(model)
    adapted = add(model, lora(target_modules=["0", "1"]))
    x = torch.arange(16)
    before = adapted(x)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(x).sum().backward()
        optimizer.step()
    wanted = adapted(x)
    assert not torch.equal(wanted, before)
    with pytest.warns(UserWarning, match="rounds"):
        plain = adapted.merge_and_unload()
    assert cosine(plain(x), wanted) > 0.999
