"""QATLinear: a linear layer that trains with the integers that will be deployed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchquant import functional, ops
from torchquant.configs import Dynamic, QuantizationConfig, Static
from torchquant.nn.base import Rounding, autocast_dtype
from torchquant.nn.call_guard import activation_after_call
from torchquant.nn.float_form import NN_LINEAR, FloatForm
from torchquant.nn.float_linear import refusal, weight_shape
from torchquant.nn.inputs import special_output
from torchquant.nn.intx_weight import group_size_of
from torchquant.nn.linear import QuantizedLinear
from torchquant.nn.linear_layer import LinearLayer
from torchquant.nn.qat_parts import (
    StraightThrough,
    activate,
    current_qparams,
    observe,
)
from torchquant.nn.replaced_activation import mark
from torchquant.nn.trained_layer import TrainedLayer
from torchquant.ops._arguments import has_kernels
from torchquant.scheme import PerAxis, PerGroup, PerToken
from torchquant.training.configuration import (
    ObservedActivations,
    TrainingConfig,
)
from torchquant.training.learned_steps import LSQQuantizer

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # saves two look-ups in each call


class QATLinear(TrainedLayer):
    """``y = activation(x @ weight.T + bias)`` in training, computed like the deployed layer.

    Each forward quantizes input and weight and multiplies integers, with the operators of the layer
    to deploy: a :class:`~torchquant.nn.QuantizedLinear` or, with groups or fewer than 8 bits, a
    :class:`~torchquant.nn.QuantizedIntxLinear`. While ranges do not change, its output is the
    output of ``to_quantized()``, bit for bit. Gradients pass straight through the rounding. The
    backward pass needs int8 activations instead of float activations, and one bit per output for a
    ReLU.

    The scales of the weight come from the range of each channel or group of inputs, or are learned
    steps (``weight_quantizer``). The scales of the activations come from the range of each token,
    or are one observed or learned scale (``input_quantizer``).

    State: ``weight`` ``[N, K]`` and ``bias`` ``[N]`` (parameters, float), ``quantize_enabled``
    uint8 ``[1]`` (see :meth:`enable_quantization`), and the state of the quantizers
    (``input_quantizer`` and ``qweight_quantizer``).

    Args:
        in_features: K, size of the input's last dimension.
        out_features: N, size of the output's last dimension.
        bias: whether the layer has a bias.
        config: a :class:`~torchquant.QATConfig`, or the configuration of the layer to deploy; None
            is ``QATConfig()``: 8 bits, dynamic.
        activation: "none" or "relu"; the layer applies it to its result.
        device: device of the state.
        dtype: dtype of weight and bias: float32, bfloat16 or float16.

    Raises:
        TypeError: config is not a configuration.
        ValueError: activation is not "none" or "relu", or no linear layer can be trained with the
            configuration.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018); Esser et al., "Learned Step Size Quantization"
    (2020).

    Example:
        >>> layer = QATLinear(64, 32, activation="relu")
        >>> x = torch.randn(4, 64)
        >>> torch.equal(layer(x), layer.to_quantized()(x))
        True
        >>> layer(x).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([32, 64])
    """

    bias: nn.Parameter | None
    renamed: ClassVar[Mapping[str, str]] = {"weight_quantizer": "qweight_quantizer"}
    quantized_class: ClassVar[type[QuantizedLinear]] = QuantizedLinear
    names: ClassVar[tuple[str, str]] = ("linear layer", "linear layers")
    # The class of the float layer, if it is not nn.Linear, and the layout of its weight.
    float_form: FloatForm = NN_LINEAR

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: TrainingConfig | QuantizationConfig | None = None,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._init(linear, self.checked("QATLinear", config), activation)

    @classmethod
    def config_refusal(cls, config: TrainingConfig) -> str | None:
        """The reason why no layer of this kind can be trained with ``config``, or None."""
        static = isinstance(config.deployed().activations, Static)
        if static and group_size_of(config.weights) is not None:
            return "weights in groups are trained with dynamic activations, or with float ones"
        return super().config_refusal(config)

    def _init(self, linear: nn.Module, config: TrainingConfig, activation: str) -> None:
        self.check_activation(activation)
        FloatForm.of(linear).give_to(self)
        self.out_features, self.in_features = shape = weight_shape(linear)
        deployed = config.deployed()
        reason = self.quantized_class.class_for(deployed, shape).shape_refusal(deployed, shape)
        if reason is not None:
            raise ValueError(f"QATLinear: {reason}")
        activations = config.activations
        self._weight_range = config.weights.range
        self._input_range = (-128, 127) if activations is None else activations.range
        ranged = isinstance(activations, (Dynamic, ObservedActivations))
        self._input_symmetric: bool = ranged and activations.symmetric
        self._group_size = group_size_of(config.weights)
        self._input_bits: int | None = None if activations is None else activations.bits
        # Groups and float activations have operators of their own.
        self._is_intx = self._group_size is not None or activations is None
        for name in ("weight", "bias"):
            self.register_parameter(name, linear._parameters[name])
        self.init_layer(config, activation, self.in_features, self.out_features)

    def _matrix(self) -> Tensor:
        """The weight as ``[out_features, in_features]``."""
        weight = self.weight
        return weight.t() if self.float_form.transposed else weight

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        config: TrainingConfig | QuantizationConfig | None = None,
        activation: str = "none",
    ) -> QATLinear:
        """Create a layer that trains the parameters of a float layer.

        The parameters are the same objects, so ties and optimizers stay valid.

        Args:
            linear: an nn.Linear, or a module that computes the same (transformers' Conv1D), with
                float32, bfloat16 or float16 weights.
            config: see the class.
            activation: "none" or "relu"; the activation that follows the float layer.

        Raises:
            TypeError: linear does not compute what an nn.Linear computes, its weight is
                parametrized, pruned or not float, or config is not a configuration.
            ValueError: activation is not "none" or "relu", or no linear layer can be trained with
                the configuration.
        """
        config = cls.checked("QATLinear.from_float", config)
        reason = refusal(linear)
        if reason is not None:
            raise TypeError(f"QATLinear.from_float: linear must be a plain nn.Linear, got {reason}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init(linear, config, activation)
        return layer.train(linear.training)

    def to_quantized(self) -> LinearLayer:
        """The layer to deploy; it holds integers and no float weight.

        Raises:
            ValueError: the weight holds NaN or infinities.
            RuntimeError: activations are static, and no range has been observed or learned.
        """
        self.check_finite(self.weight)
        scale, zero_point = self.input_qparams()
        deployed = self.config.deployed()
        matrix = self._matrix()
        layer_class: Any = self.quantized_class.class_for(deployed, tuple(matrix.shape))
        layer: LinearLayer = layer_class.from_tensors(
            matrix,
            self.bias,
            deployed,
            self.activation,
            weight_scale=self._weight_scale(),
            input_scale=scale,
            input_zero_point=zero_point,
        )
        self.float_form.give_to(layer)
        return layer.train(self.training)

    def to_float(self) -> nn.Module:
        """The float layer without the activation; it shares this layer's parameters."""
        return self.float_form.module(self.weight, self.bias).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: float32, bfloat16 or float16 ``[..., in_features]``.

        Returns:
            ``[..., out_features]`` in the dtype of ``input``, or in the dtype of autocast.

        Raises:
            TypeError: input is not a float32, bfloat16 or float16 tensor.
            ValueError: the last dimension of input is not in_features, or input is on another
                device than the layer.
            RuntimeError: the layer is in evaluation mode, its activations are static, and no range
                has been observed or learned.
        """
        if type(input) is not Tensor or input.is_nested:
            special = special_output(self, input)
            if special is not None:
                return special  # type: ignore[no-any-return]
        self._check_input(input)
        if not _is_dynamo_compiling() and not self.was_called and isinstance(input, Tensor):
            self.was_called = True
        place = None
        if self._guarded and self.activation == "none" and type(input) is Tensor:
            place = None if _is_dynamo_compiling() else activation_after_call(self, input)
        if place is None:
            return self.compute(input, self.activation)
        return mark(self.compute(input, place.function), place)

    def compute(self, input: Tensor, activation: str, rounding: Rounding = "own") -> Tensor:
        if not self._quantizing:
            if rounding == "own":
                observe(self.input_quantizer, input)
            return activate(nn.functional.linear(input, self._matrix(), self.bias), activation)
        if self.simulate or rounding == "none" or not has_kernels(self.weight):
            return self._simulated(input, activation, rounding)
        scale = zero_point = offset = weight_scale = None
        weight = self._matrix()
        if self._is_intx:
            return self._compute_intx(input, weight, activation)
        input_factor = weight_factor = 0.0
        input_qmin, input_qmax = self._input_range
        weight_qmin, weight_qmax = self._weight_range
        quantizer = self.input_quantizer
        if quantizer is None:
            pass
        elif rounding == "done":
            # As deployed, with signed integers. Gradients of the rounding are not this layer's.
            scale, zero_point = current_qparams(quantizer)
            zero_point = zero_point + self.shift
            input_qmin, input_qmax = self.config.activations.deployed().range
        elif isinstance(quantizer, LSQQuantizer):
            scale, offset = quantizer.prepare(input)
            input_factor = quantizer.grad_factor(input)
        else:
            observe(quantizer, input)
            scale, zero_point = quantizer.qparams()
        if self.qweight_quantizer is not None:
            weight_scale, _ = self.qweight_quantizer.prepare(weight)
            weight_factor = self.qweight_quantizer.grad_factor(weight)
        return ops.qat_linear(
            input,
            weight,
            self.bias,
            input_scale=scale,
            input_zero_point=zero_point,
            input_offset=offset,
            input_qmin=input_qmin,
            input_qmax=input_qmax,
            input_symmetric=self._input_symmetric,
            weight_scale=weight_scale,
            weight_qmin=weight_qmin,
            weight_qmax=weight_qmax,
            weight_symmetric=self.config.weights.symmetric,
            activation=activation,
            input_grad_factor=input_factor,
            weight_grad_factor=weight_factor,
            output_dtype=autocast_dtype(input),
        )

    def _compute_intx(self, input: Tensor, weight: Tensor, activation: str) -> Tensor:
        """The forward with groups of weights, or with float activations."""
        scale, factor = None, 0.0
        if self.qweight_quantizer is not None:
            scale, _ = self.qweight_quantizer.prepare(weight)
            factor = self.qweight_quantizer.grad_factor(weight)
        weight_qmin, weight_qmax = self._weight_range
        return ops.qat_linear_intx(
            input,
            weight,
            self.bias,
            weight_scale=scale,
            group_size=self._group_size,
            weight_qmin=weight_qmin,
            weight_qmax=weight_qmax,
            weight_symmetric=self.config.weights.symmetric,
            activation_bits=self._input_bits,
            activation_symmetric=self._input_symmetric,
            activation=activation,
            weight_grad_factor=factor,
            output_dtype=autocast_dtype(input),
        )

    def _simulated(self, input: Tensor, activation: str, rounding: Rounding) -> Tensor:
        """The forward with dequantized floats and torch's own matrix product."""
        quantizer = self.input_quantizer
        if quantizer is not None:
            x = quantizer(input) if rounding == "own" else input
        elif self._input_bits is None:
            x = input
        else:
            x = StraightThrough.apply(input, self._fake_quantized_rows(input))
        if self.qweight_quantizer is not None:
            weight = self.qweight_quantizer(self._matrix())
        else:
            weight = StraightThrough.apply(self._matrix(), self._fake_quantized_weight())
        return activate(nn.functional.linear(x, weight, self.bias), activation)

    @torch.no_grad()
    def _fake_quantized_rows(self, input: Tensor) -> Tensor:
        qmin, qmax = self._input_range
        _, scale, zero_point = functional.quantize_per_token(
            input, symmetric=self._input_symmetric, bits=self.config.activations.bits
        )
        return functional.fake_quantize(
            input, scale, zero_point, qmin=qmin, qmax=qmax, granularity=PerToken()
        )

    @torch.no_grad()
    def _fake_quantized_weight(self) -> Tensor:
        qmin, qmax = self._weight_range
        weight, size, part = self._matrix(), self._group_size, self.config.weights
        q, scale, zero_point = functional.quantize_pack_intx(
            weight,
            bits=part.bits,
            group_size=size,
            qmin=qmin,
            qmax=qmax,
            symmetric=part.symmetric,
        )
        return functional.dequantize(
            q,
            scale,
            zero_point.int(),
            granularity=PerAxis(0) if size is None else PerGroup(size),
            dtype=weight.dtype,
        )

    def _weight_scale(self) -> Tensor | None:
        quantizer = self.qweight_quantizer
        return None if quantizer is None else quantizer.qparams(self._matrix())[0]

    def _check_input(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            if isinstance(input, torch.fx.Proxy):
                return
            raise TypeError(f"QATLinear: input must be a tensor, got {type(input).__name__}")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"QATLinear: input must be [..., in_features] with in_features = "
                f"{self.in_features}, got {list(input.shape)}"
            )
        if input.device != self.weight.device:
            raise ValueError(
                f"QATLinear: input must be on the layer's device {self.weight.device}, got one on "
                f"{input.device}; move one of them"
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.config.weights}, activations "
            f"{self.config.activations}{self.state_text()}"
        )


__all__ = ["QATLinear"]
