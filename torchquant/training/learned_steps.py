"""LSQ and LSQ+: quantizers whose step (and offset) is learned with the weights.

Step and offset are small parameters that the optimizer updates. They are initialised from the first
training batch or weight; a buffer records that this has happened. The step stays positive whatever
the optimizer does to it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchquant import functional, ops
from torchquant.functional._checks import MIN_SCALE
from torchquant.scheme import PER_TENSOR, Granularity, PerAxis, PerGroup, quant_range
from torchquant.training.layer_part import LayerPart
from torchquant.training.learned_state import (
    initialize,
    initialize_operator,
    project,
    project_operator,
)
from torchquant.training.processes import ALONE, process_group_name
from torchquant.training.state import inside_backward


class LSQQuantizer(LayerPart):
    """Learned step size quantization: rounds to multiples of a step that is trained.

    ``vhat = step * rint(clip(v / step, -Qn, Qp))``; its gradient in ``step`` is
    ``rint(v/step) - v/step`` inside the range, -Qn below and Qp above it, times
    ``1 / sqrt(N * Qp)``. N is the number of weights that share a step, or the number of features of
    an activation: never the batch size, so that training does not depend on it.

    The first batch in training mode (the weight itself, for a weight) sets
    ``step = 2 * mean|v| / sqrt(Qp)`` over all processes, unless it holds only zeros. The step is
    projected to at least 2^-126 wherever it is used or saved: a learning rate that is far too large
    cannot make it negative, and its gradient can raise it again. Under FSDP2 a forward sees only a
    copy of the parameters, so run one batch, or :meth:`initialize`, before ``fully_shard``. A graph
    that torch.compile traced before the initialisation reads ``initialized`` in every step; a graph
    traced afterwards does not. Only the first batch waits for a GPU.

    State: ``step`` float32 ``[1]``, ``[C]`` or, with groups, ``[C, num_groups]`` (parameter),
    ``offset`` of the same shape (absent if symmetric), ``initialized`` uint8 ``[1]``. ``step`` and
    ``offset`` stay float32 under ``.to(torch.bfloat16)``.

    Args:
        bits: 2 to 8.
        symmetric: if True, the zero point is 0. If False, this is LSQ+: an ``offset`` in real units
            is learned too and gives the integer zero point ``clamp(rint(-offset / step), qmin,
            qmax)``; step and offset start from a search for the least squared error.
        per_channel: one step for each of ``num_channels`` slices along ``axis``.
        num_channels: C; only with ``per_channel``.
        signed: whether the range is ``[-2^(bits-1), 2^(bits-1) - 1]`` or ``[0, 2^bits - 1]``.
        num_features: N. With None, N is the number of weights that share a step if the input is an
            nn.Parameter or ``per_channel`` is set, otherwise the input's last dimension.
        axis: axis of the channels.
        group_size: with ``per_channel``: the values of a channel ``[C, K]`` that share a step, runs
            along the last axis, the last of which may be shorter; N is group_size. None: all share
            one.
        num_groups: ``ceil(K / group_size)``; only with ``group_size``.
        process_group: processes that average the initial step; None is the default group.
        device: device of the state.

    Raises:
        TypeError: process_group is not a torch.distributed ProcessGroup.
        ValueError: bits is not an integer from 2 to 8, num_channels, num_features, group_size or
            num_groups is not a positive integer, num_channels or group_size is given without
            per_channel, num_groups without group_size, or axis is not an integer.
        RuntimeError: the quantizer is used in evaluation mode on values other than 0, or its scale
            is read, before it was initialised. A weight (an nn.Parameter) gives the step itself.

    Source: Esser et al., "Learned Step Size Quantization" (2020); Bhalgat et al., "LSQ+: Improving
    low-bit quantization through learnable offsets and better initialization" (2020).

    Example:
        >>> quantizer = LSQQuantizer(bits=3)
        >>> quantizer(torch.tensor([[-1.0, 0.2, 0.6]]))
        tensor([[-0.6928,  0.0000,  0.6928]], grad_fn=<...>)
        >>> quantizer.step
        Parameter containing:
        tensor([0.6928], requires_grad=True)
    """

    step: nn.Parameter
    offset: nn.Parameter | None
    initialized: Tensor

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = True,
        per_channel: bool = False,
        num_channels: int = 1,
        *,
        signed: bool = True,
        num_features: int | None = None,
        axis: int = 0,
        group_size: int | None = None,
        num_groups: int = 1,
        process_group: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.bits = bits
        self.qmin, self.qmax = quant_range(bits, signed=signed)
        self.symmetric, self.per_channel = bool(symmetric), bool(per_channel)
        self.num_channels = _positive(who, "num_channels", num_channels)
        if not per_channel and num_channels != 1:
            raise ValueError(
                f"{who}: num_channels must be 1 without per_channel, got {num_channels}; pass "
                "per_channel=True with it"
            )
        if num_features is not None:
            _positive(who, "num_features", num_features)
        self.num_features = num_features
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise ValueError(f"{who}: axis must be an integer, got {axis!r}")
        self.axis = axis
        _positive(who, "num_groups", num_groups)
        if group_size is None and num_groups != 1:
            raise ValueError(
                f"{who}: num_groups must be 1 without group_size, got {num_groups}; pass "
                "group_size with it"
            )
        if group_size is not None:
            _positive(who, "group_size", group_size)
            if not per_channel or axis != 0:
                raise ValueError(
                    f"{who}: group_size must be None unless per_channel is True and axis is 0, got "
                    f"{group_size}"
                )
        self.group_size, self.num_groups = group_size, num_groups
        self.group_name = process_group_name(who, process_group)
        # Dtypes are explicit: models are also built under another default dtype.
        shape = (num_channels,) if group_size is None else (num_channels, num_groups)
        step = torch.ones(shape, dtype=torch.float32, device=device)
        self.step = nn.Parameter(step)
        self.register_parameter(
            "offset", None if symmetric else nn.Parameter(torch.zeros_like(step))
        )
        flag = torch.zeros(1, dtype=torch.uint8, device=device)
        self.register_buffer("initialized", flag)
        # A copy of the buffer's value, so that a forward need not wait for the device.
        self._initialized = False

    def forward(self, input: Tensor) -> Tensor:
        """Fake-quantize float32, bfloat16 or float16 ``[...]``; the result has input's dtype.

        Raises:
            TypeError: input is not a float32, bfloat16 or float16 tensor.
            ValueError: input is on another device, or does not have num_channels along axis.
            RuntimeError: the module is in evaluation mode and not initialised.
        """
        step, offset = self.prepare(input)
        return ops.fake_quantize_learned(
            input,
            step,
            offset,
            qmin=self.qmin,
            qmax=self.qmax,
            grad_factor=self.grad_factor(input),
            granularity=self.granularity,
        )

    @property
    def granularity(self) -> Granularity:
        """The values that share a step."""
        if self.group_size is not None:
            return PerGroup(self.group_size)
        return PerAxis(self.axis) if self.per_channel else PER_TENSOR

    def prepare(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and offset, ready for use: initialised from ``input`` if necessary, and projected.

        Layers call this method to pass step and offset to a fused operator. It raises the same
        errors as :meth:`forward`.
        """
        self.check_input(input, self.initialized)
        self._check_state(input)
        offset = None if self.offset is None else self.offset.detach()
        if torch.compiler.is_compiling():
            if not self.training:  # an exported graph changes no state; the operators clamp too
                return self.step, self.offset
            if not self._initialized:
                initialize_operator(
                    input.detach(),
                    self.step.detach(),
                    offset,
                    self.initialized,
                    self.qmin,
                    self.qmax,
                    *self._shared,
                    self.group_name,
                )
            project_operator(self.step.detach(), offset, self.qmin, self.qmax)
            return self.step, self.offset
        if not self._initialized:
            if not self.training and isinstance(input, nn.Parameter) and not self._ready():
                return self._first(input)
            if not self._initialize_once(input):
                return self.step, self.offset
        # `.data`: tensors that autograd saved in an earlier use of the parameter stay valid. The
        # parameter was projected in that use, so its value does not change here.
        project(self.step.data, None if self.offset is None else self.offset.data, *self._range)
        return self.step, self.offset

    def initialize(self, input: Tensor) -> bool:
        """Set the step (and offset) from a tensor, over all processes, even if they are set.

        Returns:
            True if the tensor held a finite value other than 0. False if not: then nothing changes,
            and the next training batch initialises the quantizer.
        """
        self.check_input(input, self.initialized)
        self._check_state(input)
        offset = None if self.offset is None else self.offset.data
        self._initialized = initialize(
            input,
            self.step.data,
            offset,
            self.initialized,
            *self._range,
            *self._shared,
            self.group_name,
        )
        return self._initialized

    def grad_factor(self, input: Tensor) -> float:
        """``1 / sqrt(N * Qp)``, by which the gradients of step and offset are multiplied."""
        if self.num_features is not None:
            features: int = self.num_features
        elif self.group_size is not None:
            features = self.group_size
        elif self.per_channel or isinstance(input, nn.Parameter):
            features = input.numel() // self.num_channels
        else:
            features = input.shape[-1] if input.dim() else 1
        return 1.0 / math.sqrt(max(1, features) * self.qmax)

    def qparams(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(scale float32, zero_point int32)`` of step's shape, for a deployed layer.

        Args:
            weight: the weight that is quantized, or None for activations. It gives the step of a
                quantizer that is not initialised, which does not change.

        Raises:
            RuntimeError: the quantizer is not initialised, and weight is None.
        """
        step, offset = self.step.detach(), None if self.offset is None else self.offset.detach()
        if not self._initialized:
            if weight is None:
                self._read_initialized()
            elif not self._ready():
                step, offset = self._first(weight)
        with torch.no_grad():
            scale = step.clamp(min=MIN_SCALE)
            return scale, functional.learned_zero_point(scale, offset, self.qmin, self.qmax)

    def extra_repr(self) -> str:
        channels = f", {self.num_channels} channels along axis {self.axis}"
        if self.group_size is not None:
            channels = f", {self.num_channels} channels in groups of {self.group_size}"
        return (
            f"bits={self.bits}, range [{self.qmin}, {self.qmax}], "
            f"symmetric={self.symmetric}{channels if self.per_channel else ''}"
        )

    @property
    def _range(self) -> tuple[int, int]:
        return self.qmin, self.qmax

    @property
    def _shared(self) -> tuple[int | None, int | None]:
        """The axis of the channels and the group size, of which one is None, or both."""
        if self.group_size is not None:
            return None, self.group_size
        return self.axis if self.per_channel else None, None

    def _initialize_once(self, input: Tensor) -> bool:
        """True if the step can be used and projected; False if all batches so far were zeros."""
        if input.is_meta or inside_backward():
            return True
        if self._ready():  # also if user code wrote into the buffer
            return True
        if not self.training:
            if not bool(input.detach().any()):  # every step represents 0
                return False
            self._read_initialized()
        if getattr(self, "_is_fsdp_managed_module", False):
            raise RuntimeError(
                f"{self.title()}: the step must be initialised before fully_shard, under "
                "which a forward sees only a copy of it; run one batch in training mode before "
                "sharding, or call initialize(input)"
            )
        return self.initialize(input)

    @torch.no_grad()
    def _first(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The step and offset with which training would begin; nothing changes.

        All processes hold the same weight, so no process waits for another.
        """
        step, flag = self.step.detach().clone(), self.initialized.clone()
        offset = None if self.offset is None else self.offset.detach().clone()
        initialize(weight, step, offset, flag, *self._range, *self._shared, ALONE)
        project(step, offset, *self._range)
        return step, offset

    def _ready(self) -> bool:
        """True if the quantizer is initialised; waits for the device until it is."""
        if not self._initialized:
            self._initialized = self.initialized.is_meta or bool(self.initialized.item())
        return self._initialized

    def _read_initialized(self) -> None:
        if not self._ready():
            raise RuntimeError(
                f"{self.title()}: the step is not initialised yet; run a batch in training mode "
                "first, call initialize(input), or load a state dict"
            )

    def _check_state(self, input: Tensor) -> None:
        who = type(self).__name__
        if self.step.dtype != torch.float32:
            raise TypeError(
                f"{who}: step must be float32, got {self.step.dtype}; mixed precision must leave "
                "quantizers out: shard them on their own, fully_shard(quantizer) without a "
                "param_dtype, before the layers around them"
            )
        if self.per_channel:
            within = -input.dim() <= self.axis < input.dim()
            if not within or input.shape[self.axis] != self.num_channels:
                raise ValueError(
                    f"{who}: input must have num_channels = {self.num_channels} along axis "
                    f"{self.axis}, got {list(input.shape)}"
                )
        size = self.group_size
        if size is not None and (input.dim() != 2 or -(-input.shape[1] // size) != self.num_groups):
            raise ValueError(
                f"{who}: input must be [num_channels, K] with num_groups = {self.num_groups} "
                f"groups of {size}, got {list(input.shape)}"
            )

    def _state_replaced(self) -> None:
        if not self.initialized.is_meta:
            self._initialized = bool(self.initialized.item())

    def _save_to_state_dict(self, *arguments: Any) -> None:
        # A file holds the values that the next forward would use. Shards are not projected.
        if type(self.step.data) is Tensor and not self.step.is_meta:
            offset = None if self.offset is None else self.offset.data
            project(self.step.data, offset, *self._range)
        super()._save_to_state_dict(*arguments)


class LSQPlusQuantizer(LSQQuantizer):
    """LSQ+: :class:`LSQQuantizer` with a learned offset, for activations that are not centred on 0.

    Arguments, state and errors are those of :class:`LSQQuantizer` with ``symmetric=False``.

    Example:
        >>> quantizer = LSQPlusQuantizer(bits=4)
        >>> y = quantizer(torch.linspace(-1.0, 3.0, 101))
        >>> scale, zero_point = quantizer.qparams()
        >>> scale, zero_point
        (tensor([0.2604]), tensor([-4], dtype=torch.int32))
    """

    def __init__(
        self,
        bits: int = 8,
        per_channel: bool = False,
        num_channels: int = 1,
        *,
        signed: bool = True,
        num_features: int | None = None,
        axis: int = 0,
        process_group: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            bits,
            False,
            per_channel,
            num_channels,
            signed=signed,
            num_features=num_features,
            axis=axis,
            process_group=process_group,
            device=device,
        )


def _positive(who: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{who}: {name} must be an integer of at least 1, got {value!r}")
    return value


__all__ = ["LSQPlusQuantizer", "LSQQuantizer"]
