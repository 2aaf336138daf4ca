"""prepare_qat_, convert_, to_float_ and the stages of training."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import outcome, unchanged
from torch import Tensor, nn

import torchquant
from torchquant import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    IntxActivationIntxWeightConfig,
    QATConfig,
    QATSchedule,
    TrainingConfig,
    convert_,
    prepare_qat_,
    qat,
    quantize_,
    to_float_,
    verify,
)
from torchquant.graph.modules import tensor_bytes
from torchquant.nn import Activation, FusedActivation, QATLinear, QuantizedLinear
from torchquant.training.layer_part import LayerPart
from torchquant.training.observed_quantizer import ObservedQuantizer
from torchquant.training.observers import Observer

CONFIGS = {
    "w8a8": QATConfig(),
    "w8a8_symmetric": QATConfig(activation_symmetric=True),
    "w8a8_weights_asymmetric": QATConfig(weight_symmetric=False),
    "w8a8_static": QATConfig(activations="static"),
    "w4a8": QATConfig(weight_bits=4),
    "w2a4_static": QATConfig(weight_bits=2, activation_bits=4, activations="static"),
    "w4a8_learned_weights": QATConfig(weight_bits=4, learned_weights=True),
    "w4a4_learned": QATConfig(
        weight_bits=4,
        activation_bits=4,
        activations="static",
        learned_weights=True,
        learned_activations=True,
    ),
    "w8a8_learned": QATConfig(activations="static", learned_weights=True, learned_activations=True),
    "w8a4_learned_offset": QATConfig(
        activation_bits=4, activations="static", learned_activations=True, learned_offset=True
    ),
}
LEARNED = {name: config for name, config in CONFIGS.items() if "learned" in name}
STATIC = QATConfig(activations="static")


class Block(nn.Module):
    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.up, self.relu = nn.Linear(features, 2 * features), nn.ReLU()
        self.down = nn.Linear(2 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.relu(self.up(self.norm(x))))
        return x + down


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


def tokens(seed: int = 0, batch: int = 8) -> Tensor:
    return torch.randint(0, 50, (batch, 12), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 2, schedule: QATSchedule | None = None) -> None:
    """A few steps of plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens(step)).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    model.eval()


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


# ---------------------------------------------------------------- prepare


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_prepare_train_convert(config: TrainingConfig) -> None:
    model = Classifier()
    report = prepare_qat_(model, config)
    assert outcome(report) == {
        "blocks.0.up": "prepared",
        "blocks.0.down": "prepared",
        "blocks.1.up": "prepared",
        "blocks.1.down": "prepared",
        "head": "skipped: too small to benefit",
    }
    assert len(report.changed) == 4
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
        "head": "skipped: not prepared",
    }
    assert converted.bytes_after < 0.5 * converted.bytes_before
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert [layer.config for layer in layers] == [config.deployed()] * 4
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
    assert outcome(report) == {"body": "converted", "head": "converted: untied"}
    assert report.notes == ("No longer shares its weight; has its own integer copy: head.",)
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


# ---------------------------------------------------------------- layers that stay in float


class Subclass(nn.Linear):
    pass


def with_nan() -> nn.Module:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    return linear


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Subclass(64, 64), "Subclass (subclass of nn.Linear)"),
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
            (nn.Sequential(), None, ["head"]),
            TypeError,
            "prepare_qat_: filter_fn must be a function of (module, name), got ['head']",
        ),
    ],
    ids=["linear", "prepared", "dict", "text", "narrow", "list"],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        prepare_qat_(*arguments)
    assert str(raised.value) == text


def test_a_model_without_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with unchanged(model):
        report = prepare_qat_(model, QATConfig(edge_bits=8), strict=True)
    assert report.layers == ()
    assert report.notes == ("The model has no linear layers; there was nothing to prepare.",)


def test_learned_steps_are_announced() -> None:
    report = prepare_qat_(Classifier(), CONFIGS["w4a4_learned"])
    assert "create the optimizer now" in report.notes[0]
    assert "4 prepared, 1 skipped; model" in str(report)


# ---------------------------------------------------------------- first and last layer


class OtherOrder(nn.Module):
    """The layers are registered in a different order than the order of their calls."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.c, self.b = nn.Linear(64, 64), nn.Sequential(nn.ReLU(), nn.Linear(64, 64))
        self.a = nn.Linear(64, 64)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.branch and x.sum() > 0:
            x = -x
        result: Tensor = self.c(self.b(x))
        return result


def bits_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    layers = {n: m.config for n, m in model.named_modules() if isinstance(m, QATLinear)}
    return {n: (config.weights.bits, config.activations.bits) for n, config in layers.items()}


W4A4 = QATConfig(weight_bits=4, activation_bits=4, edge_bits=8)


def test_first_and_last_layer_by_the_order_of_calls() -> None:
    model = OtherOrder()
    report = prepare_qat_(model, W4A4)
    assert bits_of(model) == {"a": (8, 8), "b.1": (4, 4), "c": (8, 8)}
    assert outcome(report) == {
        "c": "prepared: last layer, 8 bits",
        "b.1": "prepared",
        "a": "prepared: first layer, 8 bits",
    }
    assert report.notes == ()


def test_edges_of_eight_bits_use_the_range_of_their_channels() -> None:
    def learned(edge_bits: int) -> set[str]:
        model = OtherOrder()
        config = QATConfig(weight_bits=4, learned_weights=True, edge_bits=edge_bits)
        prepare_qat_(model, config)
        layers = model.named_modules()
        return {n for n, m in layers if isinstance(m, QATLinear) and m.weight_quantizer is not None}

    assert learned(8) == {"b.1"}
    assert learned(6) == {"a", "b.1", "c"}


def test_first_and_last_layer_if_a_forward_cannot_be_traced() -> None:
    model = OtherOrder(branch=True)
    report = prepare_qat_(model, W4A4)
    assert bits_of(model) == {"c": (8, 8), "b.1": (4, 4), "a": (8, 8)}
    (note,) = report.notes
    assert note.startswith(
        "The first and the last layer were determined in part from the order of modules: "
        "OtherOrder."
    )


def test_first_and_last_layer_through_blocks() -> None:
    model = Classifier()
    report = prepare_qat_(model, W4A4)
    assert bits_of(model)["blocks.0.up"] == (8, 8)
    assert set(list(bits_of(model).values())[1:]) == {(4, 4)}
    assert report.notes == (
        "head is the model's last linear layer but is left unchanged: too small to benefit.",
    )


def test_one_layer_is_first_and_last() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    report = prepare_qat_(model, W4A4)
    assert outcome(report) == {"0": "prepared: first and last layer, 8 bits"}
    assert bits_of(model) == {"0": (8, 8)}


def test_layers_in_a_list_that_nothing_calls() -> None:
    report = prepare_qat_(nn.ModuleList([nn.Linear(64, 64) for _ in range(3)]), W4A4)
    assert [layer.reason for layer in report.layers] == [
        "first layer, 8 bits",
        "",
        "last layer, 8 bits",
    ]
    assert "ModuleList" in report.notes[0]


# ---------------------------------------------------------------- ReLU


def test_a_relu_moves_into_the_layer() -> None:
    model = two_layers()
    apart = copy.deepcopy(model)
    apart.insert(1, nn.Dropout(0.0))  # prevents the fusion of the ReLU
    report = prepare_qat_(model)
    prepare_qat_(apart)
    assert [str(fusion) for fusion in report.fusions] == ["fused: 0 with 1 (relu)"]
    assert isinstance(model[1], FusedActivation)
    assert model[0].activation == "relu"
    assert isinstance(apart[2], nn.ReLU)
    x = floats(5, 64)
    outputs = [m(x) for m in (model, apart)]
    assert_same_bits(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for name, parameter in model[0].named_parameters():
        assert_same_bits(parameter.grad, apart[0].get_parameter(name).grad, name)
    trained = copy.deepcopy(model)
    convert_(model)
    assert model[0].activation == "relu"
    assert verify(trained, model, [x]).exact


def test_a_relu_in_the_first_stage() -> None:
    model = two_layers()
    expected = model(floats(5, 64))
    prepare_qat_(model)
    qat.observe_(model)
    assert_same_bits(model(floats(5, 64)), expected)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(64, 64), nn.Linear(64, 64), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.second(self.relu(self.first(x))))
        return result


class UsedElsewhere(Twice):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        result: Tensor = self.second(self.relu(hidden)) + hidden
        return result


class Functional(Twice):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


class FunctionalGELU(Twice):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return result


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        (Twice, ["fused: first with relu (relu)", "fused: second with relu (relu)"]),
        (
            UsedElsewhere,
            ["not fused: first with relu (relu): the layer's output is also used elsewhere"],
        ),
        (
            Functional,
            [
                "not fused: first: Functional.forward calls relu itself; a module (nn.ReLU) could "
                "be fused"
            ],
        ),
        (FunctionalGELU, []),
    ],
    ids=["shared", "used_elsewhere", "functional", "gelu"],
)
def test_which_relus_move(kind: type[nn.Module], lines: list[str]) -> None:
    model = kind()
    x = floats(3, 64)
    expected = model(x)
    report = prepare_qat_(model)
    assert [str(fusion) for fusion in report.fusions] == lines
    got = model(x)
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.99


def test_other_activations_stay_and_are_reported() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    (fusion,) = prepare_qat_(model).fusions
    assert str(fusion) == ("not fused: 0 with 1 (gelu): only ReLU can be fused during training")
    assert isinstance(model[1], nn.GELU)


def test_a_relu_after_a_layer_that_stays_in_float_is_left() -> None:
    model = Twice()
    report = prepare_qat_(model, filter_fn=lambda module, name: name == "first")
    assert isinstance(model.relu, nn.ReLU)
    (fusion,) = report.fusions
    assert fusion.reason == "the activation is also used elsewhere"


# ---------------------------------------------------------------- convert


def test_layers_on_one_tensor_are_computed_together() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(64, 128), nn.Linear(64, 128)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.gate(x) * self.up(x)
            return result

    for config, line in (
        (QATConfig(), "fused: gate, up: one product"),
        (STATIC, "not fused: gate, up: "),
    ):
        model = Gated()
        prepare_qat_(model, config)
        x = floats(4, 64)
        model(x).sum().backward()
        trained = copy.deepcopy(model)
        (fusion,) = convert_(model).fusions
        assert str(fusion).startswith(line)
        with torch.no_grad():
            assert_same_bits(model(x), trained.eval()(x))
        assert verify(trained, model, [x]).exact


def test_convert_without_prepared_layers() -> None:
    model = Classifier()
    with unchanged(model), pytest.raises(ValueError) as raised:
        convert_(model)
    assert str(raised.value) == (
        "convert_: model must hold layers that prepare_qat_ prepared, got none; call "
        "prepare_qat_(model, config) and train first, or quantize_(model, config) to quantize "
        "without training"
    )
    with pytest.raises(ValueError, match=r"a bare QATLinear, .*use its to_quantized\(\)"):
        convert_(QATLinear(64, 64))


def test_convert_before_a_range_was_observed() -> None:
    model = Classifier()
    prepare_qat_(model, STATIC)
    with unchanged(model), pytest.raises(ValueError, match=r"blocks\.0\.up cannot be converted: "):
        convert_(model)


def test_calibration_alone_is_static_quantization() -> None:
    model = Classifier().train()
    expected = model(tokens())
    prepare_qat_(model, Int8StaticActivationInt8WeightConfig())
    qat.observe_(model)
    for seed in range(4):
        model(tokens(seed))
    report = convert_(model)
    (note,) = report.notes
    assert note.startswith("Converted in the stage 'observe', in which layers compute in float: ")
    got = model.eval()(tokens())
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.99


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_converted_model_is_saved_and_loaded(config: TrainingConfig, tmp_path: Path) -> None:
    model = Classifier()
    prepare_qat_(model, config)
    train(model)
    convert_(model)
    torchquant.save(model, tmp_path / "model.safetensors")
    loaded = torchquant.load(tmp_path / "model.safetensors", Classifier()).eval()
    assert_same_bits(loaded(tokens()), model(tokens()))


@pytest.mark.parametrize("bits", range(2, 9))
def test_learned_steps_use_the_least_integer_too(bits: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    prepare_qat_(model, QATConfig(weight_bits=bits, learned_weights=True))
    model.train()(floats(4, 64))
    with torch.no_grad():
        model[0].weight_quantizer.step.mul_(0.01)  # now many weights are outside the range
    trained = copy.deepcopy(model)
    convert_(model)
    assert model[0].qweight.min() == -(2 ** (bits - 1))
    assert verify(trained, model, [floats(4, 64)]).exact


def test_no_float_weight_remains() -> None:
    model = Classifier()
    prepare_qat_(model, LEARNED["w4a4_learned"])
    train(model)
    report = convert_(model)
    assert report.bytes_after == tensor_bytes(model)
    assert {n.rpartition(".")[2] for n, _ in model.blocks.named_parameters()} == {"weight", "bias"}
    assert not [
        m for m in model.modules() if isinstance(m, (QATLinear, ObservedQuantizer, Observer))
    ]


# ---------------------------------------------------------------- to_float


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_to_float_gives_the_trained_parameters(config: TrainingConfig) -> None:
    model = Classifier()
    prepare_qat_(model, config)
    train(model)
    parameters = dict(model.named_parameters())
    report = to_float_(model)
    assert set(outcome(report).values()) == {"restored"}
    assert list(model.state_dict()) == list(Classifier().state_dict())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert type(model.blocks[0].relu) is nn.ReLU
    assert type(model.blocks[0].up) is nn.Linear
    assert not model.blocks[0].up.training


def test_to_float_of_a_quantized_model() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    x = floats(3, 64)
    expected = model(x)
    quantize_(model)
    to_float_(model)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert torch.nn.functional.cosine_similarity(model(x), expected, dim=-1).min() > 0.99


def test_to_float_of_an_activation_that_was_never_a_module() -> None:
    layer = QuantizedLinear.from_float(nn.Linear(64, 64), activation="relu")
    model = nn.Sequential(nn.Linear(64, 64), layer)
    with (
        unchanged(model),
        pytest.raises(ValueError, match="got 1, which was created with activation 'relu'"),
    ):
        to_float_(model)


def test_to_float_without_prepared_or_quantized_layers() -> None:
    model = Classifier()
    with unchanged(model):
        report = to_float_(model)
    assert report.notes == ("The model has no prepared or quantized layers; none was restored.",)
    with pytest.raises(ValueError, match=r"a bare QATLinear, .*use its to_float\(\)"):
        to_float_(QATLinear(64, 64))


# ---------------------------------------------------------------- stages


def ranges(model: nn.Module) -> list[Tensor]:
    return [m.min_val.clone() for m in model.modules() if isinstance(m, Observer)]


def test_the_stages() -> None:
    model = Classifier()
    expected = model(tokens())
    prepare_qat_(model, STATIC)
    qat.observe_(model)
    assert_same_bits(model(tokens()), expected, "float")
    first = ranges(model)
    assert all(r.isfinite().all() for r in first)
    qat.train_(model)
    assert not torch.equal(model(tokens(1)), Classifier()(tokens(1)))
    second = ranges(model)
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    qat.freeze_(model)
    frozen = model(tokens(2))
    assert all(torch.equal(a, b) for a, b in zip(second, ranges(model), strict=True))
    converted = copy.deepcopy(model)
    convert_(converted)
    assert_same_bits(converted(tokens(2)), frozen, "training mode with frozen ranges")


def test_evaluation_does_not_observe() -> None:
    model = Classifier()
    prepare_qat_(model, STATIC)
    model(tokens())
    before = ranges(model)
    model.eval()(tokens(1))
    assert all(torch.equal(a, b) for a, b in zip(before, ranges(model), strict=True))


def test_a_schedule() -> None:
    model = Classifier()
    prepare_qat_(model, STATIC)
    schedule = QATSchedule(nn.Sequential(model), observe_steps=2, freeze_step=4)
    stages = []
    for _ in range(6):
        stages.append(schedule.stage)
        schedule.step()
    assert stages == ["observe", "observe", "train", "train", "freeze", "freeze"]


def test_a_schedule_continues_from_its_state() -> None:
    model = Classifier()
    prepare_qat_(model, STATIC)
    schedule = QATSchedule(model, observe_steps=1, freeze_step=3)
    model(tokens())
    for _ in range(3):
        schedule.step()
    other = Classifier()
    prepare_qat_(other, STATIC)
    resumed = QATSchedule(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert (resumed.stage, resumed.steps) == ("freeze", 3)
    before = ranges(other)
    assert_same_bits(other(tokens(1)), model(tokens(1)))
    assert all(torch.equal(a, b) for a, b in zip(before, ranges(other), strict=True))


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((-1, None), "observe_steps must be an integer of at least 0, got -1"),
        ((1.5, None), "observe_steps must be an integer of at least 0, got 1.5"),
        ((5, 3), "freeze_step must be None, or at least 1 and at least observe_steps = 5, got 3"),
        ((0, 0), "freeze_step must be None, or at least 1 and at least observe_steps = 0, got 0"),
    ],
)
def test_a_schedule_with_invalid_bounds(bounds: tuple[Any, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        QATSchedule(Classifier(), *bounds)


def test_a_schedule_with_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"QATSchedule: model must be an nn\.Module, got str"):
        QATSchedule("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got one without freeze_step, observe_steps"):
        QATSchedule(Classifier()).load_state_dict({"steps": 3})


# ---------------------------------------------------------------- together with quantize_


def test_quantize_names_the_verbs_of_training() -> None:
    model = Classifier()
    with unchanged(model):
        with pytest.raises(ValueError, match=r"prepare_qat_\(model, config\).*convert_\(model\)"):
            quantize_(model, Int8StaticActivationInt8WeightConfig())
        with pytest.raises(TypeError, match=r"prepare_qat_\(model, config\).*convert_\(model\)"):
            quantize_(model, QATConfig())  # type: ignore[arg-type]


def test_quantize_does_not_change_prepared_layers() -> None:
    model = Classifier()
    prepare_qat_(model)
    assert outcome(quantize_(model))["blocks.0.up"] == (
        "skipped: prepared for training; convert_(model) quantizes it"
    )
    convert_(model)
    assert outcome(prepare_qat_(model))["blocks.0.up"] == (
        "skipped: already quantized; to_float_(model) makes it trainable again"
    )


def test_without_training_the_result_is_that_of_quantize() -> None:
    model, other = Classifier().eval(), Classifier().eval()
    other.load_state_dict(model.state_dict())
    prepare_qat_(model)
    convert_(model)
    quantize_(other)
    assert_same_bits(model(tokens()), other(tokens()))


def test_a_copy_and_a_pickle_of_a_prepared_model(tmp_path: Path) -> None:
    model = Classifier()
    prepare_qat_(model, CONFIGS["w4a4_learned"])
    train(model)
    torch.save(model, tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (copy.deepcopy(model), loaded):
        assert_same_bits(twin(tokens()), model(tokens()))


def test_the_public_names() -> None:
    names = {"prepare_qat_", "convert_", "to_float_", "verify", "VerifyReport", "QATSchedule"}
    assert names <= set(torchquant.__all__)
