"""A rotation of one stream: the parameters that change, and their values of before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.streams import Gain, Stream

__all__ = ["Rotation"]

_ROWS = 4096  # of a table, which are rotated at a time


class Rotation:
    """Rotates a stream of a model, and undoes it.

    Attributes:
        stream: the stream.
        notes: what the user should know: which weights are no longer shared.

    Example:
        >>> from torchquant.algorithms.streams import find_streams
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.RMSNorm(4), nn.Linear(4, 2)).eval()
        >>> before = model(torch.arange(3))
        >>> rotation = Rotation(model, find_streams(model, [torch.arange(3)]).streams[0])
        >>> rotation.apply(torch.eye(4, dtype=torch.float64).flip(0))
        >>> torch.allclose(model(torch.arange(3)), before, atol=1e-6)
        True
        >>> rotation.restore()
    """

    def __init__(self, model: nn.Module, stream: Stream) -> None:
        self.model, self.stream = model, stream
        self.notes: list[str] = []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._owners: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._config: Any = None
        self._done: set[str] = set()  # names of parameters that another name changes

    @torch.no_grad()
    def apply(self, matrix: Tensor) -> None:
        """Rotate the stream: row vectors are multiplied by the matrix.

        Args:
            matrix: float64 ``[channels, channels]``, orthogonal.
        """
        try:
            self._separate()
            for gain in self.stream.gains:
                self._take(gain, matrix)
            for name, axis in (*self.stream.readers, *self.stream.written):
                self._rotate(name, axis, matrix)
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Give all parameters their values of before."""
        for parameter, value in self._values.values():
            parameter.copy_(value)
        for module, name, parameter in self._owners:
            module._parameters[name] = parameter
        if self._config is not None:
            self._config.tie_word_embeddings = True
        self._values, self._owners, self._config = {}, [], None

    def _take(self, gain: Gain, matrix: Tensor) -> None:
        """The readers of a norm take over its gain, and perhaps its bias."""
        values = self.model.get_parameter(gain.name)
        factors = values.double() + gain.offset
        for name in gain.biases:
            self._take_bias(gain, self.model.get_parameter(name), factors, matrix)
        for name, axis in gain.readers:
            self._rotate(name, axis, matrix, factors)
        self._write(values, torch.ones_like(factors) - gain.offset)

    def _take_bias(self, gain: Gain, bias: Tensor, factors: Tensor, matrix: Tensor) -> None:
        added = bias.double()
        if not bool(added.any()):
            return
        later = [self.stream.biases.get(name) for name, _ in gain.readers]
        if None in later:  # it is added before the readers multiply by the gain
            self._write(bias, (added / factors) @ matrix.to(added.device))
            return
        for (name, axis), other in zip(gain.readers, later, strict=True):
            assert other is not None
            weight, own = self.model.get_parameter(name), self.model.get_parameter(other)
            self._write(own, own.double() + weight.double().movedim(axis, -1) @ added)
        self._write(bias, torch.zeros_like(added))

    def _rotate(self, name: str, axis: int, matrix: Tensor, factors: Tensor | None = None) -> None:
        """Multiply a dimension of a parameter by a gain and by the matrix."""
        if name in self._done:
            return
        parameter = self.model.get_parameter(name)
        matrix = matrix.to(parameter.device)
        if factors is not None:
            matrix = factors[:, None] * matrix
        moved = parameter.movedim(axis, -1)
        rows = moved.reshape(-1, moved.shape[-1])
        parts = [(part.double() @ matrix).to(parameter.dtype) for part in rows.split(_ROWS)]
        self._write(parameter, torch.cat(parts).view(moved.shape).movedim(-1, axis))

    def _write(self, parameter: Tensor, values: Tensor) -> None:
        self._values.setdefault(id(parameter), (parameter, parameter.clone()))
        parameter.copy_(values)

    # ------------------------------------------------------------ shared weights

    def _separate(self) -> None:
        """Give modules that share a parameter their own where it changes in different ways."""
        roles: dict[str, set[tuple[int, str | None]]] = {}
        for name, axis in (*self.stream.written, *self.stream.readers):
            roles.setdefault(name, set()).add((axis, None))
        for gain in self.stream.gains:
            for name, axis in gain.readers:
                roles.setdefault(name, set()).add((axis, gain.name))
        for places in self._shared():
            names = [_joined(module, attribute) for module, _, attribute in places]
            if all(roles.get(name) == roles.get(names[0]) for name in names):
                self._done.update(names[1:])
                continue
            for (_, module, attribute), name in zip(places[1:], names[1:], strict=True):
                parameter = module._parameters[attribute]
                assert parameter is not None
                self._owners.append((module, attribute, parameter))
                own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[attribute] = own
                self.notes.append(f"{name} no longer shares the values of {names[0]}.")
            config: Any = getattr(self.model, "config", None)
            if getattr(config, "tie_word_embeddings", False) is True:
                config.tie_word_embeddings = False  # transformers would tie them when it loads
                self._config = config
                self.notes.append("config.tie_word_embeddings is False now.")

    def _shared(self) -> list[list[tuple[str, nn.Module, str]]]:
        """The modules and attributes of each parameter that several have."""
        found: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for name, module in self.model.named_modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    found.setdefault(id(parameter), []).append((name, module, attribute))
        return [places for places in found.values() if len(places) > 1]


def _joined(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute
