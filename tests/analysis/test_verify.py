"""verify counts no differing bits in a converted model, and names a layer that was changed."""

import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rich.console import Console
from support import floats
from torch import Tensor, nn

from torchquant import (
    QATConfig,
    TrainingConfig,
    VerifyReport,
    convert_,
    cpu,
    prepare_qat_,
    qat,
    verify,
)
from torchquant.analysis.verify import Comparison, tensors_in
from torchquant.models import load_digits_data, load_digits_model
from torchquant.nn import QATLinear, QuantizedLinear

CONFIGS = {
    "w8a8": QATConfig(),
    "w8a8_static": QATConfig(activations="static"),
    "w4a8_learned": QATConfig(weight_bits=4, learned_weights=True),
    "w4a4_learned": QATConfig(
        weight_bits=4,
        activation_bits=4,
        activations="static",
        learned_weights=True,
        learned_activations=True,
        learned_offset=True,
        edge_bits=8,
    ),
    "w2a8_weights_asymmetric": QATConfig(weight_bits=2, weight_symmetric=False),
}


FAST = ("w8a8_static", "w4a8_learned")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.relu, self.down = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.dropout(self.relu(self.up(x))))
        result: Tensor = self.down(self.relu(self.up(x)))  # each layer twice
        return result


def pair(config: TrainingConfig | None = None, model: nn.Module | None = None) -> tuple[Any, Any]:
    """A prepared model after one batch, and its converted copy."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    prepare_qat_(model, config)
    model.train()(floats(8, 64))
    converted = copy.deepcopy(model)
    convert_(converted)
    return model, converted


# ---------------------------------------------------------------- models that agree


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, config in CONFIGS.items()
    ],
)
def test_the_digits_model(config: TrainingConfig) -> None:
    """After a few steps of training and conversion, no bit differs on any instruction set."""
    data = load_digits_data()
    with torch.inference_mode(False):
        model = load_digits_model().train()
    prepare_qat_(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(3):
        rows = slice(32 * step, 32 * (step + 1))
        loss = nn.functional.cross_entropy(model(data.train_images[rows]), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    converted = copy.deepcopy(model)
    convert_(converted)
    layers = sum(isinstance(module, QATLinear) for module in model.modules())
    ran = []
    for isa in cpu.available_isas():
        with cpu.use_isa(isa):
            ran.append(cpu.active_isa())
            for training in (False, True):
                report = verify(model, converted, [data.test_images[:50]], training=training)
                assert report.exact, f"{isa}\n{report}"
                assert report.differing_bits == 0
                assert len(report.layers) == layers == 8
                assert report.outputs.values == 500
    assert ran == list(cpu.available_isas())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_and_outputs_are_compared(config: TrainingConfig, training: bool) -> None:
    model, converted = pair(config)
    report = verify(model, converted, [floats(3, 64), floats(5, 64)], training=training)
    assert report.exact
    assert [(layer.name, layer.calls) for layer in report.layers] == [("up", 4), ("down", 4)]
    assert [layer.values for layer in report.layers] == [16 * 128, 16 * 64]
    assert (report.outputs.calls, report.outputs.values, report.batches) == (2, 8 * 64, 2)
    assert report.first_difference is None
    assert report.never_called == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    model, converted = pair(QATConfig(weight_bits=4))
    assert verify(model, converted, [floats(3, 64, dtype=dtype)]).exact


def test_autocast() -> None:
    model, converted = pair(QATConfig(activations="static"))
    with torch.autocast("cpu", torch.bfloat16):
        assert verify(model, converted, [floats(3, 64)], training=True).exact


def test_all_nans_are_equal() -> None:
    model, converted = pair(QATConfig(activations="static"))
    x = floats(4, 64)
    x[1, 3] = float("nan")
    report = verify(model, converted, [x])
    assert report.exact
    assert model.eval()(x)[1].isnan().all()


# ---------------------------------------------------------------- differences


def test_a_difference_is_attributed_to_the_layer_in_which_it_arises() -> None:
    model, converted = pair()
    converted.up.weight_scale[7] *= 1 + 2**-20
    x = floats(3, 64)
    report = verify(model, converted, [x, x])
    assert not report.exact
    up, down = report.layers
    assert (down.name, down.differing, down.bits) == ("down", 0, 0)
    assert 0 < up.differing <= 12
    assert up.differing <= up.bits < 32 * up.differing
    assert report.differing_bits == up.bits
    first = report.first_difference
    assert first is not None
    assert (first.layer, first.batch, first.call) == ("up", 0, 0)
    assert first.index[1] == 7
    with torch.no_grad():
        assert model.eval().up(x)[first.index].item() == float(first.trained)
        assert converted.up(x)[first.index].item() == float(first.converted)
    assert f"First difference: up: batch 0, call 0, element {first.index}: " in str(report)


def test_a_difference_in_a_later_batch() -> None:
    model, converted = pair()
    converted.down.weight_scale[0] *= 2
    zeros = torch.zeros(2, 64)
    with torch.no_grad():
        model.down.bias.zero_()
        model.up.bias.zero_()
        converted.down.bias.zero_()
        converted.up.bias.zero_()
    report = verify(model, converted, [zeros, zeros, floats(2, 64)])
    first = report.first_difference
    assert first is not None
    assert (first.layer, first.batch, first.call) == ("down", 2, 4)


def test_a_single_bit() -> None:
    one = Comparison("layer")
    value = torch.tensor([1.0, 2.0, float("nan")])
    other = value.clone()
    other.view(torch.int32)[1] += 1
    one.compare(value, other, batch=3)
    assert (one.calls, one.values, one.differing, one.bits) == (1, 3, 1, 1)
    assert str(one.first) == "layer: batch 3, call 0, element (1,): 2.0 trained, " + (
        f"{other[1].item()!r} converted"
    )


@pytest.mark.parametrize(
    ("trained", "converted", "bits"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16), 96),
        (torch.zeros(3), torch.zeros(4), 96),
        (torch.tensor(0.0), torch.tensor(-0.0), 1),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), 1),
        (torch.ones(2, dtype=torch.bfloat16), -torch.ones(2, dtype=torch.bfloat16), 2),
        (torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 0),
        (torch.ones(1, dtype=torch.complex64), -1j * torch.ones(1, dtype=torch.complex64), 15),
        ((torch.zeros(1), torch.zeros(1)), torch.zeros(1), 1),
        (torch.zeros(0), torch.zeros(0), 0),
    ],
    ids=["dtype", "shape", "zero", "bool", "int", "bf16", "f64", "complex", "count", "empty"],
)
def test_counting(trained: Any, converted: Any, bits: int) -> None:
    one = Comparison("layer")
    one.compare(trained, converted, batch=0)
    assert one.bits == bits
    assert (one.first is None) == (bits == 0)


def test_differences_of_a_simulation_in_float_are_counted() -> None:
    model, converted = pair(QATConfig(simulate=True))
    report = verify(model, converted, [floats(64, 64)])
    assert not report.exact
    assert all(layer.differing for layer in report.layers)


# ---------------------------------------------------------------- the models do not change


def test_modes_stages_hooks_and_random_states_are_restored() -> None:
    model, converted = pair(QATConfig(activations="static"))
    seen: list[str] = []
    handle = model.up.register_forward_hook(lambda m, x, y: seen.append("hook") or 2 * y)
    twin = converted.up.register_forward_hook(lambda m, x, y: 2 * y)
    model.relu.eval()
    modes = [m.training for m in (*model.modules(), *converted.modules())]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in (*model.modules(), *converted.modules())]
    random = torch.get_rng_state()
    for training in (False, True):
        assert verify(model, converted, [floats(3, 64)], training=training).exact
    assert seen == ["hook"] * 4
    assert modes == [m.training for m in (*model.modules(), *converted.modules())]
    assert hooks == [len(m._forward_hooks) for m in (*model.modules(), *converted.modules())]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.is_grad_enabled()
    before = model.up.input_quantizer.observer.min_val.clone()
    model.train()(3 * floats(8, 64))
    assert not torch.equal(before, model.up.input_quantizer.observer.min_val), "observing again"
    handle.remove()
    twin.remove()


def test_an_error_in_a_forward_restores_the_models() -> None:
    model, converted = pair()
    with pytest.raises(ValueError, match="in_features"):
        verify(model, converted, [floats(3, 63)])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_random_operators_outside_the_layers_draw_the_same_numbers() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand_like(x))

    model, converted = pair(model=Noisy())
    assert verify(model, converted, [floats(3, 64)]).exact


# ---------------------------------------------------------------- inputs and outputs


@dataclass
class Output:
    logits: Tensor
    extra: list[Tensor]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> dict[str, Any]:
        y = self.layer(input=x)
        return {"output": Output(y if scale is None else y * scale, [y, y + 1]), "name": "text"}


def structured() -> Iterator[Any]:
    x = floats(2, 64)
    yield x
    yield (x,)
    yield [x]
    yield {"x": x, "scale": torch.tensor(2.0)}


def test_all_kinds_of_batches_and_outputs() -> None:
    model, converted = pair(model=Structured())
    report = verify(model, converted, structured())
    assert report.exact
    assert report.batches == 4
    assert report.outputs.values == 4 * 3 * 128
    assert report.never_called == ("unused",)
    assert "Not compared, because never called: unused" in str(report)


def test_tensors_in() -> None:
    tensors = [torch.tensor(float(i)) for i in range(4)]
    value = {"a": tensors[0], "b": (tensors[1], Output(tensors[2], [tensors[3]])), "c": "text"}
    assert list(tensors_in(value)) == tensors
    assert list(tensors_in(3)) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m, c: (c, c), "qat_model must hold layers that prepare_qat_ prepared, got none"),
        (lambda m, c: (m, m), "got one without a quantized layer at up, down"),
        (lambda m, c: (m, nn.Sequential(c)), "got one without a quantized layer at up, down"),
    ],
    ids=["converted", "not_converted", "wrapped"],
)
def test_models_that_do_not_match(change: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        verify(*change(*pair()), [floats(2, 64)])


def test_other_wrong_arguments() -> None:
    model, converted = pair()
    with pytest.raises(TypeError, match=r"verify: quantized_model must be an nn\.Module, got str"):
        verify(model, "model", [floats(2, 64)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        verify(model, converted, [])
    qat.observe_(model)
    with pytest.raises(
        ValueError, match=r"in the stage 'observe' \(up, down\); call torchquant.qat."
    ):
        verify(model, converted, [floats(2, 64)])


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("width", [60, 120])
def test_the_table(width: int) -> None:
    model, converted = pair()
    report = verify(model, converted, [floats(2, 64)])
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(report)
    text = file.getvalue()
    assert "0 differing bits in" in text
    assert all(len(line) <= width for line in text.splitlines())
    assert isinstance(report, VerifyReport)
    assert isinstance(converted.up, QuantizedLinear)
