"""Base classes of quantized and trained layers: state, files, devices, copies.

:class:`QuantizedModule` holds one packed weight and its float32 scales. State dicts, pickles and
copies hold the canonical integers instead of the packed ones, so they do not depend on a device or
a layout. :class:`TrainedModule` holds the float parameters of a layer that trains with the integers
that will be deployed.

Verbs, files, reports and comparisons use these two classes and :mod:`torchquant.nn.kinds`. No code
outside this package tests for a particular kind of layer.
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
from torchquant.training.state import keeping_dtype

Canonical = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class QuantizedModule(nn.Module):
    """A layer that computes with integers; the base class of every kind of quantized layer.

    A subclass

    - sets ``config``, ``activation`` and the attributes named in ``stored``, and registers the
      buffers ``packed`` (with :meth:`register_weight`) and ``weight_scale`` and its other tensors;
    - defines :attr:`weight_shape`, :meth:`canonical`, :meth:`from_float`, :meth:`to_float`,
      :meth:`forward` and :meth:`probe`.

    The ``forward`` of a subclass reads the buffers itself; the base class adds no call to it.

    Attributes:
        packed: the weight, in the layout that the kernels of its device use.
        weight_scale: float32; the device of this buffer is the device of the layer.
        config: how the layer is quantized.
        activation: the activation function that the layer applies to its result, or "none".

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
    # The activation functions that ``forward`` applies if ``activation`` names them; verbs fuse
    # only these.
    fused_activations: ClassVar[tuple[str, ...]] = ()
    # The class that computes several layers of this kind on one input in one call, or None. Its
    # obstacle(members) returns the reason why members cannot be grouped; join() adds a member.
    group_type: ClassVar[Any] = None
    # Whether the layer may apply the activation module after it, if nobody can notice
    # (torchquant.nn.call_guard); whether the layer has to look at its caller at all.
    _fuses_activation: bool = False
    _guarded: bool = False
    # The group of this layer, and the layer's index in the group.
    _group: Any = None
    _group_index: int = 0
    # Arguments of __init__ that files store. The layer has an attribute of the same name: a plain
    # value, or an optional tensor such as `bias`, for which a bool is stored.
    stored: ClassVar[tuple[str, ...]] = ()

    # ---------------------------------------------------------------- defined by each kind

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that the integers represent."""
        raise _missing(self, "weight_shape")

    def canonical(self) -> Canonical:
        """Dtype and shape of each tensor of the layer's state dict, by name."""
        raise _missing(self, "canonical")

    @classmethod
    def config_refusal(cls, config: QuantizationConfig) -> str | None:
        """The reason why no layer of this kind can have ``config``, or None."""
        return None

    @classmethod
    def from_float(cls, module: Any, config: QuantizationConfig | None = None) -> Any:
        """Quantize a float layer; the float layer itself does not change."""
        raise _missing(cls, "from_float")

    def to_float(self) -> nn.Module:
        """A float layer with the values that the integers represent, without the activation."""
        raise _missing(self, "to_float")

    def probe(self, rows: int, generator: torch.Generator) -> Tensor:
        """``rows`` random float32 inputs on the CPU, used to test a changed layer."""
        raise _missing(self, "probe")

    # ---------------------------------------------------------------- shared by all kinds

    def register_weight(self, packed: Tensor) -> None:
        """Register the packed weight as a buffer that state dicts omit; they hold ``qweight``."""
        # The name must not be `weight`: tie_weights() of transformers would overwrite the buffer.
        self.register_buffer("packed", packed, persistent=False)

    @property
    def qweight(self) -> Tensor:
        """The canonical integers of the weight; each access unpacks them again."""
        return self.weight_format.unpack(self.packed, self.weight_shape)

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        return self.packed.device

    def entry(self) -> dict[str, Any]:
        """The JSON values that a file stores for the layer in addition to its tensors."""
        values = {name: self.stored_value(self, name) for name in self.stored}
        config = config_to_dict(self.config)
        return {**values, "config": config, "format": self.weight_format.name}

    @classmethod
    def stored_value(cls, module: nn.Module, name: str) -> Any:
        """The value that a file stores for an argument in ``stored``.

        ``module`` is a float or a quantized layer of this kind.
        """
        value = getattr(module, name, None)
        if value is None or isinstance(value, Tensor):  # for a tensor, __init__ takes a bool
            return value is not None
        return value

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> QuantizedModule:
        """Create an empty layer on the meta device from the values that :meth:`entry` returned.

        Raises:
            KeyError: a value is missing.
            TypeError: a value has the wrong type.
            ValueError: a value is not valid for this kind, or the weight format is another one.
        """
        if entry["format"] != cls.weight_format.name:
            raise ValueError(
                f"weight format must be {cls.weight_format.name!r}, got {entry['format']!r}; the "
                "file may be from a newer torchquant"
            )
        values = {name: entry[name] for name in cls.stored}
        return cls(**values, config=config_from_dict(entry["config"]), device="meta")

    def fuse_activation(self, enabled: bool) -> None:
        """Apply the activation module after the layer in calls where nobody can notice it."""
        self._fuses_activation = enabled
        self._guarded = enabled or self._group is not None

    def weight_replaced(self) -> None:
        """Called after ``packed`` was replaced by another tensor; does nothing by default."""

    # The state dict holds the canonical form of the weight, the buffer the packed form.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        keep_dtype = keeping_dtype(fn)
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
        """The packed weight on the device of the scales, which ``fn`` has moved already."""
        device = self.weight_scale.device
        if device.type == packed.device.type:
            return fn(packed)
        if packed.is_meta or device.type == "meta":  # to_empty(): a valid layout without values
            return self.weight_format.empty(self.weight_shape, device)
        qweight = self.weight_format.unpack(packed, self.weight_shape)
        moved = fn(qweight)
        wait_for_copy(qweight, moved)
        return self.weight_format.pack(moved)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # By name: other tensors on the layer, such as a tied `weight`, are not part of its state.
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
        for name, (dtype, _) in canonical.items():  # the state may have been converted to bfloat16
            value = rest.get(prefix + name)
            if isinstance(value, Tensor) and value.is_floating_point() and dtype == torch.float32:
                rest[prefix + name] = as_float32(value)
        assign = local_metadata.get("assign_to_params_buffers", False)
        problems = self._state_problems(canonical, rest, prefix, assign)
        if problems:  # load all or nothing: scales and integers belong together
            error_msgs.extend(problems)
            return
        for name, other in self._parameters.items():  # a tied `weight` keeps its value
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
        elif not self.packed.is_meta:  # torch warns that copying to meta does nothing
            with torch.no_grad():
                self.packed.copy_(self.weight_format.pack(qweight.to(self.packed.device)))

    def _load_qweight_by_assignment(self, qweight: Tensor) -> None:
        self.packed = self.weight_format.pack(qweight)

    def _state_problems(
        self, canonical: Canonical, state: Mapping[str, Any], prefix: str, assign: bool
    ) -> list[str]:
        """Messages about wrong entries of this layer; torch itself reports missing entries."""
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
                got = "a tensor on the meta device, which has no values"
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
        # The order of __init__, so that a copy prints and iterates like the original.
        self._buffers = {"packed": self.weight_format.pack(qweight), **self._buffers}


class TrainedModule(nn.Module):
    """A layer that trains with the integers to deploy; base class of every kind of such layers.

    A subclass calls :meth:`init_training` in its ``__init__`` and defines :meth:`from_float`,
    :meth:`to_quantized`, :meth:`to_float` and :meth:`forward`. The forward computes in float if
    ``self._quantizing`` is false.

    Attributes:
        weight: the float weight that is trained.
        quantize_enabled: uint8 ``[1]``; see :meth:`enable_quantization`.
        config: how the layer is trained.
        activation: the activation function that the layer applies to its result, or "none".
        simulate: if True, the forward multiplies dequantized floats instead of integers.

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
    # As in QuantizedModule.
    fused_activations: ClassVar[tuple[str, ...]] = ()
    _fuses_activation: bool = False
    _guarded: bool = False

    def init_training(self, config: TrainingConfig, activation: str, device: torch.device) -> None:
        """Set the attributes that all kinds share, and enable quantization."""
        self.config = config
        self.activation = activation
        self.simulate = config.simulate
        on = torch.ones(1, dtype=torch.uint8, device=device)
        self.register_buffer("quantize_enabled", on)
        self._quantizing = True  # a copy of the buffer's value, which forward reads instead

    @classmethod
    def config_refusal(cls, config: TrainingConfig) -> str | None:
        """The reason why no layer of this kind can be trained with ``config``, or None."""
        return None

    @classmethod
    def from_float(cls, module: Any, config: TrainingConfig | None = None) -> Any:
        """Create a layer that trains the parameters of a float layer, the same objects."""
        raise _missing(cls, "from_float")

    def to_quantized(self) -> QuantizedModule:
        """The layer to deploy; it holds integers and no float weight."""
        raise _missing(self, "to_quantized")

    def missing_range(self) -> str | None:
        """Why the layer cannot be deployed yet: no batch gave it a range. None if it can."""
        return None

    def to_float(self) -> nn.Module:
        """A float layer without the activation; it shares this layer's parameters."""
        raise _missing(self, "to_float")

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        return self.weight.device

    def fuse_activation(self, enabled: bool) -> None:
        """Apply the activation module after the layer in calls where nobody can notice it."""
        self._fuses_activation = self._guarded = enabled

    def enable_quantization(self, enabled: bool = True) -> Any:
        """Compute with integers if ``enabled``, otherwise in float; return self.

        Observers record ranges in both cases.
        """
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
    """The dtype of autocast if autocast is on for the device of ``input``, otherwise None.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     autocast_dtype(torch.ones(1))
        torch.bfloat16
    """
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
    """The name of a dtype without the prefix ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _missing(owner: object, name: str) -> TypeError:
    cls = owner if isinstance(owner, type) else type(owner)
    return TypeError(f"{cls.__name__} must define {name}, as every kind of layer does")


__all__ = ["QuantizedModule", "TrainedModule", "autocast_dtype"]
