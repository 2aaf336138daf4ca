"""prepare_qat_ finds the first and the last layer, which get edge_bits."""

from support.layers import outcome
from support.qat_models import Classifier
from torch import Tensor, nn

from torchquant import QATConfig, prepare_qat_
from torchquant.nn import QATLinear


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


def test_first_and_last_layer_if_a_forward_branches() -> None:
    model = OtherOrder(branch=True)
    report = prepare_qat_(model, W4A4)
    assert bits_of(model) == {"c": (8, 8), "b.1": (4, 4), "a": (8, 8)}
    assert report.notes == ()


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
