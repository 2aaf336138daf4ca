"""``target_modules="all-linear"`` of peft, which looks for torch's linear layers only."""

# peft may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from torchquant.integrations.extend import extend
from torchquant.integrations.peft.layers import layer_in

_NAME = "_maybe_include_all_linear_layers"


def extend_all_linear() -> None:
    """Make "all-linear" include the layers of torchquant."""
    from peft.tuners import tuners_utils

    original = getattr(tuners_utils, _NAME)
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("peft.") and vars(module).get(_NAME) is original
    ]
    extend(tuners_utils, _NAME, _include)
    for module in users:
        setattr(module, _NAME, getattr(tuners_utils, _NAME))


def _include(original: Any, config: Any, model: nn.Module) -> Any:
    from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

    targets = getattr(config, "target_modules", None)
    everything = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    result = original(config, model)
    if everything:
        result.target_modules = set(result.target_modules) | _names(config, model)
    return result


def _names(config: Any, model: nn.Module) -> set[str]:
    """The names of the layers, without the head of the model and the parts of adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    heads = [id(head) for head in _heads(config, model)]
    adapted = [n for n, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return {
        name
        for name, module in model.named_modules()
        if not isinstance(module, BaseTunerLayer)
        and layer_in(module) is not None
        and id(module) not in heads
        and not any(name.startswith(f"{wrapper}.") for wrapper in adapted)
    }


def _heads(config: Any, model: Any) -> Iterator[nn.Module]:
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        yield output
    elif config.task_type == "SEQ_CLS":
        yield from (head for n in SEQ_CLS_HEAD_NAMES if (head := getattr(model, n, None)))
