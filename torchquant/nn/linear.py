"""QuantizedLinear: an nn.Linear that holds int8 weights and runs on the integer kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchquant import functional, ops
from torchquant._extension import load
from torchquant.configs import Int8DynamicActivationInt8WeightConfig
from torchquant.scheme import PerAxis

_fast_linear_dynamic = load().linear_dynamic


class QuantizedLinear(nn.Module):
    """``y = activation(x @ weight.T + bias)`` with an int8 weight and activations quantized per token.

    In memory the weight exists once, packed for the kernels; in a state dict it is the canonical int8
    ``qweight`` ``[out_features, in_features]``, so that checkpoints do not depend on a CPU or a layout.
    Pickling, ``copy.deepcopy`` and ``torch.save`` go through the canonical form too.

    State dict: ``qweight`` int8 ``[N, K]``, ``weight_scale`` float32 ``[N]``, ``weight_zero_point`` int32
    ``[N]`` (absent when symmetric), ``bias`` float32 ``[N]`` (absent without bias).

    Scales and bias stay float32 under ``.to(torch.bfloat16)``; the output has the input's dtype, or
    autocast's inside an autocast region. Gradients reach the input (straight through the quantizer)
    and a bias that requires them; the weight is frozen.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        config: how activations and weights are quantized.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", fused behind the bias.
        device: of the (uninitialised) state; use :meth:`from_float` to get a filled layer.

    Example:
        >>> linear = nn.Linear(64, 32)
        >>> layer = QuantizedLinear.from_float(linear)
        >>> x = torch.randn(4, 64)
        >>> bool((layer(x) - linear(x)).abs().max() < 0.1)
        True
        >>> layer
        QuantizedLinear(in_features=64, out_features=32, bias=True, int8 per channel, activations int8 per token)
    """

    packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: Int8DynamicActivationInt8WeightConfig | None = None,
        activation: str = "none",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if activation not in functional.ACTIVATIONS:
            raise ValueError(
                f"QuantizedLinear: activation must be one of {', '.join(functional.ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.config = config if config is not None else Int8DynamicActivationInt8WeightConfig()
        self.activation = activation
        channel = {"size": (out_features,), "device": device}
        qweight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        # Never a buffer called `weight`: tie_weights() of transformers would overwrite it.
        self.register_buffer("packed", ops.pack_weight(qweight), persistent=False)
        self.register_buffer("weight_scale", torch.ones(**channel))
        zero_point = None if self.config.symmetric else torch.zeros(**channel, dtype=torch.int32)
        self.register_buffer("weight_zero_point", zero_point)
        self.register_parameter("bias", nn.Parameter(torch.zeros(**channel)) if bias else None)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        config: Int8DynamicActivationInt8WeightConfig | None = None,
        activation: str = "none",
    ) -> QuantizedLinear:
        """Quantize a float layer; the float layer is left as it is.

        Args:
            linear: an nn.Linear with float32, bfloat16 or float16 weights.
            config: how; :class:`~torchquant.Int8DynamicActivationInt8WeightConfig` when None.
            activation: to fuse behind it.

        Raises:
            TypeError: not exactly an nn.Linear, or not a float one.
            ValueError: the weight holds NaN or infinities, or is on the meta device.
        """
        reason = refusal(linear)
        if reason is not None:
            raise TypeError(f"QuantizedLinear.from_float: linear must be a plain nn.Linear, got {reason}")
        if linear.weight.is_meta:
            raise ValueError(
                "QuantizedLinear.from_float: linear must hold values, got a layer on the meta device; "
                "load its weights first, or torchquant.load a quantized checkpoint"
            )
        weight = linear.weight.detach()
        if not torch.isfinite(weight).all():
            raise ValueError(
                "QuantizedLinear.from_float: weight must be finite, got NaN or infinity; "
                "check the checkpoint that it came from"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            config,
            activation,
            device="meta",  # nothing is allocated twice
        )
        scale, zero_point = functional.choose_qparams(
            weight, symmetric=layer.config.symmetric, granularity=PerAxis(0)
        )
        qmin = -127 if layer.config.symmetric else -128
        qweight = ops.quantize(weight, scale, zero_point, qmin=qmin, granularity=PerAxis(0))
        layer.packed = ops.pack_weight(qweight)
        layer.weight_scale = scale
        if not layer.config.symmetric:
            layer.weight_zero_point = zero_point
        if linear.bias is not None:
            layer.bias = nn.Parameter(
                linear.bias.detach().to(torch.float32, copy=True), linear.bias.requires_grad
            )
        return layer.train(linear.training)

    def to_float(self) -> nn.Linear:
        """A float32 nn.Linear with the values that the integers stand for (no activation behind it)."""
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
        """Float ``[..., in_features]`` to ``[..., out_features]``."""
        if type(input) is Tensor and not torch.compiler.is_compiling():
            # Straight into the dispatcher, and past nn.Module.__getattr__: 4 us less a call.
            buffers = self._buffers
            return _fast_linear_dynamic(  # type: ignore[no-any-return]
                input,
                buffers["packed"],
                buffers["weight_scale"],
                buffers["weight_zero_point"],
                self._parameters["bias"],
                self.out_features,
                self.config.activation_symmetric,
                self.activation,
            )
        return ops.linear_dynamic(
            input,
            self.packed,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            out_features=self.out_features,
            symmetric=self.config.activation_symmetric,
            activation=self.activation,
            output_dtype=_autocast_dtype(input),
        )

    def extra_repr(self) -> str:
        weight = "int8 per channel" + ("" if self.config.symmetric else " with zero point")
        tokens = "int8 per token" + (
            "" if self.config.activation_symmetric else " with zero point"
        )
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

        super()._apply(keep_dtype, recurse)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[prefix + "qweight"] = self.qweight

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
        key = prefix + "qweight"
        qweight = rest.pop(key, None)
        problem = None if qweight is None else self._qweight_problem(qweight)
        if qweight is None and strict:
            missing_keys.append(key)
        if problem is not None:
            error_msgs.append(f"{key} {problem}")
            return
        for name in ("weight_scale", "bias"):  # a bf16 checkpoint of ours does not exist, but may be made
            value = rest.get(prefix + name)
            if isinstance(value, Tensor) and value.is_floating_point():
                rest[prefix + name] = _with_dtype(value, torch.float32)
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if qweight is not None:
            assign = local_metadata.get("assign_to_params_buffers", False)
            device = qweight.device if assign or self.packed.is_meta else self.packed.device
            if not (self.packed.is_meta and not assign):
                self.packed = ops.pack_weight(qweight.to(device))

    def _qweight_problem(self, qweight: Any) -> str | None:
        wanted = [self.out_features, self.in_features]
        if not isinstance(qweight, Tensor):
            return f"must be a tensor, got {type(qweight).__name__}"
        if qweight.dtype != torch.int8 or list(qweight.shape) != wanted:
            return (
                f"must be int8 {wanted}, got {str(qweight.dtype).removeprefix('torch.')} "
                f"{list(qweight.shape)}"
            )
        return None

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
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # In the order of __init__, so that copies print and iterate alike.
        self._buffers = {"packed": ops.pack_weight(qweight), **self._buffers}


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot become a QuantizedLinear, in words; None where it can."""
    if type(module) is not nn.Linear:
        kind = "subclass of nn.Linear" if isinstance(module, nn.Linear) else "not an nn.Linear"
        return f"{type(module).__name__} ({kind})"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"weight of dtype {str(module.weight.dtype).removeprefix('torch.')}"
    if getattr(module, "parametrizations", None):
        return "parametrized weight"
    return None


def _with_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == dtype:
        return value
    converted = value.detach().to(dtype)
    return nn.Parameter(converted, value.requires_grad) if isinstance(value, nn.Parameter) else converted


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What a linear returns for this input: autocast's dtype inside autocast, None for the input's own."""
    device = input.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None
