"""What holds for every tuner of peft: modules trained as a whole, and merges that would be lost."""

# peft may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from typing import Any

from torch import nn

from torchquant.convert.to_float import to_float_
from torchquant.integrations.extend import extend, is_extended
from torchquant.integrations.peft.layers import check_activation, quantized_in
from torchquant.nn.base import QuantizedModule


def extend_all() -> None:
    """Make ``modules_to_save`` train in float, and refuse merges that would change nothing."""
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.other import ModulesToSaveWrapper

    extend(ModulesToSaveWrapper, "update", _train_in_float)
    extend(BaseTuner, "merge_adapter", _merge_adapter)
    extend(BaseTuner, "_replace_module", _replace)
    extend(BaseTuner, "_unload_and_optionally_merge", _unload)


def _train_in_float(original: Any, self: Any, adapter_name: str, *args: Any, **options: Any) -> Any:
    """The copy that peft trains and saves holds float layers, because integers cannot be trained.

    The original module stays quantized; it is used where the adapters are disabled.
    """
    known = set(self.modules_to_save)
    result = original(self, adapter_name, *args, **options)
    for name in set(self.modules_to_save) - known:
        copy = self.modules_to_save[name]
        if any(isinstance(module, QuantizedModule) for module in copy.modules()):
            self.modules_to_save[name] = _floating(copy).requires_grad_(name == self.active_adapter)
    return result


def _floating(module: nn.Module) -> nn.Module:
    dtypes = {
        name: getattr(layer, "dtype", None)  # in which a model of bfloat16 computes
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedModule)
    }
    if isinstance(module, QuantizedModule):
        check_activation("modules_to_save", module, "")
        module = module.to_float()
    else:
        to_float_(module)
    for name, dtype in dtypes.items():
        module.get_submodule(name).to(dtype=dtype)
    return module


def _merge_adapter(original: Any, self: Any, *args: Any, **options: Any) -> None:
    _check_mergeable(self.model)
    original(self, *args, **options)


def _unload(original: Any, self: Any, merge: bool = True, *args: Any, **options: Any) -> Any:
    if merge:
        _check_mergeable(self.model)
    return original(self, merge, *args, **options)


def _replace(
    original: Any, self: Any, parent: nn.Module, name: str, new: nn.Module, child: nn.Module
) -> None:
    """Put a quantized layer back without assigning its own weight to it, as peft does."""
    if isinstance(new, QuantizedModule):
        setattr(parent, name, new)
    else:
        original(self, parent, name, new, child)


def _check_mergeable(model: nn.Module) -> None:
    """Raise if an adapter would be added to a copy of a quantized weight, and so get lost."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or quantized_in(module) is None:
            continue
        if not is_extended(type(module), "merge"):
            raise ValueError(
                f"merge: adapters on quantized layers must be LoRA or IA3, got {name!r} of type "
                f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}; call "
                "torchquant.to_float_(model) first"
            )
