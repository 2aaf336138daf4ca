"""What a verb is asked to change: filter_fn as a function or as name patterns, and configurations.

A pattern is a glob over a module's name (``encoder.*.q_proj``); ``*`` also stands for dots. A
pattern for filter_fn that starts with ``!`` excludes. A dictionary of patterns gives layers
different configurations.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

from torch import nn

FilterFn = Callable[[nn.Module, str], bool] | str | Sequence[str]
_BLOCK = re.compile(r"(?<![^.])\d+(?![^.])")
Named = tuple[nn.Module, list[str]]  # a module and its names in the model
Config = TypeVar("Config")


def matches(name: str, pattern: str) -> bool:
    """True if a pattern stands for a module's name.

    Example:
        >>> matches("encoder.layers.0.q_proj", "encoder.*.q_proj"), matches("a[0]", "a[0]")
        (True, True)
    """
    return name == pattern or fnmatchcase(name, pattern)


class Filter:
    """The filter_fn of a verb.

    Args:
        who: the name of the verb, with which messages start.
        filter_fn: None, a function of ``(module, name)``, a pattern, or several patterns. A module
            is selected if one of the patterns matches one of its names and no pattern with ``!``
            does. If all patterns have ``!``, they exclude from the layers that None selects.

    Raises:
        TypeError: filter_fn is none of these.
        ValueError: a pattern is empty, or there is no pattern.

    Example:
        >>> chosen = Filter("quantize_", ["encoder.*", "!*.out"])
        >>> chosen.selects(nn.Identity(), ["encoder.q"]), chosen.selects(nn.Identity(), ["head"])
        (True, False)
    """

    def __init__(self, who: str, filter_fn: FilterFn | None) -> None:
        self.function: Callable[[nn.Module, str], Any] | None = None
        self.patterns: tuple[str, ...] = ()
        if callable(filter_fn):
            _check_signature(who, filter_fn)
            self.function = filter_fn
        elif filter_fn is not None:
            self.patterns = _checked_patterns(who, filter_fn)
        self.included = tuple(p for p in self.patterns if not p.startswith("!"))
        self.excluded = tuple(p[1:] for p in self.patterns if p.startswith("!"))
        self.given = filter_fn is not None
        self.chooses = self.function is not None or bool(self.included)

    def selects(self, module: nn.Module, names: Iterable[str]) -> bool:
        """True if the filter selects a module by one of its names."""
        if self.function is not None:
            return any(self.function(module, name) for name in names)
        names = list(names)
        included = not self.included or _any_match(names, self.included)
        return included and not _any_match(names, self.excluded)

    def asks_for(
        self, model: nn.Module, modules: Sequence[tuple[nn.Module, list[str]]]
    ) -> list[bool]:
        """For each module of another kind, whether the filter asks for it in particular.

        A filter that also accepts the model itself, with the name "", asks for no module in
        particular: it only excludes (``lambda module, name: name != "head"``). An exception of a
        function counts as False, because filters may be written for layers of a kind.
        """
        if not modules or not self.chooses or self.accepts(model, [""]):
            return [False] * len(modules)
        return [self.accepts(module, names) for module, names in modules]

    def accepts(self, module: nn.Module, names: list[str]) -> bool:
        """Like :meth:`selects`, but an exception of the function counts as False."""
        try:
            return self.selects(module, names)
        except Exception:
            return False

    def selects_only(
        self, marked: Sequence[bool], steps: Sequence[tuple[nn.Module, list[str]]]
    ) -> set[int]:
        """Places of marked layers that the filter names without naming a layer that is not marked.

        Each pattern is looked at alone; a function is looked at as a whole.
        """
        if self.function is not None:
            return _only(marked, [self.accepts(*step) for step in steps])
        return {
            place
            for pattern in self.included
            for place in _only(marked, [_any_match(names, [pattern]) for _, names in steps])
        }


@dataclass
class Selection(Generic[Config]):
    """The layers that a verb is asked to change, and the configuration of each.

    Args:
        filter: the verb's filter_fn.
        configs: configurations by pattern, or one configuration under None for all layers. The
            first pattern that matches decides; the value None leaves a layer in float.
        decided: the patterns that decided about a layer; :meth:`config_of` fills it.
    """

    filter: Filter
    configs: Mapping[str | None, Config | None]
    decided: set[str] = field(default_factory=set)

    @property
    def by_pattern(self) -> bool:
        """True if layers may have different configurations."""
        return None not in self.configs

    def config_of(self, names: Sequence[str]) -> tuple[str | None, Config | None, str | None]:
        """The pattern that decides about a layer, its configuration, and a reason to leave it."""
        if not self.by_pattern:
            return None, self.configs[None], None
        for pattern, config in self.configs.items():
            assert pattern is not None
            if _any_match(names, [pattern]):
                self.decided.add(pattern)
                reason = f"None for the pattern {pattern!r}" if config is None else None
                return pattern, config, reason
        return None, None, "no pattern of config matches"

    def config_for(self, names: Sequence[str]) -> Config | None:
        """The configuration of a layer with these names, as a question: nothing is recorded."""
        for pattern, config in self.configs.items():
            if pattern is None or _any_match(names, [pattern]):
                return config
        return None

    def named_in_full(self, names: Sequence[str]) -> bool:
        """True if a key of the configurations is the layer's name, without a wildcard."""
        return any(name in self.configs for name in names)

    def problems(self, modules: Sequence[list[str]], containers: Iterable[str]) -> Iterator[str]:
        """What matches nothing: a sentence without its full stop for each pattern.

        Args:
            modules: the names of every module with parameters.
            containers: the names of all other modules.
        """
        names = [name for group in modules for name in group]
        known = {*names}
        for pattern in (*self.filter.included, *self.filter.excluded):
            if not any(matches(name, pattern) for name in names):
                yield _unmatched("filter_fn", pattern, known, containers)
        if self.by_pattern:
            for key in self.configs:
                assert key is not None
                if not any(matches(name, key) for name in names):
                    yield _unmatched("config", key, known, containers)
                elif key not in self.decided:
                    yield (
                        f"the pattern {key!r} of config decides about no layer: earlier patterns "
                        "match its layers, or they belong to no kind"
                    )


def selection(
    who: str, filter_fn: FilterFn | None, config: Any, check: Callable[[Any], Config]
) -> Selection[Config]:
    """The selection that the arguments of a verb describe.

    Args:
        who: the name of the verb, with which messages start.
        filter_fn: the argument of the verb.
        config: the argument of the verb: a configuration, or configurations by pattern.
        check: takes a configuration; returns the one to use, or raises.

    Raises:
        TypeError: filter_fn or config is of another type.
        ValueError: a pattern is empty, or there is no pattern.

    Example:
        >>> chosen = selection("quantize_", None, {"head": None, "*": 4}, int)
        >>> chosen.config_of(["head"]), chosen.config_of(["body"])
        (('head', None, "None for the pattern 'head'"), ('*', 4, None))
    """
    chosen = Filter(who, filter_fn)
    if not isinstance(config, Mapping):
        return Selection(chosen, {None: check(config)})
    if not config:
        raise ValueError(f"{who}: config must have at least one pattern, got {config!r}")
    for pattern in config:
        if not isinstance(pattern, str) or not pattern or pattern.startswith("!"):
            raise ValueError(
                f"{who}: a pattern of config must be a name or a glob such as 'encoder.*', got "
                f"{pattern!r}; the value None leaves layers in float"
            )
    return Selection(
        chosen,
        {pattern: None if value is None else check(value) for pattern, value in config.items()},
    )


def _check_signature(who: str, function: Callable[..., Any]) -> None:
    """Raise a TypeError if a function cannot be called with a module and a name."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(None, "")
    except TypeError:
        raise TypeError(
            f"{who}: filter_fn must be a function of (module, name), got one of {signature}"
        ) from None


def _checked_patterns(who: str, filter_fn: Any) -> tuple[str, ...]:
    single = isinstance(filter_fn, str)
    patterns = (filter_fn,) if single else filter_fn
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise TypeError(
            f"{who}: filter_fn must be a function of (module, name), a name pattern such as "
            f"'encoder.*', or a list of patterns, got {filter_fn!r}"
        )
    if not patterns or not all(pattern.removeprefix("!") for pattern in patterns):
        raise ValueError(
            f"{who}: filter_fn must have patterns that are not empty, got {filter_fn!r}; None "
            "selects all layers"
        )
    return tuple(patterns)


def _any_match(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for name in names for pattern in patterns)


def _only(marked: Sequence[bool], selected: Sequence[bool]) -> set[int]:
    places = {place for place, chosen in enumerate(selected) if chosen}
    return places if all(marked[place] for place in places) else set()


def _unmatched(argument: str, pattern: str, names: set[str], containers: Iterable[str]) -> str:
    text = f"the pattern {pattern!r} of {argument} matches no module with parameters"
    if pattern in containers:
        return f"{text}; the layers inside {pattern} are {pattern + '.*'!r}"
    # A pattern with a wildcard is compared with the names of blocks without their numbers.
    known = {_BLOCK.sub("*", name) for name in names} if "*" in pattern else names
    near = difflib.get_close_matches(pattern, known, 1)
    return f"{text}; did you mean {near[0]!r}?" if near else text


__all__ = ["Filter", "FilterFn", "Selection", "matches", "selection"]
