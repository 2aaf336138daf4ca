"""prepare_qat_ moves a ReLU into the layer before it, and no other activation."""

import copy

import pytest
import torch
from support import assert_same_bits, floats
from support.qat_models import two_layers
from torch import Tensor, nn

from torchquant import convert_, prepare_qat_, qat, verify
from torchquant.nn.replaced_activation import ReplacedActivation


def test_a_relu_moves_into_the_layer() -> None:
    model = two_layers()
    apart = copy.deepcopy(model)
    apart.insert(1, nn.Dropout(0.0))  # prevents the fusion of the ReLU
    report = prepare_qat_(model)
    prepare_qat_(apart)
    assert [str(fusion) for fusion in report.fusions] == ["fused: 0 with 1 (relu)"]
    assert isinstance(model[1], ReplacedActivation)
    assert type(apart[2]) is nn.ReLU
    x = floats(5, 64)
    outputs = [m(x) for m in (model, apart)]
    assert_same_bits(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for name, parameter in model[0].named_parameters():
        assert_same_bits(parameter.grad, apart[0].get_parameter(name).grad, name)
    trained = copy.deepcopy(model)
    convert_(model)
    assert model[0]._fuses_activation
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
            ["not fused: first with relu (relu): its output is also used elsewhere"],
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


def test_a_relu_after_a_layer_that_stays_in_float() -> None:
    model = Twice()
    expected = model(floats(3, 64))
    report = prepare_qat_(model, filter_fn=lambda module, name: name == "first")
    assert isinstance(model.relu, nn.ReLU)
    (fusion,) = report.fusions
    assert str(fusion) == "fused: first with relu (relu)"
    got = model(floats(3, 64))
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.99


def test_hooks_see_the_values_before_the_relu() -> None:
    """A hook that is registered after prepare_qat_ receives negative outputs, as in float."""
    model = two_layers()
    prepare_qat_(model)
    seen: list[Tensor] = []
    model(floats(5, 64))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(floats(5, 64))
    assert float(seen[0].min()) < 0
