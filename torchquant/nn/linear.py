"""QuantizedLinear: an nn.Linear that holds integer weights and runs on the int8 kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchquant import functional, ops
from torchquant._extension import load
from torchquant.configs import Config, check_config
from torchquant.functional._checks import MIN_SCALE, scale_tensor, zero_point_tensor
from torchquant.nn.projections import ProjectionGroup
from torchquant.ops._arguments import has_kernels, wait_for_copy
from torchquant.scheme import PerAxis

_fast_linear_dynamic = load().linear_dynamic
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # two look-ups less a call

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_IN_FEATURES = 1 << 23  # csrc/formats/int8_tiles.h: sums of a row stay within int32


class QuantizedLinear(nn.Module):
    """``y = activation(x @ weight.T + bias)`` on integers of 2 to 8 bits.

    Activations are quantized per token with the range of the token, or, where the configuration is
    static, with one scale that training has found.

    In memory the weight exists once, packed for the kernels of its device; in a state dict it is
    the canonical int8 ``qweight`` ``[out_features, in_features]``, so that checkpoints do not
    depend on a device or a layout. ``.to(device)``, pickling, ``copy.deepcopy`` and ``torch.save``
    go through the canonical form too, so a layer computes the same integers on a GPU.

    State dict: ``qweight`` int8 ``[N, K]``, ``weight_scale`` float32 ``[N]``, ``weight_zero_point``
    int32 ``[N]`` (absent when symmetric), ``input_scale`` float32 ``[1]`` and ``input_zero_point``
    int32 ``[1]`` (static activations only), ``bias`` float32 ``[N]`` (absent without bias).

    Scales and bias stay float32 under ``.to(torch.bfloat16)``; the output has the input's dtype, or
    autocast's inside an autocast region. Gradients reach the input (straight through the quantizer)
    and a bias that requires them; the weight is frozen.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        config: how activations and weights are quantized.
        activation: "none", "relu", "gelu", "gelu_tanh", "silu", "tanh" or "sigmoid", fused behind
            the bias.
        device: of the (uninitialised) state; use :meth:`from_float` to get a filled layer.

    Raises:
        TypeError, ValueError: config, activation or a size is not what it must be.

    Example:
        >>> linear = nn.Linear(64, 32)
        >>> layer = QuantizedLinear.from_float(linear)
        >>> x = torch.randn(4, 64)
        >>> bool((layer(x) - linear(x)).abs().max() < 0.1)
        True
        >>> print(layer.extra_repr()[:60])
        in_features=64, out_features=32, bias=True, int8 per channel
    """

    packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bias: nn.Parameter | None
    # Layers that are computed together with this one, and its place among them.
    _group: ProjectionGroup | None = None
    _group_index: int = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: Config | None = None,
        activation: str = "none",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _size("in_features", in_features)
        self.out_features = _size("out_features", out_features)
        self.config = check_config("QuantizedLinear", config)
        self.activation = _check_activation(activation)
        # Never a buffer called `weight`: tie_weights() of transformers would overwrite it.
        packed = _pack_zeros(out_features, in_features, device)
        self.register_buffer("packed", packed, persistent=False)
        # Dtypes are written out: people load models under another default dtype.
        scale = torch.ones(out_features, dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scale)
        zero_point = torch.zeros(out_features, dtype=torch.int32, device=device)
        self.register_buffer("weight_zero_point", None if self.config.symmetric else zero_point)
        static = self.config.static
        one = torch.ones(1, dtype=torch.float32, device=device)
        self.register_buffer("input_scale", one if static else None)
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        self.register_buffer("input_zero_point", zero if static else None)
        zeros = torch.zeros(out_features, dtype=torch.float32, device=device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        config: Config | None = None,
        activation: str = "none",
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> QuantizedLinear:
        """Quantize a float layer; the float layer is left as it is.

        Hooks stay with the float layer; :func:`torchquant.quantize_` carries them over.

        Args:
            linear: an nn.Linear with float32, bfloat16 or float16 weights, on the CPU or on a
                CUDA device, where the new layer is too.
            config: how; :class:`~torchquant.Int8DynamicActivationInt8WeightConfig` when None.
            activation: to fuse behind it.
            input_scale, input_zero_point: float32 ``[1]`` and int32 ``[1]``, on any device, for a
                static configuration, which has no way to find them itself; zero point None is 0.

        Raises:
            TypeError: not exactly an nn.Linear with a float weight of its own (subclasses,
                parametrized or pruned weights), or config is not a configuration.
            ValueError: the weight is empty, holds NaN or infinities, or is on a device that has no
                kernels; a static configuration without input_scale, or one with it that is not
                static.
        """
        config = check_config("QuantizedLinear.from_float", config)
        _check_activation(activation)
        reason = refusal(linear)
        if reason is not None:
            raise TypeError(
                f"QuantizedLinear.from_float: linear must be a plain nn.Linear, got {reason}"
            )
        reason = value_refusal(linear)
        if reason is not None:
            raise ValueError(f"QuantizedLinear.from_float: linear cannot be quantized: {reason}")
        layer = cls._from_tensors(
            linear.weight, linear.bias, config, activation, None, input_scale, input_zero_point
        )
        return layer.train(linear.training)

    @classmethod
    def _from_tensors(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        config: Config,
        activation: str,
        weight_scale: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        weight_range: tuple[int, int] | None = None,
    ) -> QuantizedLinear:
        """A layer with the integers of a float weight; ``weight_scale`` None: from its ranges.

        ``weight_range`` None is the configuration's; learned steps use -128 too.
        """
        scale, zero_point = _static_parameters(config, input_scale, input_zero_point, weight.device)
        out_features, in_features = weight.shape  # a layer's own attributes may be out of date
        layer = cls(in_features, out_features, bias is not None, config, activation, device="meta")
        qmin, qmax = config.weight_range if weight_range is None else weight_range
        # Tensors born in inference mode could not take part in training an adapter later.
        with torch.inference_mode(False), torch.no_grad():
            layer.packed, layer.weight_scale, weight_zero_point = ops.quantize_pack(
                weight.detach(), weight_scale, qmin=qmin, qmax=qmax, symmetric=config.symmetric
            )
            if not config.symmetric:
                layer.weight_zero_point = weight_zero_point
            if scale is not None:
                layer.input_scale, layer.input_zero_point = scale, zero_point
            if bias is not None:
                values = bias.detach().to(torch.float32, copy=True)
                layer.bias = nn.Parameter(values, bias.requires_grad)
        return layer

    def to_float(self) -> nn.Linear:
        """A float32 nn.Linear with the values that the integers stand for, no activation behind."""
        weight = ops.dequantize(
            self.qweight, self.weight_scale, self.weight_zero_point, granularity=PerAxis(0)
        )
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def qweight(self) -> Tensor:
        """The int8 ``[out_features, in_features]`` weight, unpacked anew on each access."""
        return ops.unpack_weight(self.packed, self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Float ``[..., in_features]`` to ``[..., out_features]``.

        A row with NaN (of a dynamic layer: or an infinity) gives NaN in all its outputs.

        Raises:
            TypeError: input is not float32, bfloat16 or float16.
            ValueError: input's last dimension is not in_features, or it is on another device.
        """
        if self.config.static:
            return self._static_forward(input)
        # Past nn.Module.__getattr__ and torch.ops: 4 us less a call.
        kernels = type(input) is Tensor and (input.is_cpu or self._is_for_gpu(input))
        if kernels and not _is_dynamo_compiling():
            if self._group is not None:
                shared = self._group.output(self._group_index, input)
                if shared is not None:
                    return shared
            buffers = self._buffers
            try:
                return _fast_linear_dynamic(  # type: ignore[no-any-return]
                    input,
                    buffers["packed"],
                    buffers["weight_scale"],
                    buffers["weight_zero_point"],
                    self._parameters["bias"],
                    self.out_features,
                    self.config.activation_symmetric,
                    self.activation,
                    self.config.activation_bits,
                )
            except (ValueError, IndexError):
                self._check_input(input)  # in the words of a layer, where its words fit
                raise
        self._check_input(input)
        return ops.linear_dynamic(
            input,
            self.packed,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            out_features=self.out_features,
            symmetric=self.config.activation_symmetric,
            activation=self.activation,
            output_dtype=autocast_dtype(input),
            activation_bits=self.config.activation_bits,
        )

    def _static_forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        assert self.input_scale is not None
        qmin, qmax = self.config.activation_range
        return ops.linear_static(
            input,
            self.input_scale,
            self.input_zero_point,
            self.packed,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            out_features=self.out_features,
            activation=self.activation,
            output_dtype=autocast_dtype(input) or input.dtype,
            input_qmin=qmin,
            input_qmax=qmax,
        )

    def _is_for_gpu(self, input: Tensor) -> bool:
        """Whether it is on one; checked, for that layout knows in_features to a multiple of 64."""
        if not input.is_cuda:
            return False
        self._check_input(input)
        return True

    def _check_input(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            if isinstance(input, torch.fx.Proxy):
                return
            raise TypeError(f"QuantizedLinear: input must be a tensor, got {type(input).__name__}")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"QuantizedLinear: input must be [..., in_features] with in_features = "
                f"{self.in_features}, got {list(input.shape)}"
            )
        if input.device != self.packed.device:
            remedy = "load its weights first" if self.packed.is_meta else "move one of them"
            raise ValueError(
                f"QuantizedLinear: input must be on the layer's device {self.packed.device}, "
                f"got one on {input.device}; {remedy}"
            )

    def extra_repr(self) -> str:
        config = self.config
        weight = f"int{config.weight_bits} per channel"
        weight += "" if config.symmetric else " with zero point"
        tokens = f"int{config.activation_bits} per {'tensor' if config.static else 'token'}"
        tokens += "" if config.activation_symmetric else " with zero point"
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {weight}, activations {tokens}{fused}"
        )

    # State: canonical outside, packed inside.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
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
        if self._group is not None and moved is not packed:
            self._group.moved()
        return self

    def _moved(self, packed: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """The packed weight where ``fn`` has put the scales, in that device's layout."""
        device = self.weight_scale.device
        if device.type == packed.device.type:
            return fn(packed)
        if packed.is_meta or device.type == "meta":  # to_empty(): no values, but a valid layout
            return _pack_zeros(self.out_features, self.in_features, device)
        qweight = ops.unpack_weight(packed, self.out_features, self.in_features)
        moved = fn(qweight)
        wait_for_copy(qweight, moved)
        return ops.pack_weight(moved)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # Named one by one: whatever else was put on the layer (a tied `weight`) is not its state.
        tensors = {
            "qweight": self.qweight,
            "weight_scale": self.weight_scale,
            "weight_zero_point": self.weight_zero_point,
            "input_scale": self.input_scale,
            "input_zero_point": self.input_zero_point,
            "bias": self.bias,
        }
        for name, tensor in tensors.items():
            if tensor is not None:
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
        rest = dict(state_dict)
        for name in (
            "weight_scale",
            "input_scale",
            "bias",
        ):  # somebody may have converted the file to bfloat16
            value = rest.get(prefix + name)
            if isinstance(value, Tensor) and value.is_floating_point():
                rest[prefix + name] = _as_float32(value)
        assign = local_metadata.get("assign_to_params_buffers", False)
        problems = self._state_problems(rest, prefix, assign)
        if problems:  # all or nothing: scales of one layer on the integers of another are nonsense
            error_msgs.extend(problems)
            return
        for name, other in self._parameters.items():  # a tied `weight`: it loads as itself
            if name != "bias":
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
            if self._group is not None:
                self._group.dissolve()
            self.packed = ops.pack_weight(qweight)
        elif not self.packed.is_meta:  # torch has warned that copying into meta does nothing
            with torch.no_grad():
                self.packed.copy_(ops.pack_weight(qweight.to(self.packed.device)))

    def _state_problems(self, state: Mapping[str, Any], prefix: str, assign: bool) -> list[str]:
        """What is wrong with this layer's entries, in words; missing ones are torch's to report."""
        channel = [self.out_features]
        wanted = {
            "qweight": (torch.int8, [self.out_features, self.in_features]),
            "weight_scale": (torch.float32, channel),
            "weight_zero_point": (torch.int32, channel),
            "input_scale": (torch.float32, [1]),
            "input_zero_point": (torch.int32, [1]),
            "bias": (torch.float32, channel),
        }
        if not self.config.static:  # torch reports them as unexpected
            del wanted["input_scale"], wanted["input_zero_point"]
        problems = []
        for name, (dtype, shape) in wanted.items():
            value = state.get(prefix + name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                got = type(value).__name__
            elif value.dtype != dtype or list(value.shape) != shape:
                got = f"{_dtype_name(value.dtype)} {list(value.shape)}"
            elif value.is_meta and not (assign or self.packed.is_meta):
                got = "one on the meta device, without values"
            else:
                continue
            problems.append(f"{prefix}{name} must be {_dtype_name(dtype)} {shape}, got {got}")
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
        static = {"input_scale": None, "input_zero_point": None}  # older versions pickled neither
        self._buffers = {"packed": ops.pack_weight(qweight), **static, **self._buffers}
        group = self.__dict__.pop("_group", None)
        if group is not None:  # copied with its group: they are together again once all are copied
            group.join(self._group_index, self)


def refusal(module: nn.Module) -> str | None:
    """Why a module is not of the kind that can become a QuantizedLinear; None where it is."""
    if getattr(module, "parametrizations", None):
        return f"{type(module).__name__} (parametrized)"
    if type(module) is not nn.Linear:
        kind = "subclass of nn.Linear" if isinstance(module, nn.Linear) else "not an nn.Linear"
        return f"{type(module).__name__} ({kind})"
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"{name} computed from other tensors (weight_norm, spectral_norm, pruning)"
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter:
        return f"weight of type {type(weight).__name__}"
    if weight.dtype not in _FLOAT_DTYPES:
        return f"weight of dtype {_dtype_name(weight.dtype)}"
    if "forward" in module.__dict__:
        return "forward replaced on the instance"
    return None


def value_refusal(module: nn.Module) -> str | None:
    """Why a layer that :func:`refusal` accepts cannot be quantized all the same, or None."""
    assert isinstance(module, nn.Linear)
    weight = module.weight.detach()
    if weight.is_meta:
        return "on the meta device, without values; load its weights first"
    if not has_kernels(weight):
        return f"on {weight.device}; move it to the CPU or to a CUDA device first"
    if weight.dim() != 2 or not 1 <= weight.shape[1] <= _MAX_IN_FEATURES or weight.shape[0] < 1:
        return f"weight of shape {list(weight.shape)}"
    least, greatest = torch.aminmax(weight)  # no temporary of the weight's size
    if not (torch.isfinite(least) and torch.isfinite(greatest)):
        return "its weight holds NaN or infinity; check the checkpoint that it came from"
    return None


def _static_parameters(
    config: Config, scale: Tensor | None, zero_point: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """A static layer's input_scale and input_zero_point, copied to its device; None for a dynamic
    one."""
    who = "QuantizedLinear.from_float"
    if not config.static:
        if scale is not None or zero_point is not None:
            raise ValueError(
                f"{who}: input_scale and input_zero_point must be None for dynamic activations, "
                f"whose scales are found at run time; config is {config}"
            )
        return None, None
    if scale is None:
        raise ValueError(
            f"{who}: input_scale must be given for static activations ({type(config).__name__}): "
            "a weight says nothing about the range of its inputs; train with "
            "torchquant.prepare_qat_ and torchquant.convert_, or pass input_scale and "
            "input_zero_point"
        )
    qmin, qmax = config.activation_range
    if isinstance(scale, Tensor):
        scale = scale.detach().to(device, copy=True)
    if isinstance(zero_point, Tensor):
        zero_point = zero_point.to(device)
    scale = scale_tensor(who, "input_scale", scale, device, (1,))
    if not MIN_SCALE <= scale.item() < float("inf"):
        raise ValueError(
            f"{who}: input_scale must be finite and at least 2^-126, got {scale.item()}"
        )
    zero_point = zero_point_tensor(who, "input_zero_point", zero_point, device, qmin, qmax, (1,))
    if not qmin <= zero_point.item() <= qmax:
        raise ValueError(
            f"{who}: input_zero_point must be from {qmin} to {qmax}, got {zero_point.item()}"
        )
    return scale, zero_point.clone()


def _pack_zeros(out_features: int, in_features: int, device: torch.device | str | None) -> Tensor:
    zero = torch.zeros((), dtype=torch.int8, device=device)
    return ops.pack_weight(zero.expand(out_features, in_features))


def _size(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"QuantizedLinear: {name} must be an integer of at least 1, got {value!r}")
    return value


def _check_activation(activation: str) -> str:
    if activation not in functional.ACTIVATIONS:
        raise ValueError(
            f"QuantizedLinear: activation must be one of {', '.join(functional.ACTIVATIONS)}, "
            f"got {activation!r}"
        )
    return activation


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_float32(value: Tensor) -> Tensor:
    if value.dtype == torch.float32:
        return value
    converted = value.detach().to(torch.float32)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(converted, value.requires_grad)
    return converted


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What a linear returns for this input: autocast's dtype where it is on, None for input's."""
    if not isinstance(input, Tensor):
        return None
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None
