"""QuantizedLinear: inputs, float layers and options that it refuses, with the error's words."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import floats
from support.layers import float_layer, layer_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune

from torchquant.nn import QuantizedLinear


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        pytest.param(
            torch.zeros(4, 63),
            ValueError,
            "QuantizedLinear: input must be [..., in_features] with in_features = 64, got [4, 63]",
            marks=pytest.mark.cpu_only("the layout of a path's weights does not hold in_features"),
        ),
        (
            torch.zeros(64, 90),
            ValueError,
            "QuantizedLinear: input must be [..., in_features] with in_features = 64, got [64, 90]",
        ),
        (
            torch.tensor(1.0),
            ValueError,
            "QuantizedLinear: input must be [..., in_features] with in_features = 64, got []",
        ),
        (
            torch.zeros(4, 64, device="meta"),
            ValueError,
            "QuantizedLinear: input must be on the layer's device cpu, got one on meta; move one "
            "of them",
        ),
        (
            torch.zeros(4, 64, dtype=torch.float64),
            TypeError,
            "linear_dynamic: input must be float32, bfloat16 or float16, got float64 [4, 64]; "
            "convert it with .to(torch.float32)",
        ),
        (
            torch.zeros(4, 64, dtype=torch.int64),
            TypeError,
            "linear_dynamic: input must be float32, bfloat16 or float16, got int64 [4, 64]; "
            "convert it with .to(torch.float32)",
        ),
        ([1.0], TypeError, "QuantizedLinear: input must be a tensor, got list"),
    ],
    ids=["narrow", "wide", "scalar", "device", "float64", "int64", "list"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(x: Any, error: type[Exception], text: str, grad: bool) -> None:
    layer = layer_of()
    with torch.set_grad_enabled(grad), pytest.raises(error) as raised:
        layer(x)
    assert str(raised.value).splitlines()[0] == text
    if isinstance(x, Tensor) and x.dim() and x.device.type == "cpu" and error is ValueError:
        with pytest.raises(error, match="in_features = 64"):  # without the fast call
            layer(nn.Parameter(x))


def test_a_layer_without_values_is_refused() -> None:
    """Without this error, the meta kernel would return uninitialised memory."""
    layer = layer_of().to("meta")
    with pytest.raises(ValueError, match="device meta, got one on cpu; load its weights first"):
        layer(floats(3, 64))
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 32)


class Subclass(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def pruned() -> nn.Linear:
    return prune.l1_unstructured(float_layer(), "weight", amount=3)


def pruned_bias() -> nn.Linear:
    return prune.l1_unstructured(float_layer(), "bias", amount=3)


def with_forward() -> nn.Linear:
    linear = float_layer()
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


def with_value(value: float) -> nn.Linear:
    linear = float_layer()
    with torch.no_grad():
        linear.weight[3, 5] = value
    return linear


def fake() -> nn.Linear:
    with FakeTensorMode():
        return nn.Linear(64, 32)


def old_weight_norm() -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(float_layer())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: nn.Conv1d(3, 3, 1),
            TypeError,
            "got Conv1d (not an nn.Linear: it has no weight of two dimensions)",
        ),
        (
            lambda: Subclass(64, 32),
            TypeError,
            "got Subclass (subclass of nn.Linear: it does not compute x @ weight.T + bias)",
        ),
        (
            lambda: nn.LazyLinear(32),
            TypeError,
            "got LazyLinear (subclass of nn.Linear: its parameters have no values yet)",
        ),
        (lambda: nn.Linear(64, 32).double(), TypeError, "got weight of dtype float64"),
        (
            lambda: parametrizations.weight_norm(float_layer()),
            TypeError,
            "got ParametrizedLinear (parametrized)",
        ),
        (
            old_weight_norm,
            TypeError,
            "got weight computed from other tensors (weight_norm, spectral_norm, pruning)",
        ),
        (
            lambda: nn.utils.spectral_norm(float_layer()),
            TypeError,
            "got weight computed from other tensors (weight_norm, spectral_norm, pruning)",
        ),
        (
            pruned,
            TypeError,
            "got weight computed from other tensors (weight_norm, spectral_norm, pruning)",
        ),
        (
            pruned_bias,
            TypeError,
            "got bias computed from other tensors (weight_norm, spectral_norm, pruning)",
        ),
        (with_forward, TypeError, "got forward replaced on the instance"),
        (fake, TypeError, "got weight of type FakeTensor"),
        (
            lambda: with_value(float("nan")),
            ValueError,
            "its weight holds NaN or infinity; check the checkpoint",
        ),
        (
            lambda: with_value(float("-inf")),
            ValueError,
            "its weight holds NaN or infinity; check the checkpoint",
        ),
        (
            lambda: nn.Linear(64, 32, device="meta"),
            ValueError,
            "on the meta device, without values; load its weights first",
        ),
        (lambda: nn.Linear(64, 0), ValueError, "weight of shape [0, 64]"),
        (lambda: nn.Linear(0, 64), ValueError, "weight of shape [64, 0]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_from_float_refuses(
    make: Callable[[], nn.Linear], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as raised:
        QuantizedLinear.from_float(make())
    start = {
        TypeError: "QuantizedLinear.from_float: linear must be a plain nn.Linear, ",
        ValueError: "QuantizedLinear.from_float: linear cannot be quantized: ",
    }
    assert str(raised.value) == start[error] + text


def test_pruning_made_permanent_is_accepted() -> None:
    linear = prune.remove(pruned(), "weight")
    assert int((QuantizedLinear.from_float(linear).qweight == 0).sum()) >= 3


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"activation": "mish"}, ValueError, "activation must be one of none, relu, gelu"),
        ({"config": "int8"}, TypeError, "config must be a torchquant configuration such as"),
    ],
)
def test_bad_options(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"QuantizedLinear: {text}"):
        QuantizedLinear(64, 32, **arguments)
    with pytest.raises(error, match=text):
        QuantizedLinear.from_float(float_layer(), **arguments)


@pytest.mark.parametrize("size", [0, -3, 2.0, True, None])
@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_bad_sizes(name: str, size: Any) -> None:
    sizes = {"in_features": 64, "out_features": 32, name: size}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {size}"):
        QuantizedLinear(**sizes)
