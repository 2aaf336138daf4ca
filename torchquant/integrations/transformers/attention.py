"""replace_attention_ and restore_attention_: a transformers model's attention as one operator.

Beside int8 layers attention is what takes longest. transformers' models look up their attention
function by name in a registry, so no module is replaced and no forward rewritten: the configuration
that an attention module reads gets another name.
"""

# transformers may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from torchquant.integrations.transformers.attention_function import (
    NAME,
    REPLACES,
    Implementation,
    register,
)
from torchquant.integrations.transformers.attention_modules import (
    attention_modules,
    reason_against,
)
from torchquant.report import Report, RowReport


@dataclass(frozen=True)
class AttentionRow(RowReport):
    """What a verb did to one attention module.

    Attributes:
        name: the module's name in the model.
        kind: the name of its class.
        action: "replaced", "restored" or "left".
        reason: why the module was left; empty if it was not.

    Example:
        >>> print(AttentionRow("h.0.attn", "BloomAttention", "left", "no sdpa"))
        left: h.0.attn (BloomAttention): no sdpa
    """

    action: Literal["replaced", "restored", "left"]
    reason: str = ""


@dataclass(frozen=True, repr=False)
class AttentionReport(Report):
    """Result of :func:`torchquant.replace_attention_` and :func:`torchquant.restore_attention_`.

    Attributes:
        rows: one row per attention module, in the order of the model's modules.
        notes: sentences that the user should read.
        action: what the verb does to a module: "replaced" or "restored".

    Example:
        >>> names = [f"layers.{index}.attn" for index in range(6)]
        >>> rows = tuple(AttentionRow(name, "LlamaAttention", "replaced") for name in names)
        >>> AttentionReport(rows)
        <AttentionReport: 6 of 6 attention modules replaced>
    """

    rows: tuple[AttentionRow, ...]
    notes: tuple[str, ...] = ()
    action: Literal["replaced", "restored"] = "replaced"

    @property
    def changed(self) -> tuple[AttentionRow, ...]:
        """The modules that the verb changed."""
        return tuple(row for row in self.rows if row.action == self.action)

    def summary(self) -> str:
        """One line with the number of modules."""
        return f"{len(self.changed)} of {len(self.rows)} attention modules {self.action}"


def replace_attention_(model: nn.Module) -> AttentionReport:
    """Make a transformers model compute attention with :func:`torchquant.ops.attention`, in place.

    Queries, keys, values and attention weights are rounded to bfloat16 before they are multiplied.
    For a bfloat16 model that is what it did before; in a float32 model attention gets bfloat16's 8
    bits. It pays on CPUs with AMX; on others torch's own attention is as fast or faster.

    Only modules whose attention implementation is ``sdpa`` are replaced; the report names the
    others, such as those of T5, which add a position bias. Calls that the operator does not serve
    are left to transformers' ``sdpa``: a single query (a decoding step), dropout in training, paged
    caches, other devices. A decoding step with a
    :class:`~torchquant.integrations.transformers.QuantizedCache` reads the cache's integers
    (:func:`torchquant.ops.attention_cached`).

    :func:`restore_attention_` undoes the replacement. It is not saved, neither by
    ``save_pretrained`` nor by :func:`torchquant.save`: call this function again after
    :func:`torchquant.load`.

    Args:
        model: a model of the transformers library.

    Returns:
        A report with one row per attention module.

    Raises:
        TypeError: model is not a transformers model.
        ValueError: no module uses ``sdpa``, but the model could. The model is unchanged.

    Example:
        >>> replace_attention_(nn.Linear(8, 8))
        Traceback (most recent call last):
        TypeError: replace_attention_: model must be a transformers model, got Linear
    """
    _check_model("replace_attention_", model)
    register()
    rows: list[AttentionRow] = []
    configs: dict[int, Any] = {}
    others: set[Any] = set()
    for name, module, owner in attention_modules(model):
        kind, reason = type(module).__name__, reason_against(module, owner)
        config: Any = getattr(module, "config", None)
        current = getattr(config, "_attn_implementation", None)
        if not reason and current not in (REPLACES, NAME):
            others.add(current)
            reason = (
                f"it uses the attention implementation {current!r}; only {REPLACES!r} is replaced"
            )
        if not reason:
            configs[id(config)] = config
        rows.append(AttentionRow(name, kind, "left" if reason else "replaced", reason))
    if others and not configs:
        raise ValueError(
            f"replace_attention_: model must use attention implementation {REPLACES!r}, got "
            f"{', '.join(map(repr, sorted(map(str, others))))}; load it with "
            f"attn_implementation={REPLACES!r}"
        )
    for config in configs.values():  # from here on the model changes; nothing can fail
        config._attn_implementation_internal = Implementation(NAME)
    notes = () if rows else ("The model has no attention modules; nothing was replaced.",)
    return AttentionReport(tuple(rows), notes)


def restore_attention_(model: nn.Module) -> AttentionReport:
    """Undo :func:`replace_attention_`, in place: replaced modules use ``sdpa`` again.

    Args:
        model: a model of the transformers library, with or without replaced attention.

    Returns:
        A report with one row per attention module that was restored.

    Raises:
        TypeError: model is not a transformers model.

    Example:
        >>> restore_attention_(nn.Linear(8, 8))
        Traceback (most recent call last):
        TypeError: restore_attention_: model must be a transformers model, got Linear
    """
    _check_model("restore_attention_", model)
    rows = [
        AttentionRow(name, type(module).__name__, "restored")
        for name, module, _ in attention_modules(model)
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME
    ]
    for config in _configs(model):
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = REPLACES
    return AttentionReport(tuple(rows), (), "restored")


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configurations of all modules, with those that they hold."""
    held = [getattr(module, "config", None) for module in model.modules()]
    seen: set[int] = set()
    while held:
        config = held.pop()
        if id(config) in seen or not hasattr(config, "_attn_implementation"):
            continue
        seen.add(id(config))
        held += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
        yield config


def _check_model(verb: str, model: object) -> None:
    if not hasattr(model, "set_attn_implementation") or "transformers" not in sys.modules:
        name = type(model).__name__
        raise TypeError(f"{verb}: model must be a transformers model, got {name}")
