"""Tensors that several keys of a state dict share: stored once, and tied again after loading."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.graph.modules import memory_key
from torchquant.nn.base import QuantizedModule
from torchquant.nn.shared_weight import share_weight


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Collect the tensors to store.

    Returns:
        The tensors by key, and the aliases: the other keys of a shared tensor, each with the key
        under which the tensor is stored.

    Raises:
        ValueError: a value of the state dict is not a dense tensor, or has no values.
    """
    tensors: dict[str, Tensor] = {}
    aliases = _repeated_qweights(model)
    first_key: dict[Hashable, str] = {}
    with _qweights_on_cpu(model):
        state = model.state_dict()  # keeps the tensors alive, so that their addresses stay unique
    for key, value in state.items():
        if key in aliases:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"save: the state dict must hold tensors only, got {type(value).__name__} at "
                f"{key!r}; modules with get_extra_state() cannot be stored in safetensors"
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise ValueError(
                f"save: tensors must be dense, got {key!r} of {value.dtype} and {value.layout}"
            )
        if value.is_meta:
            raise ValueError(
                f"save: tensors must have values, got {key!r} on the meta device; load the model "
                "first"
            )
        first = first_key.setdefault(memory_key(value), key)
        if first != key:
            aliases[key] = first
        else:
            tensors[key] = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return _unshared(tensors), aliases


@contextmanager
def _qweights_on_cpu(model: nn.Module) -> Iterator[None]:
    """Move what is unpacked to the CPU while a state dict is created.

    All unpacked weights together would need the memory of a second model on the GPU.
    """

    def move(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in module.layout.tensors:  # type: ignore[union-attr]
            key = f"{prefix}{name}"
            if key in state:  # another hook may have removed it
                state[key] = state[key].cpu()

    handles = [
        module.register_state_dict_post_hook(move)
        for module in model.modules()
        if isinstance(module, QuantizedModule) and module.packed.is_cuda
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeated_qweights(model: nn.Module) -> dict[str, str]:
    """Aliases of layers that share a weight or are registered twice, which is unpacked for each."""
    first_name: dict[int, str] = {}
    aliases = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedModule):
            shared = module.shared_weight  # of tied layers
            first = first_name.setdefault(id(module if shared is None else shared), name)
            if first != name:
                for key in module.layout.tensors:
                    aliases[f"{name}.{key}"] = f"{first}.{key}"
    return aliases


def share_again(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Let layers have one quantized weight if the file stores their integers once.

    Args:
        model: the model that was loaded.
        aliases: the keys of shared tensors in the file, each with the key of the tensor.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, source in aliases.items():
        layer, first = (modules.get(name.rpartition(".")[0]) for name in (key, source))
        if key.rpartition(".")[2] != "qweight" or layer is first:
            continue
        if isinstance(layer, QuantizedModule) and isinstance(first, QuantizedModule):
            share_weight([first, layer])


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share a storage, because safetensors refuses overlapping memory."""
    seen: set[int] = set()
    for key, value in tensors.items():
        storage = value.untyped_storage().data_ptr()
        if value.numel() and storage in seen:
            tensors[key] = value.clone()
        seen.add(storage)
    return tensors


def as_tied(
    state: Mapping[str, Tensor],
    current: Mapping[str, Tensor | None],
    quantized: Container[str],
    device: torch.device,
) -> dict[str, Tensor]:
    """Copy the state to a device; tied keys share one tensor.

    The ties are those of the model. ``.to("meta")`` unties parameters, so the ties of the file are
    used for tensors on the meta device, except for the integers and scales of quantized layers,
    which are tied only as modules.
    """
    ready: dict[str, Tensor] = {}
    made: dict[Hashable, Tensor] = {}
    for key, tensor in state.items():
        here = current[key]
        if here is None:
            ready[key] = tensor.to(device, copy=True)
            continue
        layer, _, name = key.rpartition(".")
        trained = isinstance(here, nn.Parameter)
        untied = here.is_meta and (trained or layer not in quantized)
        tie = ("file", id(tensor)) if untied else ("model", memory_key(here))
        if tie not in made:
            # A copy, because these are views of the mapped file; packing a qweight also copies.
            packs = name == "qweight" and layer in quantized
            own = tensor.to(device, copy=not packs)
            made[tie] = nn.Parameter(own, here.requires_grad) if trained else own
        ready[key] = made[tie]
    return ready
