"""What every quantized and every trained layer does: state, files, devices, copies.

:class:`QuantizedModule` holds one packed weight and float32 scales next to it. Its state dict, its
pickles and its copies hold the canonical integers instead of the packed ones, so they depend on no
device and no layout. :class:`TrainedModule` holds the float parameters of a layer that trains on
the integers it will be deployed with.

Verbs, files, reports and comparisons use these two classes and :mod:`torchquant.nn.kinds`; no code
outside this package tests for one kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchquant.configs import QuantizationConfig, config_from_dict, config_to_dict
from torchquant.nn.weight import INT8, WeightFormat
from torchquant.ops._arguments import wait_for_copy
from torchquant.training.configuration import TrainingConfig

Canonical = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class QuantizedModule(nn.Module):
    """A layer on integers; the base class of every kind of quantized layer.

    A subclass

    - sets ``config``, ``activation`` and what :meth:`entry` and :meth:`from_entry` store, registers
      the buffer ``packed`` (with :meth:`register_weight`), ``weight_scale``, and whatever else it
      keeps;
    - defines :attr:`weight_shape`, :meth:`canonical`, :meth:`from_float`, :meth:`to_float`,
      :meth:`forward` and :meth:`probe`.

    Its ``forward`` reads its buffers itself: the base class adds no call to it.

    Attributes:
        packed: the weight in the layout of the kernels of its device.
        weight_scale: float32; where this buffer is, the layer is.
        config: how the layer is quantized.
        activation: the activation function that the layer computes at its end, or "none".

    Example:
        >>> from torchquant.nn import QuantizedLinear
        >>> layer = QuantizedLinear(64, 32)
        >>> isinstance(layer, QuantizedModule), layer.canonical()["qweight"]
        (True, (torch.int8, (32, 64)))
    """

    packed: Tensor
    weight_scale: Tensor
    config: QuantizationConfig
    activation: str = "none"
    weight_format: ClassVar[WeightFormat] = INT8
    # The class that computes several layers of this kind on one input in one go, or None. Its
    # obstacle(members) gives a reason against it; its instances take members in with join().
    group_type: ClassVar[Any] = None
    # The group that this layer is in, and its place in the group.
    _group: Any = None
    _group_index: int = 0
    # Arguments of __init__ with attributes of the same name, which files hold: plain values, and
    # for optional tensors such as `bias` whether there is one.
    stored: ClassVar[tuple[str, ...]] = ()

    # ---------------------------------------------------------------- what a kind defines

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that the integers stand for."""
        raise _missing(self, "weight_shape")

    def canonical(self) -> Canonical:
        """Name -> (dtype, shape) of each tensor of the layer's state dict."""
        raise _missing(self, "canonical")

    @classmethod
    def config_refusal(cls, config: QuantizationConfig) -> str | None:
        """Why no layer of this kind can have ``config``; None where one can."""
        return None

    @classmethod
    def from_float(cls, module: Any, config: QuantizationConfig | None = None) -> Any:
        """Quantize a float layer; the float layer is left as it is."""
        raise _missing(cls, "from_float")

    def to_float(self) -> nn.Module:
        """A float layer with the values that the integers stand for, without the activation."""
        raise _missing(self, "to_float")

    def probe(self, rows: int, generator: torch.Generator) -> Tensor:
        """``rows`` random float32 inputs on the CPU, for trials of a changed layer."""
        raise _missing(self, "probe")

    # ---------------------------------------------------------------- what all kinds share

    def register_weight(self, packed: Tensor) -> None:
        """Register the packed weight; it is no part of a state dict, which holds ``qweight``."""
        # Never a buffer called `weight`: tie_weights() of transformers would overwrite it.
        self.register_buffer("packed", packed, persistent=False)

    @property
    def qweight(self) -> Tensor:
        """The canonical integers of the weight, unpacked anew on each access."""
        return self.weight_format.unpack(self.packed, self.weight_shape)

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self.packed.device

    def entry(self) -> dict[str, Any]:
        """What a file holds of the layer next to its tensors, as JSON-ready values."""
        values = {name: self.stored_value(self, name) for name in self.stored}
        config = config_to_dict(self.config)
        return {**values, "config": config, "format": self.weight_format.name}

    @classmethod
    def stored_value(cls, module: nn.Module, name: str) -> Any:
        """What a file holds of an argument in ``stored``, from a float or a quantized layer."""
        value = getattr(module, name, None)
        if value is None or isinstance(value, Tensor):  # __init__ takes whether there is one
            return value is not None
        return value

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> QuantizedModule:
        """An empty layer as :meth:`entry` describes it, on the meta device.

        Raises:
            KeyError, TypeError, ValueError: the entry does not describe a layer of this kind.
        """
        if entry["format"] != cls.weight_format.name:
            raise ValueError(
                f"weight format must be {cls.weight_format.name!r}, got {entry['format']!r}; the "
                "file may be from a newer torchquant"
            )
        values = {name: entry[name] for name in cls.stored}
        return cls(**values, config=config_from_dict(entry["config"]), device="meta")

    def weight_replaced(self) -> None:
        """Called after ``packed`` became another tensor; does nothing by default."""

    # State: canonical outside, packed inside.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        packed = self.packed
        self._buffers["packed"] = None
        try:
            super()._apply(keep_dtype, recurse)
            moved = self._moved(packed, keep_dtype)
        except BaseException:
            self._buffers["packed"] = packed
            raise
        self.packed = moved
        if moved is not packed:
            self.weight_replaced()
        return self

    def _moved(self, packed: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """The packed weight where ``fn`` has put the scales, in that device's layout."""
        device = self.weight_scale.device
        if device.type == packed.device.type:
            return fn(packed)
        if packed.is_meta or device.type == "meta":  # to_empty(): no values, but a valid layout
            return self.weight_format.empty(self.weight_shape, device)
        qweight = self.weight_format.unpack(packed, self.weight_shape)
        moved = fn(qweight)
        wait_for_copy(qweight, moved)
        return self.weight_format.pack(moved)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # Named one by one: whatever else was put on the layer (a tied `weight`) is not its state.
        for name in self.canonical():
            tensor = getattr(self, name)
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        canonical = self.canonical()
        rest = dict(state_dict)
        for name, (dtype, _) in canonical.items():  # a file may have been converted to bfloat16
            value = rest.get(prefix + name)
            if isinstance(value, Tensor) and value.is_floating_point() and dtype == torch.float32:
                rest[prefix + name] = as_float32(value)
        assign = local_metadata.get("assign_to_params_buffers", False)
        problems = self._state_problems(canonical, rest, prefix, assign)
        if problems:  # all or nothing: scales of one layer on the integers of another are nonsense
            error_msgs.extend(problems)
            return
        for name, other in self._parameters.items():  # a tied `weight`: it loads as itself
            if name not in canonical and other is not None:
                rest.setdefault(prefix + name, other)
        qweight = rest.pop(prefix + "qweight", None)
        if qweight is None and strict:
            missing_keys.append(prefix + "qweight")
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if qweight is None:
            return
        if assign:
            self._load_qweight_by_assignment(qweight)
        elif not self.packed.is_meta:  # torch has warned that copying into meta does nothing
            with torch.no_grad():
                self.packed.copy_(self.weight_format.pack(qweight.to(self.packed.device)))

    def _load_qweight_by_assignment(self, qweight: Tensor) -> None:
        self.packed = self.weight_format.pack(qweight)

    def _state_problems(
        self, canonical: Canonical, state: Mapping[str, Any], prefix: str, assign: bool
    ) -> list[str]:
        """What is wrong with this layer's entries, in words; torch reports the missing ones."""
        problems = []
        for name, (dtype, shape) in canonical.items():
            value = state.get(prefix + name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                got = type(value).__name__
            elif value.dtype != dtype or tuple(value.shape) != shape:
                got = f"{dtype_name(value.dtype)} {list(value.shape)}"
            elif value.is_meta and not (assign or self.packed.is_meta):
                got = "one on the meta device, without values"
            else:
                continue
            wanted = f"{dtype_name(dtype)} {list(shape)}"
            problems.append(f"{prefix}{name} must be {wanted}, got {got}")
        return problems

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        buffers = dict(self._buffers)
        del buffers["packed"]
        state["_buffers"] = buffers
        state["_qweight"] = self.qweight
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        qweight = state.pop("_qweight")
        super().__setstate__(state)
        # In the order of __init__, so that copies print and iterate alike.
        self._buffers = {"packed": self.weight_format.pack(qweight), **self._buffers}


class TrainedModule(nn.Module):
    """A layer that trains on the integers it will be deployed with; base class of all such kinds.

    A subclass calls :meth:`init_training` in its ``__init__`` and defines :meth:`from_float`,
    :meth:`to_quantized`, :meth:`to_float` and :meth:`forward`, which computes in float where
    ``self._quantizing`` is false.

    Attributes:
        weight: the float weight that is trained.
        quantize_enabled: uint8 ``[1]``; see :meth:`enable_quantization`.
        config: how the layer is trained.
        activation: the activation function that the layer computes at its end, or "none".
        simulate: whether the forward computes with float values of the integers.

    Example:
        >>> from torchquant.nn import QATLinear
        >>> isinstance(QATLinear(64, 32), TrainedModule)
        True
    """

    weight: nn.Parameter
    quantize_enabled: Tensor
    config: TrainingConfig
    activation: str = "none"
    simulate: bool = False

    def init_training(self, config: TrainingConfig, activation: str, device: torch.device) -> None:
        """Set what all kinds keep; quantization is enabled."""
        self.config = config
        self.activation = activation
        self.simulate = config.simulate
        on = torch.ones(1, dtype=torch.uint8, device=device)
        self.register_buffer("quantize_enabled", on)
        self._quantizing = True  # the buffer's value, so that a forward need not read the buffer

    @classmethod
    def config_refusal(cls, config: TrainingConfig) -> str | None:
        """Why no layer of this kind can be trained with ``config``; None where one can."""
        return None

    @classmethod
    def from_float(cls, module: Any, config: TrainingConfig | None = None) -> Any:
        """A layer that trains the parameters of a float layer: the same objects."""
        raise _missing(cls, "from_float")

    def to_quantized(self) -> QuantizedModule:
        """The layer to deploy: integers, no float weight."""
        raise _missing(self, "to_quantized")

    def to_float(self) -> nn.Module:
        """A float layer with this layer's parameters, the same objects, without the activation."""
        raise _missing(self, "to_float")

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self.weight.device

    def enable_quantization(self, enabled: bool = True) -> Any:
        """Enable quantized compute; False: compute in float while observers watch. Returns self."""
        self.quantize_enabled.fill_(bool(enabled))
        self._quantizing = bool(enabled)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.quantize_enabled
        super()._apply(fn, recurse)
        wait_for_copy(before, self.quantize_enabled)
        self._read_stage()
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)
        self._read_stage()

    def _read_stage(self) -> None:
        if not self.quantize_enabled.is_meta:
            self._quantizing = bool(self.quantize_enabled)


# torch.is_autocast_enabled refuses other device types, such as "meta". A set, because torch.compile
# of torch 2.11 does not trace torch.amp.is_autocast_available.
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "maia", "privateuseone")
    if torch.amp.is_autocast_available(device)
)


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """Output dtype of a layer for this input: autocast's where it is on, None for the input's."""
    if not isinstance(input, Tensor):
        return None
    device = input.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def as_float32(value: Tensor) -> Tensor:
    """``value`` as float32; a parameter stays a parameter."""
    if value.dtype == torch.float32:
        return value
    converted = value.detach().to(torch.float32)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(converted, value.requires_grad)
    return converted


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without the module in front."""
    return str(dtype).removeprefix("torch.")


def _missing(owner: object, name: str) -> TypeError:
    cls = owner if isinstance(owner, type) else type(owner)
    return TypeError(f"{cls.__name__} must define {name}, as every kind of layer does")


__all__ = ["QuantizedModule", "TrainedModule", "autocast_dtype"]
