"""gptq_: the integers of the whole model, what it reports, refuses and restores."""

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from support.compressed_models import (
    Experts,
    compressed_by_hand,
    decoder,
    replace,
    stages_of,
    tokens,
)
from torch import nn

import torchquant
from torchquant import gptq_
from torchquant.algorithms.gptq_rounding import gptq
from torchquant.algorithms.hessian import Hessian
from torchquant.algorithms.inputs import quantized_input
from torchquant.algorithms.least_error import clip_search
from torchquant.convert.adjustment import Adjustment, adjust, adjustment_of, is_adjusted
from torchquant.nn.base import QuantizedModule

INT4 = torchquant.IntxWeightOnlyConfig(4, group_size=32)
CONFIGS = {
    "int4 groups": INT4,
    "int3 zero points": torchquant.IntxWeightOnlyConfig(3, group_size=48, symmetric=False),
    "int4 beside int8": torchquant.Int8DynamicActivationIntxWeightConfig(4, group_size=32),
    "int8": torchquant.Int8DynamicActivationInt8WeightConfig(),
}


def integers(weight: torch.Tensor, hessian: torch.Tensor, weights: Any, **options: Any) -> Any:
    return gptq(weight, hessian, weights, **options).integers


def assert_has(model: nn.Module, found: dict[str, Any]) -> None:
    for name, one in found.items():
        layer: Any = model.get_submodule(name)
        assert torch.equal(layer.integers.flatten(1), one.qweight), name
        assert torch.equal(layer.weight_scale, one.scale), name
        if one.zero_point is not None:
            assert torch.equal(layer.weight_zero_point, one.zero_point), name


def state_of(model: nn.Module) -> dict[str, Any]:
    """What a verb that fails must leave as it was."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "forwards": ["forward" in vars(module) for module in model.modules()],
        "adjusted": [is_adjusted(module) for module in model.modules()],
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_layer_reads_what_the_layers_before_it_give(config: Any) -> None:
    model, batches = decoder(2 if config is INT4 else 1), tokens()
    tables = ("embed",) if config.activations is None else ()
    expected = compressed_by_hand(model, batches, config, stages_of(model), integers, tables)
    report = gptq_(model, config, batches, progress=False)
    assert_has(model, expected)
    done = [row for row in report if row.action == "compressed"]
    assert [row.name for row in done] == [*expected]
    assert all(0 < row.error < row.nearest_error and row.inputs == 5 * 4 * 24 for row in done)


def test_the_options_reach_the_algorithm() -> None:
    model, batches = decoder(1), tokens(3)
    options = {"damping": 0.1, "order": "activations", "search_clip": True}
    choose = partial(integers, **options)
    expected = compressed_by_hand(model, batches, INT4, stages_of(model), choose, ("embed",))
    gptq_(model, INT4, batches, progress=False, **options)
    assert_has(model, expected)


def test_the_model_differs_from_a_rounded_one_only_in_its_integers() -> None:
    model, batches = decoder(), tokens()
    rounded, floating = copy.deepcopy(model), copy.deepcopy(model)
    expected = torchquant.quantize_(rounded, INT4)
    report = gptq_(model, INT4, batches, progress=False)
    assert report.quantization == expected
    assert rounded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        errors = [
            sum(float((net(x) - floating(x)).square().mean()) for x in batches)
            for net in (model, rounded)
        ]
    assert errors[0] < 0.95 * errors[1]


def test_a_tied_head_keeps_the_rows_of_its_table() -> None:
    model = decoder(1)
    model.head.bias, model.head.weight = None, model.embed.weight
    report = gptq_(model, INT4, tokens(2), progress=False)
    assert model.head.packed is model.embed.packed
    assert report["embed"].action == report["head"].action == "rounded"
    assert report["head"].reason.startswith("the nearest integers suit the rows of the table; ")


def test_a_tied_head_that_would_make_the_model_larger_stays_in_float() -> None:
    model = decoder(1)
    model.embed = nn.Embedding(2000, 64)
    model.head = nn.Linear(64, 2000, bias=False)
    model.head.weight = model.embed.weight
    report = gptq_(model, CONFIGS["int8"], tokens(2), progress=False)
    assert report["head"].action == "left"
    assert "an integer copy would make the model larger" in report["head"].reason
    assert type(model.head) is nn.Linear and not is_adjusted(model.head)


def test_layers_stay_that_are_not_selected() -> None:
    model = decoder(1)
    report = gptq_(model, INT4, tokens(2), filter_fn=["layers.*", "!*.o"], progress=False)
    assert type(model.head) is type(model.layers[0].o) is nn.Linear
    assert report["head"].action == report["layers.0.o"].action == "left"
    assert report["layers.0.o"].reason == "filter_fn"
    assert isinstance(model.layers[0].down, QuantizedModule)


def test_a_dictionary_gives_layers_different_bits() -> None:
    model = decoder(1)
    config = {"*.down": torchquant.IntxWeightOnlyConfig(2, group_size=16), "layers.*": INT4}
    report = gptq_(model, config, tokens(2), progress=False)
    assert model.layers[0].down.config.weights.bits == 2
    assert model.layers[0].up.config.weights.bits == 4
    assert report["layers.0.down"].error > report["layers.0.up"].error > 0


def test_experts_that_saw_few_rows_are_rounded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Experts() for _ in range(2)))
    with torch.no_grad():
        model[1].router.bias.copy_(torch.tensor([0.5, 0.0]))  # nearly all rows to expert 0
    batches = [torch.randn(64, 64) for _ in range(4)]
    weights = {
        name: m.weight.detach().clone() for name, m in model.named_modules() if hasattr(m, "weight")
    }
    report = gptq_(model, INT4, batches, filter_fn="*.experts.*", progress=False)
    actions = {name: report[name].action for name in weights if "experts" in name}
    assert actions["0.experts.0.up"] == actions["1.experts.0.down"] == "compressed"
    for name in ("0.experts.2.up", "1.experts.2.down"):
        assert report[name].reason == "no input reached it: integers of least weight error"
        found = clip_search(weights[name], INT4.weights)
        assert torch.equal(model.get_submodule(name).integers, found.qweight)
    few = report["1.experts.1.up"]
    assert few.action == "rounded" and 0 < few.inputs < 64
    assert few.reason == f"saw {few.inputs} inputs, fewer than 64: integers of least weight error"
    assert report["0.router"].action == "left"


def test_convolutions_grouped_and_with_zero_padding() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 3, padding=1, groups=groups) for groups in (1, 2, 4, 1)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU(inplace=True))))
    batches = [torch.randn(2, 64, 6, 6) for _ in range(3)]
    config = torchquant.Int8DynamicActivationInt8WeightConfig()
    stages = [(str(2 * place),) for place in range(4)]
    expected = compressed_by_hand(model, batches, config, stages, integers)
    report = gptq_(model, config, batches, progress=False)
    assert_has(model, expected)
    assert all(report[name].inputs == 3 * 2 * 36 for (name,) in stages)


def test_a_prepared_layer_is_compressed_with_its_rounded_inputs() -> None:
    class Branch(nn.Module):
        """Its forward depends on values, so that no region rounds the input of the layer."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if float(x.sum()) < 1e9 else x

    torch.manual_seed(0)
    model, x = Branch(), torch.randn(100, 64)
    weight = model.fc.weight.detach().clone()
    config = torchquant.IntxActivationIntxWeightConfig(4, activation_bits=2, static=True)
    torchquant.prepare_(model, config)
    torchquant.calibrate(model, [x], progress=False)
    rounded = copy.deepcopy(model)
    torchquant.convert_(rounded)
    hessian = Hessian(64)
    hessian.add(0, quantized_input(rounded.fc, x).t().unsqueeze(0))
    gptq_(model, None, [x], progress=False)
    torchquant.convert_(model)
    assert_has(model, {"fc": integers(weight, hessian.value(), config.weights)})


def test_a_prepared_model_gets_its_integers_in_convert() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 64),
    ).eval()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    floating = copy.deepcopy(model)
    config = torchquant.IntxActivationIntxWeightConfig(4, static=True)
    torchquant.prepare_(model, config)
    torchquant.calibrate(model, batches, progress=False)
    rounded = copy.deepcopy(model)
    report = gptq_(model, None, batches, progress=False)
    assert [row.action for row in report] == ["compressed"] * 3
    assert report.quantization is None
    assert torch.equal(model[0].weight, floating[0].weight), "the prepared model stays"
    torchquant.convert_(model)
    torchquant.convert_(rounded)
    with torch.no_grad():
        errors = [
            sum(float((net(x) - floating(x)).square().mean()) for x in batches)
            for net in (model, rounded)
        ]
    assert errors[0] < 0.8 * errors[1]


def test_a_model_in_bfloat16_stays_in_it() -> None:
    model, batches = decoder(1).bfloat16(), tokens(2)
    expected = compressed_by_hand(model, batches, INT4, stages_of(model), integers, ("embed",))
    gptq_(model, INT4, batches, progress=False)
    assert_has(model, expected)
    assert model(batches[0]).dtype == torch.bfloat16


def test_a_layer_that_sees_only_nan_gets_integers_without_the_data() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    found = clip_search(model[0].weight.detach().clone(), INT4.weights)
    report = gptq_(model, INT4, [torch.full((100, 64), float("nan"))], progress=False)
    assert torch.equal(model[0].integers, found.qweight)
    assert report["0"].reason == (
        "saw 0 inputs, fewer than 64: integers of least weight error; 100 inputs with NaN or "
        "infinities were left out"
    )


def test_nan_in_the_data_is_left_out_and_said() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(200, 64)
    spoiled = x.clone()
    spoiled[7, 3], spoiled[9, 0] = float("nan"), float("inf")
    kept = torch.cat([x[:7], x[8:9], x[10:]])
    clean = copy.deepcopy(model)
    report = gptq_(model, INT4, [spoiled], progress=False)
    gptq_(clean, INT4, [kept], progress=False)
    assert torch.equal(model[0].integers, clean[0].integers)
    assert report["0"].reason.endswith("2 inputs with NaN or infinities were left out")
    assert report["0"].inputs == 198


def test_a_hessian_that_cannot_be_factored_is_a_warning() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    rounded = copy.deepcopy(model)
    torchquant.quantize_(rounded, INT4)
    with pytest.warns(UserWarning, match="gptq_: 0 was rounded to the nearest integers"):
        report = gptq_(model, INT4, [torch.zeros(100, 64)], progress=False)
    assert report["0"].action == "rounded"
    assert report["0"].reason == "its Hessian cannot be factored"
    assert torch.equal(model[0].integers, rounded[0].integers)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_warning_that_is_an_error_leaves_the_model(prepared: bool) -> None:
    model, data = nn.Sequential(nn.Linear(64, 64)), [torch.zeros(100, 64)]
    config: Any = None if prepared else INT4
    if prepared:
        torchquant.prepare_(model)
        torchquant.calibrate(model, [torch.randn(8, 64)], progress=False)
    copied = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="gptq_: 0 was rounded"):
            gptq_(model, config, data, progress=False)
    assert type(model[0]) is nn.Linear and not is_adjusted(model[0])
    with pytest.warns(UserWarning, match="gptq_: 0 was rounded") as caught:
        gptq_(copied, config, data, progress=False)
    assert [one.filename for one in caught] == [__file__], "the line of the caller"


def test_dead_and_dependent_inputs_are_no_problem() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(200, 64)
    x[:, 5] = 0
    x[:, 20:40] = x[:, :20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = gptq_(model, INT4, [x], progress=False)
    assert report["0"].error < 0.8 * report["0"].nearest_error


def test_of_linears_that_share_a_weight_the_first_is_compressed() -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
        model[2].weight = model[0].weight
        return model

    model, x = made(), torch.randn(200, 64)
    stages = [("0",), ("3",)]
    by_hand = made()
    found = compressed_by_hand(by_hand, [x], INT4, stages[:1], integers)
    replace(by_hand, "0", INT4, found["0"])
    replace(by_hand, "2", INT4, found["0"])
    last = compressed_by_hand(by_hand, [x], INT4, stages[1:], integers)
    report = gptq_(model, INT4, [x], progress=False)
    assert [row.action for row in report] == ["compressed"] * 3
    assert report["2"].reason == "has the integers of 0; shares its weight with 0"
    assert_has(model, {"0": found["0"], "2": found["0"], "3": last["3"]})
    assert model[0].packed.data_ptr() == model[2].packed.data_ptr()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_in_the_middle_leaves_the_model(error: type[BaseException]) -> None:
    model, batches = decoder().train(), tokens(2)
    before = state_of(model)
    calls = 0

    def forward(net: nn.Module, batch: Any) -> Any:
        return net(batch)

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls > 12:
                raise error("in the middle")
            return x

    model.layers[1].norm = nn.Sequential(model.layers[1].norm, Fails())
    before = state_of(model)
    with pytest.raises(error):
        gptq_(model, INT4, batches, forward=forward, progress=False)
    assert calls > 12
    assert state_of(model) == before


@pytest.mark.parametrize("verb", [gptq_, torchquant.awq_])
def test_a_failure_leaves_what_earlier_verbs_found(verb: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    adjust(model[0], Adjustment(bias=torch.zeros(64)))
    before = adjustment_of(model[0])

    def fails(net: nn.Module, batch: Any) -> Any:
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        verb(model, INT4, [torch.randn(70, 64)], forward=fails, progress=False)
    assert adjustment_of(model[0]) is before
    assert not is_adjusted(model[1])


def test_modes_and_hooks_are_as_before() -> None:
    model = decoder().train()
    model.head.register_forward_hook(lambda *_: None)
    gptq_(model, INT4, tokens(2), progress=False)
    assert all(module.training for module in model.modules())
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    assert {name: count for name, count in hooks.items() if count} == {"head": 1}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": []}, ValueError, "gptq_: loader must have batches, got none"),
        ({"config": None}, ValueError, "gptq_: config must be a configuration such as"),
        ({"config": "int4"}, TypeError, "gptq_: config must be a torchquant configuration"),
        ({"damping": -1.0}, ValueError, "gptq: damping must be a finite number of at least 0"),
        ({"order": "random"}, ValueError, "gptq: order must be 'given' or 'activations'"),
        ({"block_size": 0}, ValueError, "gptq: block_size must be an integer of at least 1"),
        ({"limit": 0}, ValueError, "gptq_: limit must be None or a positive number"),
        ({"offload": "/no/such/folder"}, ValueError, "gptq_: offload must be an existing folder"),
        ({"data": [torch.zeros(2, 24)]}, TypeError, "input must be int64 or int32"),
        ({"data": ["text"]}, TypeError, "gptq_: a batch must be a tensor, a tuple, a list or"),
        ({"model": nn.Linear(64, 64)}, ValueError, "gptq_: model must contain layers, got a bare"),
        ({"model": 3}, TypeError, "gptq_: model must be an nn.Module, got int"),
    ],
)
def test_bad_arguments_leave_the_model(arguments: Any, error: Any, message: str) -> None:
    model = decoder(1)
    before = state_of(model)
    given = {"model": model, "config": INT4, "data": tokens(1), **arguments}
    with pytest.raises(error, match=message):
        gptq_(given.pop("model"), given.pop("config"), given.pop("data"), **given)
    assert state_of(model) == before


def test_a_prepared_model_has_its_own_configuration() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    torchquant.prepare_(model)
    with pytest.raises(ValueError, match="config must be None for a model that prepare_ prepared"):
        gptq_(model, INT4, [torch.randn(8, 64)])
    with pytest.raises(ValueError, match="model must be prepared and calibrated"):
        gptq_(model, None, [torch.randn(8, 64)])
