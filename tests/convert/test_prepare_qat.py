"""prepare_qat_: the layers that it prepares and those that stay in float."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.float_models import Subclass, with_nan
from support.layers import outcome, unchanged
from support.qat_models import CONFIGS, LEARNED, STATIC, Classifier, tokens, train, two_layers
from torch import Tensor, nn

from torchquant import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    IntxActivationIntxWeightConfig,
    QATConfig,
    TrainingConfig,
    convert_,
    prepare_qat_,
    qat,
    to_float_,
    verify,
)
from torchquant.configs import Static
from torchquant.nn import Activation, QATLinear, QuantizedLinear, QuantizedModule
from torchquant.training.layer_part import LayerPart


def joins(config: TrainingConfig) -> bool:
    """Static activations let a small layer take part in a chain."""
    return isinstance(config.deployed().activations, Static)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_prepare_train_convert(config: TrainingConfig) -> None:
    model = Classifier()
    report = prepare_qat_(model, config)
    assert outcome(report) == {
        "blocks.0.up": "prepared",
        "blocks.0.down": "prepared",
        "blocks.1.up": "prepared",
        "blocks.1.down": "prepared",
        "head": "prepared" if joins(config) else "skipped: too small to benefit",
    }
    assert len(report.changed) == 4 + joins(config)
    assert not report.quantized
    assert all(m.config == config for m in model.modules() if isinstance(m, QATLinear))
    train(model)
    trained = copy.deepcopy(model)
    converted = convert_(model)
    assert outcome(converted) == {
        "blocks.0.up": "converted",
        "blocks.0.down": "converted",
        "blocks.1.up": "converted",
        "blocks.1.down": "converted",
        "head": "converted" if joins(config) else "skipped: not prepared",
    }
    assert converted.bytes_after < 0.5 * converted.bytes_before
    layers = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    assert [layer.config for layer in layers] == [config.deployed()] * (4 + joins(config))
    with torch.no_grad():
        assert_same_bits(model(tokens(9)), trained(tokens(9)))
    assert verify(trained, model, [tokens(9)]).exact


@pytest.mark.parametrize(
    ("config", "training"),
    [
        (None, QATConfig()),
        (Int8DynamicActivationInt8WeightConfig(), QATConfig()),
        (
            Int8DynamicActivationInt8WeightConfig(
                activation_symmetric=True, weight_symmetric=False
            ),
            QATConfig(activation_symmetric=True, weight_symmetric=False),
        ),
        (Int8StaticActivationInt8WeightConfig(), STATIC),
        (
            IntxActivationIntxWeightConfig(weight_bits=3, activation_bits=6, static=True),
            QATConfig(weight_bits=3, activation_bits=6, activations="static"),
        ),
        (IntxActivationIntxWeightConfig(weight_bits=8), QATConfig()),
    ],
    ids=["none", "dynamic", "asymmetric", "static", "intx", "intx8"],
)
def test_a_configuration_to_deploy_determines_the_training(
    config: Any, training: TrainingConfig
) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    prepare_qat_(model, config)
    assert model[0].config == training


def test_parameters_stay_the_same_objects() -> None:
    model = Classifier()
    before = dict(model.named_parameters())
    prepare_qat_(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_an_existing_optimizer_trains_the_prepared_model() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare_qat_(model)
    before = model[0].weight.detach().clone()
    model(floats(4, 64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_modes_are_kept(training: bool, requires_grad: bool) -> None:
    model = Classifier().train(training).requires_grad_(requires_grad)
    prepare_qat_(model, STATIC)
    assert all(module.training is training for module in model.modules())
    assert all(p.requires_grad is requires_grad for p in model.parameters())
    qat.observe_(model)
    model.train()(tokens())
    model.train(training)
    convert_(model)
    assert all(module.training is training for module in model.modules())
    assert all(p.requires_grad is requires_grad for p in model.parameters())


def test_hooks_are_kept_and_can_still_be_removed() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    calls: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        model[0].register_forward_hook(lambda *_: calls.append("after")),
        model[0].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    x = floats(2, 64).requires_grad_()
    for change in (prepare_qat_, convert_, to_float_):
        change(model)
        model(x).sum().backward()
        assert calls == ["before", "after", "backward"]
        calls.clear()
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert calls == []


def test_a_layer_registered_twice_is_one_layer() -> None:
    linear = nn.Linear(64, 64)
    model = nn.ModuleDict({"first": linear, "deep": nn.Sequential(nn.ReLU(), linear)})
    assert outcome(prepare_qat_(model)) == {"first": "prepared: also at deep.1"}
    assert isinstance(model["first"], QATLinear)
    assert model["first"] is model["deep"][1]
    assert outcome(convert_(model)) == {"first": "converted: also at deep.1"}
    assert isinstance(model["first"], QuantizedLinear)
    assert model["first"] is model["deep"][1]


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(tokens)))
        return logits


def test_a_tied_head_is_trained_tied_and_converted_untied() -> None:
    model = LanguageModel()
    report = prepare_qat_(model, filter_fn=lambda module, name: True)
    assert report.notes == (
        "Shares its weight with another module during training, and gets its own integers in "
        "convert_: head.",
    )
    assert model.head.weight is model.embedding.weight
    train(model)
    assert model.head.weight is model.embedding.weight
    trained = copy.deepcopy(model)
    report = convert_(model)
    assert outcome(report) == {
        "body": "converted",
        "head": "converted: untied from embedding.weight",
    }
    assert report.notes == (
        "Has its own integer copy of a shared weight, which training does not change: head.",
    )
    assert torch.equal(model.embedding.weight, trained.embedding.weight)
    assert verify(trained, model, [tokens()]).exact


def test_two_layers_that_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    prepare_qat_(model)
    assert model[0].weight is model[1].weight
    model(floats(4, 64)).sum().backward()
    convert_(model)
    assert torch.equal(model[0].qweight, model[1].qweight)


@pytest.mark.parametrize("config", [CONFIGS["w8a8_static"], *LEARNED.values()], ids=str)
def test_observers_and_quantizers_have_the_name_of_the_layer(config: TrainingConfig) -> None:
    model = Classifier()
    prepare_qat_(model, config)
    parts = [(name, m) for name, m in model.named_modules() if isinstance(m, LayerPart)]
    assert parts
    for path, module in parts:
        assert path.startswith(f"{module.layer_name}.")
        assert isinstance(model.get_submodule(module.layer_name), QATLinear)


def test_a_module_inside_a_prepared_layer_keeps_its_own_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``Activation.name`` is the name of a function, not a name for messages."""
    from_float = QATLinear.from_float

    def with_activation(*args: Any, **kwargs: Any) -> QATLinear:
        layer = from_float(*args, **kwargs)
        layer.epilogue = Activation("gelu")
        return layer

    monkeypatch.setattr(QATLinear, "from_float", with_activation)
    model = nn.Sequential(nn.Linear(64, 64))
    prepare_qat_(model, STATIC)
    assert model[0].epilogue.name == "gelu"
    assert_same_bits(model[0].epilogue(torch.ones(1)), Activation("gelu")(torch.ones(1)))


def test_a_warning_about_nan_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    prepare_qat_(model, STATIC)
    x = floats(4, 64)
    x[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="of 0: 1 values were NaN"):
        model(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_low_precision(dtype: torch.dtype) -> None:
    model = two_layers().to(dtype)
    before = model(floats(4, 64, dtype=dtype))
    report = prepare_qat_(model)
    assert outcome(report) == {"0": "prepared", "2": "prepared"}
    x = floats(4, 64, dtype=dtype)
    after = model(x)
    assert after.dtype == dtype
    assert torch.nn.functional.cosine_similarity(before.float(), after.float()).min() > 0.99
    after.float().square().mean().backward()
    trained = copy.deepcopy(model)
    convert_(model)
    assert verify(trained, model, [x]).exact


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (
        lambda: Subclass(64, 64),
        "Subclass (subclass of nn.Linear: it does not compute x @ weight.T + bias)",
    ),
    "nan": (with_nan, "its weight holds NaN or infinity; check the checkpoint"),
    "meta": (
        lambda: nn.Linear(64, 64, device="meta"),
        "on the meta device, without values; load its weights first",
    ),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_prepared_is_reported(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"good": nn.Linear(64, 64), "bad": make()})
    kept = model["bad"]
    with unchanged(model), pytest.raises(ValueError) as raised:
        prepare_qat_(model, strict=True)
    assert str(raised.value) == (
        "prepare_qat_: with strict=True every selected layer must be quantizable, got 1 that "
        f"cannot be quantized (bad: {reason}); exclude them with filter_fn, or pass strict=False "
        "to leave them in float"
    )
    report = prepare_qat_(model)
    assert outcome(report) == {"good": "prepared", "bad": f"skipped: {reason}"}
    assert model["bad"] is kept


def test_filters_give_layers_with_different_numbers_of_bits() -> None:
    model = Classifier()
    head, rest = QATConfig(), QATConfig(weight_bits=4)
    prepare_qat_(model, head, lambda module, name: name == "head")
    report = prepare_qat_(model, rest)
    assert outcome(report)["head"] == "skipped: already prepared, with another configuration"
    assert outcome(prepare_qat_(model, rest))["blocks.0.up"] == "skipped: already prepared"
    assert model.head.config == head
    assert model.blocks[1].down.config == rest


def test_an_error_halfway_does_not_change_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from_float = QATLinear.from_float
    calls: list[nn.Linear] = []

    def fail_at_third(linear: nn.Linear, *args: Any, **kwargs: Any) -> QATLinear:
        calls.append(linear)
        if len(calls) == 3:
            raise MemoryError("no more")
        return from_float(linear, *args, **kwargs)

    monkeypatch.setattr(QATLinear, "from_float", fail_at_third)
    model = Classifier()
    with unchanged(model), pytest.raises(MemoryError):
        prepare_qat_(model)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (nn.Linear(64, 64),),
            ValueError,
            "prepare_qat_: model must contain layers, got a bare Linear, which cannot be replaced "
            "in place; use torchquant.nn.QATLinear.from_float(linear, config)",
        ),
        (
            (QATLinear(64, 64),),
            ValueError,
            "prepare_qat_: model must contain layers, got a bare QATLinear, which is prepared "
            "already; use it as it is",
        ),
        (({},), TypeError, "prepare_qat_: model must be an nn.Module, got dict"),
        (
            (nn.Sequential(), "int8"),
            TypeError,
            "prepare_qat_: config must be a torchquant configuration such as "
            "Int8DynamicActivationInt8WeightConfig(), got 'int8'",
        ),
        (
            (nn.Sequential(), Int8StaticActivationInt8WeightConfig(activation_narrow_range=True)),
            ValueError,
            "prepare_qat_: config must leave activation_narrow_range at None, got "
            f"{Int8StaticActivationInt8WeightConfig(activation_narrow_range=True)}; observed "
            "ranges give the default, and QATConfig(learned_activations=True) the other",
        ),
        (
            (nn.Sequential(), None, [3]),
            TypeError,
            "prepare_qat_: filter_fn must be a function of (module, name), a name pattern such as "
            "'encoder.*', or a list of patterns, got [3]",
        ),
    ],
    ids=["linear", "prepared", "dict", "text", "narrow", "list"],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        prepare_qat_(*arguments)
    assert str(raised.value) == text


def test_a_model_without_layers_of_a_kind() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3))
    with unchanged(model):
        report = prepare_qat_(model, QATConfig(edge_bits=8), strict=True)
    assert report.layers == ()
    assert report.notes == (
        "The model has no linear, conv1d or conv2d layers; there was nothing to prepare.",
    )


def test_learned_steps_are_announced() -> None:
    report = prepare_qat_(Classifier(), CONFIGS["w4a4_learned"])
    assert "create the optimizer now" in report.notes[0]
    assert "5 prepared (91 % of parameters), 0 skipped; 9 % stay in float: " in report.summary()
