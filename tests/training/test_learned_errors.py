"""Learned quantizers: the errors of wrong arguments, word for word."""

from collections.abc import Callable

import pytest
import torch
from support import floats
from torch import nn

import torchquant
from torchquant import LSQPlusQuantizer, LSQQuantizer, PACTQuantizer, parameter_groups

ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "bits": (
        lambda: LSQQuantizer(1),
        ValueError,
        r"bits must be an integer from 2 to 8, got 1",
    ),
    "num_channels": (
        lambda: LSQQuantizer(4, True, False, 3),
        ValueError,
        r"LSQQuantizer: num_channels must be 1 without per_channel, got 3; pass per_channel=True",
    ),
    "no_channels": (
        lambda: LSQPlusQuantizer(4, True, 0),
        ValueError,
        r"LSQPlusQuantizer: num_channels must be an integer of at least 1, got 0",
    ),
    "num_features": (
        lambda: LSQQuantizer(4, num_features=2.5),  # type: ignore[arg-type]
        ValueError,
        r"LSQQuantizer: num_features must be an integer of at least 1, got 2.5",
    ),
    "axis": (
        lambda: LSQQuantizer(4, axis=None),  # type: ignore[arg-type]
        ValueError,
        r"LSQQuantizer: axis must be an integer, got None",
    ),
    "process_group": (
        lambda: LSQQuantizer(4, process_group=3),
        TypeError,
        r"LSQQuantizer: process_group must be None .*, got int 3",
    ),
    "integers": (
        lambda: LSQQuantizer(4)(torch.ones(2, dtype=torch.int8)),
        TypeError,
        r"LSQQuantizer: input must be float32, bfloat16 or float16, got int8 \[2\]; convert",
    ),
    "device": (
        lambda: LSQQuantizer(4)(torch.ones(2, device="meta")),
        ValueError,
        r"LSQQuantizer: input must be on the module's device cpu, got meta; move one of them",
    ),
    "channels": (
        lambda: LSQQuantizer(4, True, True, 3)(torch.ones(2, 3)),
        ValueError,
        r"LSQQuantizer: input must have num_channels = 3 along axis 0, got \[2, 3\]",
    ),
    "no_such_axis": (
        lambda: LSQQuantizer(4, True, True, 3, axis=1).initialize(torch.ones(3)),
        ValueError,
        r"LSQQuantizer: input must have num_channels = 3 along axis 1, got \[3\]",
    ),
    "alpha": (
        lambda: PACTQuantizer(4, alpha=-1.0),
        ValueError,
        r"PACTQuantizer: alpha must be a positive number, got -1.0",
    ),
    "pact_integers": (
        lambda: PACTQuantizer(4)(torch.ones(2, dtype=torch.int8)),
        TypeError,
        r"PACTQuantizer: input must be float32, bfloat16 or float16, got int8 \[2\]",
    ),
    "groups": (
        lambda: parameter_groups([]),  # type: ignore[arg-type]
        TypeError,
        r"parameter_groups: model must be an nn.Module, got list",
    ),
    "weight_decay": (
        lambda: parameter_groups(nn.Linear(1, 1), -0.1),
        ValueError,
        r"parameter_groups: weight_decay must be a number of at least 0, got -0.1",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_low_precision_step_is_refused() -> None:
    quantizer = LSQQuantizer(4)
    quantizer(floats(2, 2))
    quantizer.step.data = quantizer.step.data.bfloat16()
    with pytest.raises(TypeError, match=r"step must be float32, .* fully_shard\(quantizer\)"):
        quantizer(floats(2, 2))


def test_exported_at_top_level() -> None:
    for name in ("LSQQuantizer", "LSQPlusQuantizer", "PACTQuantizer", "parameter_groups"):
        assert name in torchquant.__all__
