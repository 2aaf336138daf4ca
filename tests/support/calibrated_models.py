"""Models that are calibrated, and what convert_ must make of them, layer by layer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from support import floats
from support.layers import assert_same_state
from torchquant import Int8StaticActivationInt8WeightConfig, QuantizationConfig
from torchquant.configs import (
    Calibration,
    Entropy,
    Histogram,
    MinMax,
    MovingAverage,
    Percentile,
)
from torchquant.convert.calibration_hooks import InputObserver, prepared_layers
from torchquant.nn.kinds import kind_of
from torchquant.training.calibration import observer_for

CALIBRATIONS: dict[str, Calibration] = {
    "minmax": MinMax(),
    "moving_average": MovingAverage(),
    "percentile": Percentile(),
    "histogram": Histogram(),
    "entropy": Entropy(),
}


def static(**options: Any) -> QuantizationConfig:
    return Int8StaticActivationInt8WeightConfig(**options)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()


def rows(count: int = 3, seed: int = 0) -> list[Tensor]:
    """Batches of different sizes."""
    return [floats(8 + 3 * i, 64, seed=seed + i) for i in range(count)]


def inputs_of(model: nn.Module, batches: Iterable[Any], run: Any) -> dict[str, list[Tensor]]:
    """The inputs of each layer of a kind that quantizes them, recorded by hooks of its own."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None and not kind.only_weights:
            record = found.setdefault(name, [])
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, record=record: record.append(args[0].clone())
                )
            )
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    for handle in handles:
        handle.remove()
    return found


def expected_layer(layer: nn.Module, config: QuantizationConfig, inputs: list[Tensor]) -> Any:
    """The quantized layer with the range that the observer of ``config`` finds in ``inputs``."""
    observer = observer_for(config.activations)
    for x in inputs:
        observer(x)
    scale, zero_point = observer.calculate_qparams()
    kind = kind_of(layer)
    assert kind is not None
    return kind.quantized.from_float(  # type: ignore[call-arg]
        layer, config, input_scale=scale, input_zero_point=zero_point
    )


def assert_layers_are(model: nn.Module, expected: dict[str, nn.Module]) -> None:
    for name, layer in expected.items():
        got = model.get_submodule(name)
        assert type(got) is type(layer)
        assert got.config == layer.config
        assert_same_state(got, layer)


def observer_states(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.clone() for key, value in hook.observer.state_dict().items()}
        for name, hook in prepared_layers(model).items()
    }


def hooks_of(model: nn.Module) -> dict[str, InputObserver]:
    return prepared_layers(model)
