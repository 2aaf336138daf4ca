"""Convolutions: inputs, float layers and options that they refuse, with the error's words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.conv_modules import CONFIGS, float_conv, quantized
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import PerGroup, QATConfig, QuantizationConfig, Weights
from torchquant.nn import QATConv2d, QuantizedConv1d, QuantizedConv2d

LAYERS: dict[str, Callable[[], Any]] = {
    "QuantizedConv2d": lambda: quantized(),
    "QATConv2d": lambda: QATConv2d.from_float(float_conv()),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([1.0], TypeError, "input must be a tensor, got list"),
        (torch.zeros(8, 8), ValueError, "input must be [N, C, H, W] or [C, H, W], got [8, 8]"),
        (
            torch.zeros(1, 4, 8, 8),
            ValueError,
            "input must have in_channels = 8 channels, got [1, 4, 8, 8]",
        ),
        (
            torch.zeros(8, 0, 8),
            ValueError,
            "input must be at least as large as the kernel, got [8, 0, 8] with padding (1, 1) for "
            "a kernel of (3, 3) with dilation (1, 1)",
        ),
        (
            torch.zeros(1, 8, 8, 8, device="meta"),
            ValueError,
            "input must be on the layer's device cpu, got one on meta; move one of them",
        ),
    ],
    ids=["list", "rank", "channels", "empty", "device"],
)
def test_bad_input(name: str, x: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        LAYERS[name]()(x)
    assert str(raised.value) == f"{name}: {text}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_bad_dtype(dtype: torch.dtype) -> None:
    for make in LAYERS.values():
        with pytest.raises(TypeError, match=r"must be .*float32"):
            make()(torch.zeros(1, 8, 8, 8, dtype=dtype))


def test_a_layer_without_values_is_refused() -> None:
    layer = quantized().to("meta")
    with pytest.raises(ValueError, match="device meta, got one on cpu; load its weights first"):
        layer(torch.zeros(1, 8, 8, 8))
    assert layer(torch.empty(3, 8, 6, 6, device="meta")).shape == (3, 16, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, got 0"),
        ({"out_channels": True}, "out_channels must be an integer of at least 1, got True"),
        ({"groups": 3}, "in_channels must be a multiple of groups = 3, got 8"),
        (
            {"groups": 8, "out_channels": 12},
            "out_channels must be a multiple of groups = 8, got 12",
        ),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be an integer or 2 of them, got (3, 3, 3)"),
        ({"kernel_size": (3, 0)}, "kernel_size must be an integer of at least 1, got 0"),
        ({"stride": 0}, "stride must be an integer of at least 1, got 0"),
        ({"dilation": 1.5}, "dilation must be an integer of at least 1, got 1.5"),
        ({"padding": -1}, "padding must be an integer of at least 0, got -1"),
        ({"padding": "full"}, "padding must be integers, 'same' or 'valid', got 'full'"),
        (
            {"padding": "same", "stride": 2},
            "padding='same' must come with stride 1, got stride (2, 2)",
        ),
        (
            {"padding_mode": "mirror"},
            "padding_mode must be one of zeros, reflect, replicate, circular, got 'mirror'",
        ),
    ],
    ids=str,
)
def test_bad_sizes(arguments: dict[str, Any], text: str) -> None:
    given = {"in_channels": 8, "out_channels": 16, "kernel_size": 3, **arguments}
    for kind in (QuantizedConv2d, QATConv2d):
        with pytest.raises(ValueError) as raised:
            kind(**given)
        assert str(raised.value) == f"{kind.__name__}: {text}"


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"QuantizedConv2d: activation must be one of none, relu"):
        QuantizedConv2d(8, 16, 3, activation="elu")
    with pytest.raises(ValueError, match="QATConv2d: activation must be none or relu, got 'silu'"):
        QATConv2d(8, 16, 3, activation="silu")
    with pytest.raises(ValueError, match="QuantizedConv1d: kernel_size must be an integer, got"):
        QuantizedConv1d(8, 16, (3, 3))
    with pytest.raises(TypeError, match="QuantizedConv2d: config must be a torchquant config"):
        QuantizedConv2d(8, 16, 3, config="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(weight_symmetric=False), "convolutions need symmetric weights"),
        (
            QuantizationConfig(Weights(granularity=PerGroup(32))),
            "convolutions need weights with PerAxis(0) or PerTensor(), not PerGroup(group_size=32)",
        ),
    ],
    ids=["zero points", "groups"],
)
def test_configurations_that_do_not_fit(config: QuantizationConfig, reason: str) -> None:
    assert QuantizedConv2d.config_refusal(config) == reason
    with pytest.raises(ValueError) as raised:
        QuantizedConv2d.from_float(float_conv(), config)
    assert str(raised.value) == (
        f"QuantizedConv2d.from_float: config must fit a convolution, got {config}: {reason}"
    )
    with pytest.raises(ValueError, match="QATConv2d: config must fit a convolution"):
        QATConv2d(8, 16, 3, config=QATConfig(weight_symmetric=False))


class Subclass(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_forward() -> nn.Module:
    conv = float_conv()
    conv.forward = lambda x: x  # type: ignore[method-assign]
    return conv


def with_value(value: float) -> nn.Module:
    conv = float_conv()
    with torch.no_grad():
        conv.weight[3, 5] = value
    return conv


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.Linear(8, 8), TypeError, "Linear"),
        (lambda: nn.Conv1d(8, 8, 3), TypeError, "Conv1d"),
        (lambda: nn.ConvTranspose2d(8, 8, 3), TypeError, "ConvTranspose2d"),
        (lambda: Subclass(8, 8, 3), TypeError, "Subclass (a subclass of nn.Conv2d)"),
        (
            lambda: nn.LazyConv2d(8, 3),
            TypeError,
            "LazyConv2d (its parameters have no values yet; run the model once)",
        ),
        (
            lambda: parametrizations.weight_norm(float_conv()),
            TypeError,
            "ParametrizedConv2d (parametrized)",
        ),
        (
            lambda: prune.l1_unstructured(float_conv(), "weight", 3),
            TypeError,
            "weight computed from other tensors (weight_norm, spectral_norm, pruning)",
        ),
        (with_forward, TypeError, "forward replaced on the instance"),
        (
            lambda: nn.Conv2d(8, 8, 3, dtype=torch.complex64),
            TypeError,
            "weight of dtype complex64",
        ),
        (
            lambda: with_value(float("nan")),
            ValueError,
            "its weight holds NaN or infinity; check the checkpoint",
        ),
        (
            lambda: float_conv().to("meta"),
            ValueError,
            "on the meta device, without values; load its weights first",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_from_float_refuses(
    make: Callable[[], nn.Module], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as raised:
        QuantizedConv2d.from_float(make())
    start = {
        TypeError: "QuantizedConv2d.from_float: conv must be a plain nn.Conv2d, got ",
        ValueError: "QuantizedConv2d.from_float: conv cannot be quantized: ",
    }
    assert str(raised.value) == start[error] + text
    if error is TypeError:
        with pytest.raises(TypeError, match=r"QATConv2d.from_float: conv must be a plain"):
            QATConv2d.from_float(make())


def test_the_range_of_static_activations_is_needed() -> None:
    with pytest.raises(ValueError, match=r"^QuantizedConv2d.from_float: input_scale must be given"):
        QuantizedConv2d.from_float(float_conv(), CONFIGS["static"])
    with pytest.raises(ValueError, match="input_scale and input_zero_point must be None for dyn"):
        QuantizedConv2d.from_float(float_conv(), input_scale=torch.ones(1))
