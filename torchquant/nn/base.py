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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from torchquant.configs import QuantizationConfig, config_from_dict, config_to_dict
from torchquant.nn.dtypes import FLOAT_DTYPES, dtype_name
from torchquant.nn.packed_state import PackedState, missing
from torchquant.nn.readable_weight import ReadableWeight, refuse_assignment
from torchquant.nn.state_names import PLACEHOLDER, rename_state
from torchquant.nn.value_quantizers import follow_state
from torchquant.ops._arguments import wait_for_copy
from torchquant.training.configuration import TrainingConfig

Rounding = Literal["own", "done", "none"]  # see TrainedModule.compute


class QuantizedModule(PackedState):
    """A layer that computes with integers; the base class of every kind of quantized layer.

    A subclass

    - sets ``config``, ``activation`` and the attributes named in ``stored``, and registers the
      buffers ``packed`` (with :meth:`register_weight`) and ``qweight_scale`` and its other tensors,
      none of them under a name that begins with ``weight``;
    - defines :attr:`weight_shape`, :meth:`canonical`, :meth:`from_float`, :meth:`to_float`,
      :meth:`forward` and :meth:`probe`.

    The ``forward`` of a subclass reads the buffers itself; the base class adds no call to it.

    Attributes:
        packed: the weight, in the layout that the kernels of its device use.
        qweight_scale: float32; the device of this buffer is the device of the layer.
        config: how the layer is quantized.
        activation: the activation function that the layer applies to its result, or "none".

    Example:
        >>> from torchquant.nn import QuantizedLinear
        >>> layer = QuantizedLinear(64, 32)
        >>> isinstance(layer, QuantizedModule), layer.canonical()["qweight"]
        (True, (torch.int8, (32, 64)))
    """

    config: QuantizationConfig
    activation: str = "none"
    # The activation functions that ``forward`` applies if ``activation`` names them; verbs fuse
    # only these.
    fused_activations: ClassVar[tuple[str, ...]] = ()
    # True for an embedding, which looks up rows of its weight.
    is_table: ClassVar[bool] = False
    # The class that computes several layers of this kind on one input in one call, or None. Its
    # obstacle(members) returns the reason why members cannot be grouped; join() adds a member.
    group_type: ClassVar[Any] = None
    # Whether the programs of regions with int8 values (torchquant.chains) can run the layer.
    in_programs: ClassVar[bool] = True
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

    @classmethod
    def config_refusal(cls, config: QuantizationConfig) -> str | None:
        """The reason why no layer of this kind can have ``config``, or None."""
        return None

    @classmethod
    def variants(cls) -> tuple[type[QuantizedModule], ...]:
        """The classes of layers of this kind, which differ in the format of the weight."""
        return (cls,)

    @classmethod
    def class_for(
        cls, config: QuantizationConfig, shape: tuple[int, ...] | None = None
    ) -> type[QuantizedModule]:
        """The class among :meth:`variants` whose layers have ``config``.

        Args:
            config: the configuration of a layer.
            shape: the shape of the weight; None for a layer of any shape.
        """
        return cls

    @classmethod
    def shape_refusal(cls, config: QuantizationConfig, shape: tuple[int, ...]) -> str | None:
        """The reason why a layer whose weight has this shape cannot have ``config``, or None."""
        return None

    @classmethod
    def from_float(cls, module: Any, config: QuantizationConfig | None = None) -> Any:
        """Quantize a float layer; the float layer itself does not change."""
        raise missing(cls, "from_float")

    def to_float(self) -> nn.Module:
        """A float layer with the values that the integers represent, without the activation."""
        raise missing(self, "to_float")

    def probe(self, rows: int, generator: torch.Generator) -> Tensor:
        """``rows`` random float32 inputs on the CPU, used to test a changed layer."""
        raise missing(self, "probe")

    # ---------------------------------------------------------------- shared by all kinds

    @property
    def weight(self) -> Tensor:
        """The float weight that the integers represent, for reading; see :class:`ReadableWeight`.

        Shape, dtype and device cost nothing; each other use dequantizes the weight again.
        ``F.linear(x, layer.weight, bias)`` computes like the layer. Changes raise an error.
        """
        if torch.compiler.is_dynamo_compiling():
            return self.dequantized()
        return ReadableWeight(self)

    def dequantized(self) -> Tensor:
        """The float weight that the integers represent, a new tensor in the layer's dtype."""
        weight = self.to_float()._parameters["weight"]
        assert weight is not None
        return weight.detach().to(self.dtype)

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Shape of the weight of the float layer: the shape of :attr:`weight`."""
        return self.weight_shape

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """``F.linear(input, self.weight, bias)`` on integers; None if this kind has no such call.

        The result does not include the layer's own bias and activation.
        """
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", PLACEHOLDER) and refuse_assignment(self, value):
            return
        super().__setattr__(name, value)

    def outside_programs(self) -> QuantizedModule:
        """A layer with the same bits for a place where no program runs it; by default itself."""
        return self

    def adopt(self, module: nn.Module) -> None:
        """Take over from the module that this layer replaces what its tensors do not hold."""

    def entry(self) -> dict[str, Any]:
        """The JSON values that a file stores for the layer in addition to its tensors."""
        values = {name: self.stored_value(self, name) for name in self.stored}
        config, dtype = config_to_dict(self.config), dtype_name(self.dtype)
        return {**values, "config": config, "dtype": dtype, "format": self.weight_format.name}

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
        dtype = FLOAT_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(
                f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {entry['dtype']!r}"
            )
        if entry["format"] != cls.weight_format.name:
            raise ValueError(
                f"weight format must be {cls.weight_format.name!r}, got {entry['format']!r}; the "
                "file may be from a newer torchquant"
            )
        values = {name: entry[name] for name in cls.stored}
        layer = cls(**values, config=config_from_dict(entry["config"]), device="meta")
        return layer.to(dtype)

    def fuse_activation(self, enabled: bool) -> None:
        """Apply the activation module after the layer in calls where nobody can notice it."""
        self._fuses_activation = enabled
        self._guarded = enabled or self._group is not None


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
    renamed: ClassVar[Mapping[str, str]] = {}
    # True once a forward has run outside of torch.compile; None if the kind does not record it.
    was_called: bool | None = None
    # Whether the kind has :meth:`compute`, :meth:`input_qparams` and a child ``input_quantizer``
    # (the module that observes and rounds the input, or None), which regions need.
    has_compute: ClassVar[bool] = False

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
        raise missing(cls, "from_float")

    def to_quantized(self) -> QuantizedModule:
        """The layer to deploy; it holds integers and no float weight."""
        raise missing(self, "to_quantized")

    def missing_range(self) -> str | None:
        """Why the layer cannot be deployed yet: no batch gave it a range. None if it can."""
        return None

    def compute(self, input: Tensor, activation: str, rounding: Rounding = "own") -> Tensor:
        """The forward with a given activation, on an input that may be rounded already.

        Args:
            input: as for the forward.
            activation: "none", or one of ``fused_activations``.
            rounding: "own": the layer observes and rounds its input. "done": ``input_quantizer``
                has rounded the input. "none": the input stays as it is, and the layer multiplies
                floats.
        """
        raise missing(type(self), "compute")

    def input_qparams(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero point of the input of the layer to deploy; None for dynamic activations.

        Raises:
            RuntimeError: no range has been observed or learned.
        """
        return None, None

    @property
    def averaging_constant(self) -> float:
        """The weight of the newest batch in the moving averages of observed ranges."""
        return float(getattr(self.config.activations, "averaging_constant", 0.01))

    def to_float(self) -> nn.Module:
        """A float layer without the activation; it shares this layer's parameters."""
        raise missing(self, "to_float")

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        return self.weight.device

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """The norms after the layer that it computes and trains, too; none by default."""
        return ()

    def freeze_statistics(self, frozen: bool = True) -> Any:
        """Keep the running statistics of :attr:`norms` in training mode, too; return self."""
        return self

    @property
    def keeps_statistics(self) -> bool:
        """True if training does not change the running statistics of :attr:`norms`."""
        return True

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
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        rename_state(state_dict, prefix, self.renamed)  # before torch selects the children's keys
        deployed = self.config.deployed().activations
        follow_state(self, state_dict, prefix, deployed, self.averaging_constant)
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


__all__ = ["QuantizedModule", "TrainedModule", "autocast_dtype"]
