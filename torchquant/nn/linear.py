"""QuantizedLinear: a linear layer with integer weights that runs on the int8 kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchquant import functional, ops
from torchquant._extension import load
from torchquant.configs import Dynamic, QuantizationConfig, Static, check_config
from torchquant.nn.base import QuantizedModule, autocast_dtype
from torchquant.nn.call_guard import activation_after, caller
from torchquant.nn.float_form import NN_LINEAR, FloatForm
from torchquant.nn.float_linear import refusal, value_refusal, weight_shape
from torchquant.nn.inputs import special_output
from torchquant.nn.linear_arguments import check_activation, check_size, static_parameters
from torchquant.nn.packed_state import Canonical, shared_parameter
from torchquant.nn.projections import ProjectionGroup
from torchquant.nn.replaced_activation import mark
from torchquant.scheme import PerAxis

_fast_linear_dynamic = load().linear_dynamic
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # saves two look-ups in each call


class QuantizedLinear(QuantizedModule):
    """``y = activation(x @ weight.T + bias)`` on integers of 2 to 8 bits.

    Dynamic activations are quantized with one scale per token, from the range of the token. Static
    activations are quantized with one scale that was observed or learned before.

    In memory, the weight is packed for the kernels of its device. A state dict holds the canonical
    int8 ``qweight`` ``[out_features, in_features]`` instead, so that checkpoints do not depend on a
    device or a layout. ``.to(device)``, pickling, ``copy.deepcopy`` and ``torch.save`` also use the
    canonical form, so a layer computes with the same integers on a GPU.

    State dict: ``qweight`` int8 ``[N, K]``, ``qweight_scale`` float32 ``[N]``,
    ``qweight_zero_point`` int32 ``[N]`` (absent if symmetric), ``input_scale`` float32 ``[1]`` and
    ``input_zero_point`` int32 ``[1]`` (static activations only), ``bias`` ``[N]`` (absent without
    bias).

    Scales stay float32 under ``.to(torch.bfloat16)``; the bias is an ordinary parameter, which is
    added in float32 whatever its dtype. The output has the dtype of the input, or the dtype of
    autocast in an autocast region. Gradients reach the input (straight through the quantizer) and a
    bias that requires gradients; the weight is frozen. ``weight`` reads the dequantized weight.

    Args:
        in_features: K, size of the input's last dimension.
        out_features: N, size of the output's last dimension.
        bias: whether the layer has a bias.
        config: the configuration, with weights per channel and ``Dynamic`` or ``Static``
            activations; None is ``Int8DynamicActivationInt8WeightConfig()``.
        activation: "none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "relu6",
            "hardswish", "hardsigmoid" or "leaky_relu"; applied after the bias.
        device: device of the state, which is not initialised; :meth:`from_float` creates a layer
            with values.
        dtype: the dtype in which the layer works: that of its bias and its readable ``weight``;
            None is float32.

    Raises:
        TypeError: config is not a configuration.
        ValueError: activation is not one of the names above, a size is not a positive integer, or
            no linear layer can have the configuration.

    Example:
        >>> linear = nn.Linear(64, 32)
        >>> layer = QuantizedLinear.from_float(linear)
        >>> x = torch.randn(4, 64)
        >>> bool((layer(x) - linear(x)).abs().max() < 0.1)
        True
        >>> print(layer.extra_repr()[:60])
        in_features=64, out_features=32, bias=True, int8 per channel
    """

    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bias: nn.Parameter | None
    stored: ClassVar[tuple[str, ...]] = ("in_features", "out_features", "bias", "activation")
    fused_activations: ClassVar[tuple[str, ...]] = tuple(functional.ACTIVATIONS)
    group_type: ClassVar[Any] = ProjectionGroup
    _group: ProjectionGroup | None
    # The class of the float layer, if it is not nn.Linear, and the layout of its weight.
    float_form: FloatForm = NN_LINEAR

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantizationConfig | None = None,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.config = _check_config("QuantizedLinear", config)
        self.activation = check_activation(activation)
        activations = self.config.activations
        self._static = isinstance(activations, Static)
        # Arguments of the operator, as attributes because reading the configuration is slower.
        self._activation_symmetric: bool = activations.symmetric
        self._activation_bits: int = activations.bits
        self.register_weight(self.weight_format.empty(self.weight_shape, device), dtype, bias)
        # Explicit dtypes: users load models under other default dtypes.
        scale = torch.ones(out_features, dtype=torch.float32, device=device)
        self.register_buffer("qweight_scale", scale)
        zero_point = torch.zeros(out_features, dtype=torch.int32, device=device)
        symmetric = self.config.weights.symmetric
        self.register_buffer("qweight_zero_point", None if symmetric else zero_point)
        one = torch.ones(1, dtype=torch.float32, device=device)
        self.register_buffer("input_scale", one if self._static else None)
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        self.register_buffer("input_zero_point", zero if self._static else None)
        zeros = torch.zeros(out_features, dtype=dtype or torch.float32, device=device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(out_features, in_features)``."""
        return self.out_features, self.in_features

    def canonical(self) -> Canonical:
        """Dtype and shape of each tensor of the layer's state dict, by name."""
        channel = (self.out_features,)
        tensors: Canonical = {
            "qweight": self.weight_format.canonical(self.weight_shape),
            "qweight_scale": (torch.float32, channel),
        }
        if self.qweight_zero_point is not None:
            tensors["qweight_zero_point"] = (torch.int32, channel)
        if self._static:
            tensors["input_scale"] = (torch.float32, (1,))
            tensors["input_zero_point"] = (torch.int32, (1,))
        if self.bias is not None:
            tensors["bias"] = (self.bias.dtype, channel)
        return tensors

    @classmethod
    def config_refusal(cls, config: QuantizationConfig) -> str | None:
        """The reason why no linear layer can have ``config``, or None."""
        if config.weights.granularity != PerAxis(0):
            return f"linear weights need PerAxis(0), not {config.weights.granularity}"
        if not isinstance(config.activations, (Dynamic, Static)):
            name = type(config.activations).__name__
            return f"linear layers need Dynamic or Static activations, not {name}"
        return None

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        config: QuantizationConfig | None = None,
        activation: str = "none",
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> QuantizedLinear:
        """Quantize a float layer; the float layer itself does not change.

        The new layer has the same bias: the same parameter object, so that ties stay. Hooks stay
        with the float layer; :func:`torchquant.quantize_` moves them to the new layer.

        Args:
            linear: an nn.Linear, or a module that computes the same (transformers' Conv1D), with
                float32, bfloat16 or float16 weights, on the CPU or on a CUDA device. The new layer
                is on the same device.
            config: the configuration; None is ``Int8DynamicActivationInt8WeightConfig()``.
            activation: an activation function that the layer applies to its result; see the class.
            input_scale: float32 ``[1]``, on any device; required for static activations.
            input_zero_point: int32 ``[1]``, on any device, for static activations; None is 0.

        Returns:
            A layer in the training mode of ``linear``.

        Raises:
            TypeError: linear does not compute what an nn.Linear computes, its weight is
                parametrized, pruned or not float, or config is not a configuration.
            ValueError: the weight is empty, holds NaN or infinities, or is on a device without
                kernels; input_scale is missing for static activations, or given for dynamic ones;
                input_scale or input_zero_point is out of range.
        """
        who = "QuantizedLinear.from_float"
        config = _check_config(who, config)
        check_activation(activation)
        reason = refusal(linear)
        if reason is not None:
            raise TypeError(f"{who}: linear must be a plain nn.Linear, got {reason}")
        reason = value_refusal(linear)
        if reason is not None:
            raise ValueError(f"{who}: linear cannot be quantized: {reason}")
        form = FloatForm.of(linear)
        layer = cls.from_tensors(
            form.matrix(linear.weight),
            linear.bias,
            config,
            activation,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
        )
        form.give_to(layer)
        return layer.train(linear.training)

    @classmethod
    def from_tensors(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        config: QuantizationConfig,
        activation: str = "none",
        *,
        weight_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> QuantizedLinear:
        """Quantize a float weight into a new layer.

        Args:
            weight: float ``[N, K]``; the layer works in its dtype.
            bias: float ``[N]``, or None; a parameter becomes the layer's own parameter.
            config: see the class.
            activation: see the class.
            weight_scale: float32 ``[N]``; None derives the scales from the range of each channel.
            input_scale: see :meth:`from_float`.
            input_zero_point: see :meth:`from_float`.

        Raises:
            ValueError: input_scale or input_zero_point is missing, superfluous or out of range.
        """
        given = static_parameters(config, input_scale, input_zero_point, weight.device)
        out_features, in_features = weight.shape  # attributes of a layer may be out of date
        sizes = (in_features, out_features, bias is not None)
        layer = cls(*sizes, config, activation, "meta", weight.dtype)
        (qmin, qmax), symmetric = config.weights.range, config.weights.symmetric
        # Tensors created in inference mode could not take part in the training of an adapter.
        with torch.inference_mode(False), torch.no_grad():
            layer.packed, layer.qweight_scale, zero_point = ops.quantize_pack(
                weight.detach(), weight_scale, qmin=qmin, qmax=qmax, symmetric=symmetric
            )
            if not symmetric:
                layer.qweight_zero_point = zero_point
            if given is not None:
                layer.input_scale, layer.input_zero_point = given
            if bias is not None:
                layer.bias = shared_parameter(bias)
            layer.move_placeholder()
        return layer

    def to_float(self) -> nn.Module:
        """A float layer with the values that the integers represent, without the activation.

        It has the dtype and the bias of this layer. It is an ``nn.Linear``, or a module of the
        class from which this layer was made.
        """
        linear = self.float_form.module(nn.Parameter(self.dequantized()), self.bias)
        return linear.train(self.training)

    def dequantized(self) -> Tensor:
        """The float weight that the integers represent, a new tensor in the layer's dtype."""
        scale, zero_point = self.qweight_scale, self.qweight_zero_point
        weight = ops.dequantize(self.qweight, scale, zero_point, granularity=PerAxis(0))
        return self.float_form.matrix(weight.to(self.dtype))

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Shape of the weight of the float layer."""
        return self.float_form.shape(self.weight_shape)

    @classmethod
    def stored_value(cls, module: nn.Module, name: str) -> Any:
        """The value that a file stores for an argument in ``stored``."""
        if name in ("in_features", "out_features"):
            return weight_shape(module)[name == "in_features"]
        return super().stored_value(module, name)

    def adopt(self, module: nn.Module) -> None:
        """Take over from the module that this layer replaces what its tensors do not hold."""
        FloatForm.of(module).give_to(self)

    def probe(self, rows: int, generator: torch.Generator) -> Tensor:
        """``rows`` random float32 inputs on the CPU, used to test a changed layer."""
        return torch.randn((rows, self.in_features), generator=generator, dtype=torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        All outputs of a row are NaN if the row holds a NaN. In a dynamic layer they are also NaN if
        the row holds an infinity.

        Args:
            input: float32, bfloat16 or float16 ``[..., in_features]``.

        Returns:
            ``[..., out_features]`` in the dtype of ``input``, or in the dtype of autocast.

        Raises:
            TypeError: input is not a float32, bfloat16 or float16 tensor.
            ValueError: the last dimension of input is not in_features, or input is on another
                device than the layer.
        """
        if type(input) is not Tensor or input.is_nested:
            special = special_output(self, input)
            if special is not None:
                return special  # type: ignore[no-any-return]
        activation, place = self.activation, None
        # Bypassing nn.Module.__getattr__ and torch.ops saves 4 us in each call.
        kernels = type(input) is Tensor and (input.is_cpu or self._is_for_gpu(input))
        if kernels and not _is_dynamo_compiling():
            if self._guarded:
                found = caller(0)
                if found is not None:
                    frame, call = found
                    if self._group is not None:
                        shared = self._group.output(self._group_index, input, frame, call)
                        if shared is not None:
                            return shared
                    if activation == "none" and self._fuses_activation:
                        place = activation_after(self, input, frame, call)
                        if place is not None:
                            activation = place.function
                elif self._group is not None:
                    self._group.forget()
            if not self._static:
                buffers = self._buffers
                try:
                    output: Tensor = _fast_linear_dynamic(
                        input,
                        buffers["packed"],
                        buffers["qweight_scale"],
                        buffers["qweight_zero_point"],
                        self._parameters["bias"],
                        self.out_features,
                        self._activation_symmetric,
                        activation,
                        self._activation_bits,
                    )
                except (ValueError, IndexError):
                    self._check_input(input)  # raises with the argument names of a layer
                    raise
                return output if place is None else mark(output, place)
        if self._static:
            self._check_input(input)
            output = self._static_output(input, self.bias, activation)
            return output if place is None else mark(output, place)
        self._check_input(input)
        return self._dynamic_output(input, self.bias, self.activation)

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """``F.linear(input, self.weight, bias)`` on integers; None if the layout is another one."""
        if self.float_form.transposed:
            return None
        self._check_input(input)
        bias = None if bias is None else bias.expand(self.out_features)
        output = self._static_output if self._static else self._dynamic_output
        return output(input, bias, "none")

    def _dynamic_output(self, input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return ops.linear_dynamic(
            input,
            self.packed,
            self.qweight_scale,
            self.qweight_zero_point,
            bias,
            out_features=self.out_features,
            symmetric=self._activation_symmetric,
            activation=activation,
            output_dtype=autocast_dtype(input),
            activation_bits=self._activation_bits,
        )

    def _static_output(self, input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        assert self.input_scale is not None
        qmin, qmax = self.config.activations.range
        return ops.linear_static(
            input,
            self.input_scale,
            self.input_zero_point,
            self.packed,
            self.qweight_scale,
            self.qweight_zero_point,
            bias,
            out_features=self.out_features,
            activation=activation,
            output_dtype=autocast_dtype(input) or input.dtype,
            input_qmin=qmin,
            input_qmax=qmax,
        )

    def _is_for_gpu(self, input: Tensor) -> bool:
        """True if input is on a CUDA device; in that case the shape of the input is checked, too.

        The GPU layout stores in_features rounded up to a multiple of 64, so the operator cannot
        check the shape.
        """
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
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.config.weights}, activations "
            f"{self.config.activations}{fused}"
        )

    # Changes of the weight that a group of layers must be notified of.
    def weight_replaced(self) -> None:
        if self._group is not None:
            self._group.moved()

    def _load_qweight_by_assignment(self, qweight: Tensor) -> None:
        if self._group is not None:
            self._group.dissolve()
        super()._load_qweight_by_assignment(qweight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        group = self.__dict__.pop("_group", None)
        if group is not None:  # the copy of the group forms once all copied members have joined
            group.join(self._group_index, self)


def _check_config(who: str, config: QuantizationConfig | None) -> QuantizationConfig:
    config = check_config(who, config)
    reason = QuantizedLinear.config_refusal(config)
    if reason is not None:
        raise ValueError(f"{who}: config must fit a linear layer, got {config}: {reason}")
    return config
