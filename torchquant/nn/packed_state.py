"""The state of a layer with a packed weight: names, state dicts, moves between devices, copies.

State dicts, pickles and copies hold the canonical integers of the weight instead of the packed
ones, so they do not depend on a device or a layout. Scales stay float32; parameters follow
``.to(dtype)`` like those of any module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchquant.nn.dtypes import FLOAT_DTYPES, as_float32, dtype_name
from torchquant.nn.shared_weight import SharedWeight
from torchquant.nn.state_names import PLACEHOLDER, rename_state
from torchquant.nn.weight import INT8, WeightFormat
from torchquant.ops._arguments import wait_for_copy
from torchquant.training.state import keeping_dtype

Canonical = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class PackedState(nn.Module):
    """The base class of :class:`torchquant.nn.QuantizedModule`; see there.

    Attributes:
        packed: the weight, in the layout that the kernels of its device use.
        qweight_scale: float32; the device of this buffer is the device of the layer.
        qweight_zero_point: int32, or None.

    Example:
        >>> from torchquant.nn import QuantizedLinear
        >>> list(QuantizedLinear(64, 32).state_dict())
        ['qweight', 'qweight_scale', 'bias']
    """

    packed: Tensor
    qweight_scale: Tensor
    qweight_zero_point: Tensor | None
    weight_format: ClassVar[WeightFormat] = INT8
    # What several layers have in common if they share one packed weight.
    shared_weight: SharedWeight | None = None
    # Names in state dicts and files of older versions, and the names that replaced them.
    renamed: ClassVar[Mapping[str, str]] = {
        "weight_scale": "qweight_scale",
        "weight_zero_point": "qweight_zero_point",
    }

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that the integers represent."""
        raise missing(self, "weight_shape")

    def canonical(self) -> Canonical:
        """Dtype and shape of each tensor of the layer's state dict, by name."""
        raise missing(self, "canonical")

    def register_weight(
        self, packed: Tensor, dtype: torch.dtype | None = None, has_bias: bool = False
    ) -> None:
        """Register the packed weight and a placeholder of the float weight, an empty tensor.

        State dicts hold neither: they hold ``qweight``. The placeholder of a layer without bias is
        a parameter that follows ``.to()``: code that asks ``next(model.parameters())`` for device
        and dtype finds it. Otherwise it is a buffer. transformers' ``tie_weights()`` finds either
        when it looks for the weight of an output layer by a pattern.

        Args:
            packed: the packed weight.
            dtype: the dtype in which the layer works; None is float32.
            has_bias: True if the layer has a parameter, which then holds the dtype.
        """
        self.register_buffer("packed", packed, persistent=False)
        empty = torch.empty(0, dtype=dtype or torch.float32, device=packed.device)
        if has_bias:
            self.register_buffer(PLACEHOLDER, empty, persistent=False)
        else:
            self.register_parameter(PLACEHOLDER, nn.Parameter(empty, requires_grad=False))

    @property
    def layout(self) -> WeightFormat:
        """The object that packs the weight; files store the name of ``weight_format``.

        A kind overrides it if its layout depends on more than :attr:`weight_shape`.
        """
        return self.weight_format

    def unpacked(self) -> dict[str, Tensor]:
        """The canonical tensors that ``packed`` holds, new tensors or those of a tied layer."""
        if self._is_shared:
            assert self.shared_weight is not None
            return self.shared_weight.unpacked()
        return self.layout.unpack_tensors(self.packed, self.weight_shape)

    @property
    def _is_shared(self) -> bool:
        """True if ``packed`` is the tensor of other layers, too: none was moved without them."""
        return self.shared_weight is not None and self.shared_weight.packed is self.packed

    def take_packed(self, packed: Tensor) -> None:
        """Have another packed weight of the same format and shape."""
        self.packed = packed
        self.move_placeholder()
        self.weight_replaced()

    @property
    def qweight(self) -> Tensor:
        """The canonical integers of the weight; each access unpacks them again."""
        return self.unpacked()["qweight"]

    @property
    def integers(self) -> Tensor:
        """The integers of the weight as int8, in the shape of the weight; a new tensor."""
        return self.qweight

    @property
    def weight_scale(self) -> Tensor:
        """The scales of the weight, the buffer ``qweight_scale``."""
        return self.qweight_scale

    @property
    def weight_zero_point(self) -> Tensor | None:
        """The zero points of the weight, the buffer ``qweight_zero_point``, or None."""
        return self.qweight_zero_point

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        return self.packed.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer works: that of the float layer, or of ``.to(dtype)``."""
        present = [p for p in self._parameters.values() if p is not None]
        return present[0].dtype if present else torch.float32

    def weight_replaced(self) -> None:
        """Called after ``packed`` or the layer's dtype was replaced; does nothing by default."""

    # The state dict holds the canonical form of the weight, the buffer the packed form.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        keep_dtype = keeping_dtype(fn)
        packed, dtype = self.packed, self.dtype
        self._buffers["packed"] = None
        scales = {id(buffer) for buffer in self._buffers.values()}

        def apply(tensor: Tensor) -> Tensor:
            moved = keep_dtype(tensor) if id(tensor) in scales else fn(tensor)
            # No kernel takes float64: .double() leaves the layer as it is.
            return moved if moved.dtype != torch.float64 else keep_dtype(tensor)

        try:
            super()._apply(apply, recurse)
            moved = self._moved(packed, keep_dtype)
        except BaseException:
            self._buffers["packed"] = packed
            raise
        self.packed = moved
        if self.shared_weight is not None and moved is not packed:
            self.shared_weight.moved(packed, moved)
        if moved is not packed or self.dtype != dtype:
            self.weight_replaced()
        return self

    def _moved(self, packed: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """The packed weight on the device of the other tensors, which ``fn`` has moved already."""
        others = (*self._buffers.values(), *self._parameters.values())
        device = next(tensor.device for tensor in others if tensor is not None)
        if self.shared_weight is not None:
            found = self.shared_weight.moved_to(device, packed)
            if found is not None:
                return found
        if device.type == packed.device.type:
            return fn(packed)
        if packed.is_meta or device.type == "meta":  # to_empty(): a valid layout without values
            return self.layout.empty(self.weight_shape, device)
        tensors = self.layout.unpack_tensors(packed, self.weight_shape)
        moved = {name: fn(tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            wait_for_copy(tensor, moved[name])
        return self.layout.pack_tensors(moved, self.weight_shape)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # By name: the placeholder and the packed weight are not part of the state.
        unpacked = self.unpacked()
        for name in self.canonical():
            if name in unpacked:  # tied layers have the same tensors
                destination[prefix + name] = unpacked[name]
                continue
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
        rename_state(rest, prefix, self.renamed)
        for name, (dtype, _) in canonical.items():  # the state may have been converted to bfloat16
            value = rest.get(prefix + name)
            scale = name not in self._parameters and dtype == torch.float32
            if scale and isinstance(value, Tensor) and value.is_floating_point():
                rest[prefix + name] = as_float32(value)
        assign = local_metadata.get("assign_to_params_buffers", False)
        problems = self._state_problems(canonical, rest, prefix, assign)
        if problems:  # load all or nothing: scales and integers belong together
            error_msgs.extend(problems)
            return
        names = [name for name in self.layout.tensors if prefix + name in rest]
        missing_keys.extend(
            prefix + name for name in self.layout.tensors if name not in names and strict
        )
        try:
            packed = self._packed_anew({name: rest.pop(prefix + name) for name in names}, assign)
        except (ValueError, TypeError) as error:  # no weight has these values
            error_msgs.append(f"{prefix}qweight cannot be loaded: {error}")
            return
        for name, other in self._parameters.items():  # the placeholder
            if name not in canonical and other is not None:
                rest.setdefault(prefix + name, other)
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if packed is None:
            return
        if assign:
            self.load_packed_by_assignment(packed)
            self.move_placeholder()
        else:
            with torch.no_grad():
                self.packed.copy_(packed)

    def _packed_anew(self, tensors: dict[str, Tensor], assign: bool) -> Tensor | None:
        """The packed weight of a state dict, or None if nothing is to be changed.

        A tensor that the state dict lacks keeps its values.
        """
        here = self.packed.device
        if not tensors or (here.type == "meta" and not assign):  # torch warns: this does nothing
            return None
        if len(tensors) < len(self.layout.tensors):
            if here.type == "meta":
                return None
            device = next(iter(tensors.values())).device if assign else here
            own = {name: tensor.to(device) for name, tensor in self.unpacked().items()}
            tensors = {**own, **tensors}
        if not assign:
            tensors = {name: tensor.to(here) for name, tensor in tensors.items()}
        return self.layout.pack_tensors(tensors, self.weight_shape)

    def load_packed_by_assignment(self, packed: Tensor) -> None:
        """Take a packed weight that was made from a state dict, in place of the present one."""
        if self.shared_weight is None:
            self.packed = packed
        else:
            self.shared_weight.replace(packed)

    def move_placeholder(self) -> None:
        """Move the placeholder to the device of the weight that was loaded."""
        place: Any = self._parameters if PLACEHOLDER in self._parameters else self._buffers
        old = place[PLACEHOLDER]
        if old is not None and old.device != self.device:
            empty = torch.empty(0, dtype=old.dtype, device=self.device)
            trained = isinstance(old, nn.Parameter)
            place[PLACEHOLDER] = nn.Parameter(empty, old.requires_grad) if trained else empty

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
            elif not self._takes(name, value.dtype, dtype) or tuple(value.shape) != shape:
                got = f"{dtype_name(value.dtype)} {list(value.shape)}"
            elif value.is_meta and not (assign or self.packed.is_meta):
                got = "a tensor on the meta device, which has no values"
            else:
                continue
            wanted = f"{dtype_name(dtype)} {list(shape)}"
            problems.append(f"{prefix}{name} must be {wanted}, got {got}")
        return problems

    def _takes(self, name: str, found: torch.dtype, wanted: torch.dtype) -> bool:
        """True if a state dict may hold a tensor of the dtype; parameters take any float."""
        if name in self._parameters and wanted in FLOAT_DTYPES.values():
            return found in FLOAT_DTYPES.values() or found == torch.float64
        return found == wanted

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        buffers = dict(self._buffers)
        del buffers["packed"]
        state["_buffers"] = buffers
        if self._is_shared:  # its state holds the tensors
            state["_canonical"] = None
        else:
            state["_canonical"] = self.unpacked()
            state.pop("shared_weight", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        old = "_qweight" in state  # in pickles of older versions
        tensors = {"qweight": state.pop("_qweight")} if old else state.pop("_canonical")
        super().__setstate__(state)
        # The order of __init__, so that a copy prints and iterates like the original.
        if tensors is None:
            assert self.shared_weight is not None
            packed = self.shared_weight.packed
            self.shared_weight.join(self)
        else:
            packed = self.layout.pack_tensors(tensors, self.weight_shape)
        self._buffers = {"packed": packed, **self._buffers}


def shared_parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter for a new layer: ``tensor`` itself if it is a parameter, otherwise a copy.

    Parameters created in inference mode are copied, because they could not be trained.
    """
    if isinstance(tensor, nn.Parameter) and not tensor.is_inference():
        return tensor
    return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)


def missing(owner: object, name: str) -> TypeError:
    """The error for a method that a kind of layer does not define."""
    cls = owner if isinstance(owner, type) else type(owner)
    return TypeError(f"{cls.__name__} must define {name}, as every kind of layer does")


__all__ = ["PackedState"]
