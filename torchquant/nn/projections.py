"""ProjectionGroup: quantized layers that are applied to the same tensor and computed together.

Query, key and value projections read the same rows, and so do gate and up projections. Computed
together, they quantize the rows once, and one parallel region does the work of two or three. The
surrounding forward is not rewritten: the first layer that is called computes all outputs and keeps
the outputs of the other layers until they are called.

Results are exact in every call for these reasons:

- The first layer computes the other outputs only if the function that calls it goes on, without a
  branch, to the calls of the other layers with the same variable, and nothing in between can change
  the tensor (:mod:`torchquant.nn.call_guard`).
- A layer uses a kept output only in that frame and at that instruction, for the same tensor object
  with the same version. Hooks and wrappers add frames, so a layer with hooks computes its own.
- The first layer checks that every member still has the weights from which the group was formed.

Rejected: the version of the tensor alone (inference mode has none, and changes through ``.data`` do
not count); comparing bytes with a copy (for long inputs this costs a third of the gain); rewriting
the forward (the code belongs to the user); traces of the forward (they run user code, and a forward
may take another path later).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from torchquant._extension import load
from torchquant.configs import Dynamic, QuantizationConfig
from torchquant.graph.calls import Call
from torchquant.nn.call_guard import (
    activation_of,
    holder,
    is_quiet,
    local,
    module_at,
    reads_run_no_code,
)
from torchquant.nn.replaced_activation import mark
from torchquant.ops._arguments import has_kernels

_library = load()
_peek_functorch = torch._C._functorch.peek_interpreter_stack

# A group dissolves after this number of calls whose outputs were not used (cross-attention).
_PATIENCE = 3
# With fewer rows, layers are computed one by one: one call for all takes longer to prepare than it
# saves (benchmarks/bench_guard.py; AMD EPYC with AVX512-VNNI, 1 and 2 threads).
_MIN_ROWS = 64
_split = _library.linear_dynamic_split


class Member(Protocol):
    """The attributes that a group uses; :class:`torchquant.nn.QuantizedLinear` has them."""

    in_features: int
    out_features: int
    config: QuantizationConfig
    activation: str
    _fuses_activation: bool
    packed: Tensor
    qweight_scale: Tensor
    qweight_zero_point: Tensor | None
    bias: torch.nn.Parameter | None


class _Kept:
    """Outputs that the first member computed for the members after it."""

    __slots__ = (
        *("calls", "frame", "input", "next", "outputs", "parent", "places", "stream", "version"),
    )

    def __init__(
        self,
        input: Tensor,
        outputs: list[Any],
        frame: FrameType,
        call: Call,
        places: list[Any],
        parent: torch.nn.Module,
    ) -> None:
        self.outputs = outputs
        self.parent = weakref.ref(parent)  # of the first member
        self.places = places
        self.next = 1
        self.frame = id(frame)  # the frame itself would keep its variables alive
        self.calls = call.chain
        self.version = -1 if input.is_inference() else input._version
        self.stream = None if input.is_cpu else _stream_of(input)
        # Once the input is deleted, no member can use the outputs. The callback must not refer to
        # self: that cycle would keep the outputs in memory until the garbage collector runs.
        self.input = weakref.ref(input, lambda reference: outputs.clear())


def _version_of(input: Tensor) -> int:
    """The number of changes in place; tensors of inference mode do not count them."""
    return -1 if input.is_inference() else input._version


def _stream_of(input: Tensor) -> Any:
    """The current CUDA stream, or None on the CPU; results are valid only in their own stream."""
    return torch.cuda.current_stream(input.device) if input.is_cuda else None


class _Slot(threading.local):
    kept: _Kept | None = None


class ProjectionGroup:
    """Layers that are computed together; :func:`torchquant.quantize_` forms the groups.

    Packed weights, scales and biases of the members become views of common tensors, so memory use
    does not change. A copy of a whole model has its own groups. In a copy of a single member, and
    in a model that was pickled, each layer is computed separately.

    Args:
        size: the number of members, which :meth:`join` adds in the order of their calls.

    Example:
        >>> group = ProjectionGroup(2)
        >>> group.active
        False
    """

    packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, size: int) -> None:
        self.members: list[weakref.ref[Member] | None] = [None] * size
        self.active = False
        self._misses = 0
        self._slot = _Slot()
        # For each member: its __dict__, and the objects that it must still contain.
        self._parts: list[tuple[dict[str, Any], str, Tensor, Tensor, Tensor | None, Any, int]] = []

    @staticmethod
    def obstacle(members: Sequence[Member]) -> str | None:
        """The reason why layers cannot be computed together, or None."""
        first = members[0]
        if any(member.in_features != first.in_features for member in members):
            return "their in_features differ"
        if any(member.config != first.config for member in members):
            return "their configurations differ"
        activations = first.config.activations
        if not isinstance(activations, Dynamic) or activations.bits != 8:
            return "their activations are not quantized per token to 8 bits"
        if any(member.out_features % _library.TILE_OUT_FEATURES for member in members):
            return f"out_features must be a multiple of {_library.TILE_OUT_FEATURES}"
        if any(member.packed.device != first.packed.device for member in members):
            return "they are on different devices"
        if len({member.bias.dtype for member in members if member.bias is not None}) > 1:
            return "the dtypes of their biases differ"
        return None if has_kernels(first.packed) else f"they are on {first.packed.device}"

    def join(self, index: int, member: Member) -> None:
        """Add a layer at its index; the group is active once all members have joined."""
        if self.active or self.members[index] is not None:
            return
        self.members[index] = weakref.ref(member)
        self._form_if_complete()

    def moved(self) -> None:
        """Handle that the weight of a member moved to another device.

        The group is active again once the weights of all members have moved. Until then each member
        computes its own output.
        """
        self._stop()
        for name in ("packed", "weight_scale", "weight_zero_point", "bias"):
            self.__dict__.pop(name, None)  # frees their memory
        self._form_if_complete()

    def _form_if_complete(self) -> None:
        present = [layer for ref in self.members if ref is not None and (layer := ref())]
        if len(present) == len(self.members) and self.obstacle(present) is None:
            self._form(present)

    def _stop(self) -> None:
        self.active = False
        self._slot = _Slot()
        self._parts = []

    def dissolve(self) -> None:
        """Let each member compute its own output from now on."""
        self._stop()
        for reference in self.members:
            member = None if reference is None else reference()
            if member is not None and member.__dict__.get("_group") is self:
                member.__dict__["_group"] = None
                member.__dict__["_guarded"] = member._fuses_activation

    def forget(self) -> None:
        """Drop kept outputs: a member was called in a way that does not use the group."""
        self._slot.kept = None

    def output(self, index: int, input: Tensor, frame: FrameType, call: Call) -> Tensor | None:
        """The output of a member, or None if it must compute its own; called by its forward.

        Args:
            index: the member's place in the order of the calls.
            input: the input of the member.
            frame: the frame that calls the member.
            call: the call that the frame executes.
        """
        if index == 0:
            return self._lead(input, frame, call)
        kept = self._slot.kept
        if (
            kept is None
            or kept.next != index
            or kept.frame != id(frame)
            or kept.calls[index] is not call
            or kept.input() is not input
            or kept.version != _version_of(input)
            or not self._leads(kept)
        ):
            return None
        if kept.stream is not None and kept.stream != _stream_of(input):
            return None
        output: Tensor = kept.outputs[index]
        place = kept.places[index]
        kept.outputs[index] = None
        index += 1
        if index < len(self.members):
            kept.next = index
        else:
            self._slot.kept = None
            self._misses = 0
        return output if place is None else mark(output, place)

    def _leads(self, kept: _Kept) -> bool:
        """True if the first member is still in its place: it led in this call of the function."""
        first = self.members[0]
        parent: Any = kept.parent()
        if parent is None or first is None:
            return False
        return parent._modules.get(kept.calls[0].name) is first()

    def _lead(self, input: Tensor, frame: FrameType, call: Call) -> Tensor | None:
        if self._slot.kept is not None:
            self._slot.kept = None
            self._misses += 1
            if self._misses >= _PATIENCE:
                self.dissolve()
        if (
            not self.active
            or input.numel() < _MIN_ROWS * self._rows[0]
            or len(call.chain) < len(self.members)
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(self._device_type)
            or _peek_functorch() is not None
            or (self._device_type != "cpu" and input.shape[-1:] != self._rows)
            or not self._intact()
        ):
            return None
        owner = local(frame, 0)
        parent = self._holder(owner, call)
        if parent is None:
            return None
        places, activations = self._places(input, owner, call)
        only_follow = places[0] is not None and not call.others
        if call.between and not only_follow and not self._only_computes(owner, call, places[0]):
            return None
        try:
            outputs: list[Any] = _split(
                input,
                self.packed,
                self.weight_scale,
                self.weight_zero_point,
                self.bias,
                self._out_features,
                self._symmetric,
                activations,
            )
        except (ValueError, TypeError, IndexError):
            return None  # the layer itself raises the error about the input
        self._slot.kept = _Kept(input, outputs, frame, call, places, parent)
        output: Tensor = outputs[0]
        outputs[0] = None
        return output if places[0] is None else mark(output, places[0])

    def _holder(self, owner: Any, call: Call) -> Any:
        """The module that holds the first member, if what the caller reads runs no code; or None.

        None also stands for another module in the place of the first member.
        """
        first = self.members[0]
        layer = None if first is None else first()
        parent = holder(layer, owner, call.path, call.reads)
        if parent is not None or layer is None or not reads_run_no_code(owner, call.reads):
            return parent
        return holder(layer, owner, call.path, ())

    def _only_computes(self, owner: Any, call: Call, place: Any) -> bool:
        """True if the modules that are called between the members only compute their results."""
        paths = [path for path in call.between if place is None or path != call.follow]
        return all(is_quiet(module_at(owner, path)) for path in paths)

    def _places(self, input: Tensor, owner: Any, call: Call) -> tuple[list[Any], list[str]]:
        """For each member: the activation module after it, or None; and the function to apply."""
        places: list[Any] = self._no_places
        activations = self._activations
        for index, site in call.follows if self._guards_activations else ():
            reference = self.members[index] if index < len(self.members) else None
            member: Any = None if reference is None else reference()
            if member is None or self._activations[index] != "none":
                continue
            place = activation_of(member, input, owner, site)
            if place is not None:
                if places is self._no_places:
                    places, activations = places.copy(), activations.copy()
                places[index], activations[index] = place, place.function
        return places, activations

    def _intact(self) -> bool:
        """True if every member still has the tensors from which the group was formed."""
        bias_at = 0 if self.bias is None else self.bias.data_ptr()
        for state, activation, packed, scale, zero_point, bias, offset in self._parts:
            buffers = state["_buffers"]
            if (
                buffers["packed"] is not packed
                or buffers["qweight_scale"] is not scale
                or buffers["qweight_zero_point"] is not zero_point
                or state["_parameters"]["bias"] is not bias
                or state["activation"] is not activation
                or (bias is not None and bias.data_ptr() != bias_at + offset)
            ):
                return False
        return True

    # Tensors created in inference mode could not be changed in place or trained later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _form(self, members: list[Member]) -> None:
        self._out_features = [member.out_features for member in members]
        self._symmetric = members[0].config.activations.symmetric
        self._activations = [member.activation for member in members]
        self._guards_activations = any(member._fuses_activation for member in members)
        self._no_places = [None] * len(members)
        self._device_type = members[0].packed.device.type
        self._rows = (members[0].in_features,)  # in_features, which the GPU layout does not store
        self.packed = torch.cat([member.packed for member in members])
        self.weight_scale = torch.cat([member.qweight_scale for member in members])
        zero_points = [m.qweight_zero_point for m in members if m.qweight_zero_point is not None]
        self.weight_zero_point = torch.cat(zero_points) if zero_points else None
        self.bias = None
        dtypes = [member.bias.dtype for member in members if member.bias is not None]
        if dtypes:
            # For a member without bias, -0.0 is added, which does not change any float.
            self.bias = torch.cat(
                [
                    torch.full_like(member.qweight_scale, -0.0, dtype=dtypes[0])
                    if member.bias is None
                    else member.bias.detach()
                    for member in members
                ]
            )
        self._parts = []
        at = first = 0
        for index, member in enumerate(members):
            rows, size = (0, first, member.out_features), member.packed.shape[0]
            member.packed = self.packed.narrow(0, at, size)
            member.qweight_scale = self.weight_scale.narrow(*rows)
            if self.weight_zero_point is not None:
                member.qweight_zero_point = self.weight_zero_point.narrow(*rows)
            if member.bias is not None and self.bias is not None:
                member.bias.data = self.bias.narrow(*rows)  # the parameter stays the same object
            state = member.__dict__
            scales = (member.qweight_scale, member.qweight_zero_point)
            offset = first * (0 if self.bias is None else self.bias.element_size())
            self._parts.append(
                (state, member.activation, member.packed, *scales, member.bias, offset)
            )
            state["_group"], state["_group_index"] = self, index
            state["_guarded"] = True
            at, first = at + size, first + member.out_features
        self.active = True

    def __deepcopy__(self, memo: dict[int, Any]) -> ProjectionGroup:
        copy = memo[id(self)] = ProjectionGroup(
            len(self.members)
        )  # the copies of the members join it
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of one member has no group
