"""The forward of a decoder whose blocks are computed in one call.

It replaces the forward on the instance, so the module keeps its class, its submodules, its hooks
and the names of its state. Calls that a step cannot serve run the forward of the class: several
sequences, padding, gradients, training, requested attention weights, other caches, and every call
after something was changed on which the plan relies. A changed decoder is compared again; if a step
still computes what it computes, the next calls are served again.
"""

# transformers may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import inspect
import os
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from torchquant._extension import load
from torchquant.chains.programs import may_use_kernels
from torchquant.integrations.transformers import decoder_structure as structure
from torchquant.integrations.transformers.decoder_check import (
    CACHE_NAMES,
    Calls,
    check,
    own_forward,
    parameters_of,
    tables_of,
)
from torchquant.integrations.transformers.decoder_plan import DecoderPlan, States, decode_reference
from torchquant.integrations.transformers.decoder_structure import Known, Refusal, is_captured

_library: Any = load()
_OF_FUNCTIONS = ("__signature__", "__code__", "__name__", "__qualname__", "__defaults__")
# A decoder may lack what reading a plan takes for granted; its own forward decides then.
FAILURES = (Refusal, AttributeError, KeyError, RuntimeError, TypeError, ValueError)
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_POSITIONS = ("position_ids", "cache_position")
_READ = frozenset(
    ("input_ids", "inputs_embeds", "attention_mask", "use_cache", *_POSITIONS, *CACHE_NAMES)
)


_forming = threading.RLock()  # one thread at a time reads and compares a plan


def _renew_lock() -> None:
    global _forming
    _forming = threading.RLock()


if hasattr(os, "register_at_fork"):  # in the child, a lock of another thread stays locked
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Formed:
    """What a forward needs to serve calls; a thread goes on with its own while another is formed.

    Attributes:
        plan: the blocks.
        step: the step in C++, or None.
        calls: how the decoder's own forward is called.
    """

    plan: DecoderPlan
    step: Any
    calls: Calls


class FusedForward:
    """The forward of one decoder.

    Args:
        decoder: the module, such as a ``LlamaModel``.
        name: its name in the model, for messages.

    Raises:
        Refusal: a step cannot compute what the decoder computes. Further ``FAILURES``: it is not
            what reading its plan takes for granted.
    """

    def __init__(self, decoder: nn.Module, name: str) -> None:
        self.decoder, self.name = decoder, name
        self._warned = False
        self._known = Known()
        self._parameters = parameters_of(decoder)
        self._form()

    def _form(self) -> Formed:
        """Read the plan, compare it, and be ready to run it."""
        # The guard and what holds as long as it does, read and written together.
        self._state: tuple[Any, Formed | None] | None = None
        plan = structure.plan_of(self.decoder, self._known)
        calls = check(self.decoder, plan)
        formed = Formed(plan, _step_of(plan), calls)
        self._watch(formed)
        return formed

    def _watch(self, formed: Formed | None) -> None:
        """Rely on the plan, or on the refusal of one (None), until something is changed."""
        absent = _library.Guard.ABSENT
        self._state = _library.Guard(structure.watched(self.decoder, absent)), formed

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads and compares its plan in its first call."""
        kept = ("decoder", "name", "_parameters")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._warned = False
        self._state = None
        self._known = Known()

    def __getattr__(self, name: str) -> Any:
        """What tools read of a forward: that of the decoder's class."""
        decoder = self.__dict__.get("decoder")
        if decoder is None or name not in _OF_FUNCTIONS:
            raise AttributeError(f"'FusedForward' object has no attribute {name!r}")
        if name == "__signature__":
            return inspect.signature(own_forward(decoder))
        return getattr(type(decoder).forward, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the decoder."""
        if not (
            torch.is_grad_enabled() or self.decoder.training or torch.compiler.is_dynamo_compiling()
        ):
            given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
            result = self._fused(given)
            if result is not None:
                return result
        return own_forward(self.decoder)(*args, **kwargs)

    def _fused(self, given: dict[str, Any]) -> Any:
        """The result of a step, or None if it cannot serve the call."""
        from torchquant.integrations.transformers import decoder_cache as caches

        ids, hidden = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if hidden is None else hidden
        if (ids is None) is (hidden is None) or type(source) is not Tensor:
            return None
        if source.shape[0] != 1 or source.dim() != (2 if hidden is None else 3):
            return None
        new = source.shape[1]
        if not new or not may_use_kernels([source]) or _asks_for_more(given) or is_captured():
            return None
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        if cache is not None and not caches.is_served(cache):
            return None
        past = 0 if cache is None else cache.get_seq_length()
        if not _all_tokens(given.get("attention_mask"), past + new):
            return None
        if any(not _ascending(given.get(name), past, new) for name in _POSITIONS):
            return None
        formed = self._formed()
        if formed is None:
            return None
        own = caches.FusedCache() if cache is None else cache
        modules: Any = self.decoder._modules
        if hidden is None:
            hidden = modules[structure.EMBEDDING](ids)
        if type(hidden) is not Tensor or hidden.dtype is not torch.float32 or not hidden.is_cpu:
            return None
        cos, sin = tables_of(self.decoder, hidden, past)
        states = caches.take(own, formed.plan, new)
        if states is None or states.position + states.recent != past:
            return None
        output = self.run(hidden[0], cos, sin, states, formed)
        caches.advance(own, new)
        last = formed.plan.final_norm(output)[None]
        wants_cache = given.get("use_cache")
        if wants_cache is None:
            wants_cache = getattr(self.decoder.config, "use_cache", True)
        kept = {formed.calls.cache: own} if cache is not None or wants_cache else {}
        return formed.calls.result(last_hidden_state=last, **kept)

    def run(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, states: States, formed: Formed
    ) -> Tensor:
        """All blocks, for new tokens ``[M, hidden_size]``."""
        if formed.step is None:
            return decode_reference(formed.plan, hidden, cos, sin, states)
        output: Tensor = formed.step.run(
            hidden,
            cos,
            sin,
            states.keys,
            states.values,
            states.position,
            states.bits,
            states.group_size,
            states.recent_keys,
            states.recent_values,
            states.recent,
        )
        return output

    def _formed(self) -> Formed | None:
        """What serves calls; None, with one warning, if no plan computes what the decoder does."""
        if any(getattr(global_hooks, name) for name in _GLOBAL_HOOKS):
            return None
        state = self._state
        if state is not None and state[0].holds():
            return state[1]
        with _forming:
            state = self._state  # another thread may have formed it
            if state is not None and state[0].holds():
                return state[1]
            try:
                return self._form()
            except FAILURES as reason:
                self._watch(None)  # until something else is changed
                self._warn(str(reason))
        return None

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            where = f"{self.name}: " if self.name else ""
            warnings.warn(
                f"{where}{reason}; its own forward runs instead of the fused decoder; undo the "
                "change, or call torchquant.unfuse_decoder_(model)",
                RuntimeWarning,
                stacklevel=6,
            )


def forward_of(module: nn.Module) -> FusedForward | None:
    """The forward that fuses a decoder, or None.

    Example:
        >>> print(forward_of(nn.Linear(2, 2)))
        None
    """
    found = module.__dict__.get("forward")
    return found if isinstance(found, FusedForward) else None


def _step_of(plan: DecoderPlan) -> Any:
    """The step in C++."""
    if not hasattr(_library, "Decoder"):
        return None
    names = ("q", "k", "v", "o", "gate", "up", "down")
    blocks = []
    for block in plan.blocks:
        layers = {
            name: layer.decoder_arguments() for name, layer in zip(names, block.layers, strict=True)
        }
        norms = {
            "input_norm": block.input_norm,
            "post_norm": block.post_norm,
            "q_norm": block.query_norm,
            "k_norm": block.key_norm,
        }
        pairs = {name: norm and (norm.weight, norm.eps) for name, norm in norms.items()}
        blocks.append({**layers, **pairs})
    sizes = plan.heads, plan.kv_heads, plan.head_dim
    return _library.Decoder(blocks, *sizes, plan.scale, plan.activation)


def _asks_for_more(given: dict[str, Any]) -> bool:
    """True if a call has arguments that change what the forward computes or returns."""
    for name, value in given.items():
        if name in _READ or value is None:
            continue
        if name == "return_dict":
            more = value is False
        else:
            more = value is not False or not name.startswith("output_")
        if more:
            return True
    return False


def _all_tokens(mask: Any, tokens: int) -> bool:
    """True if a mask hides none of the tokens."""
    if mask is None:
        return True
    if type(mask) is not Tensor or mask.dim() != 2 or tuple(mask.shape) != (1, tokens):
        return False
    return bool(mask.all())


def _ascending(positions: Any, past: int, new: int) -> bool:
    """True if positions are those of the new tokens behind the past ones."""
    if positions is None:
        return True
    if type(positions) is not Tensor or positions.numel() != new:
        return False
    if new == 1:
        return int(positions) == past
    return torch.equal(positions.flatten(), torch.arange(past, past + new, device=positions.device))
