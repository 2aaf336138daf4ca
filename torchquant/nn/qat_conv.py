"""QATConv1d and QATConv2d: convolutions that train with the integers that will be deployed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchquant.configs import QuantizationConfig
from torchquant.nn.base import Rounding, autocast_dtype
from torchquant.nn.call_guard import activation_after_call
from torchquant.nn.conv import QuantizedConv, QuantizedConv1d, QuantizedConv2d, activations_text
from torchquant.nn.conv_geometry import (
    SIZES,
    check_input,
    padded,
    set_sizes,
    sizes_text,
)
from torchquant.nn.conv_simulation import float_conv, simulated_input, simulated_weight
from torchquant.nn.conv_weight import quantize_weight
from torchquant.nn.float_conv import float_class, refusal
from torchquant.nn.inputs import special_output
from torchquant.nn.integer_conv import Integers, Sizes, integer_conv, quantize_samples
from torchquant.nn.qat_parts import (
    Given,
    activate,
    current_qparams,
    learned_values,
    observe,
    rounded,
)
from torchquant.nn.replaced_activation import mark
from torchquant.nn.trained_layer import TrainedLayer
from torchquant.ops._arguments import has_kernels
from torchquant.scheme import PerAxis
from torchquant.training.configuration import (
    TrainingConfig,
)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # saves two look-ups in each call


class QATConv(TrainedLayer):
    """What QATConv1d and QATConv2d share; see there."""

    bias: nn.Parameter | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    dimensions: ClassVar[int]
    quantized_class: ClassVar[type[QuantizedConv]]
    names: ClassVar[tuple[str, str]] = ("convolution", "convolutions")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        config: TrainingConfig | QuantizationConfig | None = None,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = self.checked(type(self).__name__, config)
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        set_sizes(self, type(self).__name__, self.dimensions, *sizes, padding_mode)
        given = {name: getattr(self, name) for name in SIZES}
        conv = float_class(self.dimensions)(**given, bias=bias, device=device, dtype=dtype)
        self._init(conv, config, activation)

    def _init(self, conv: nn.Module, config: TrainingConfig, activation: str) -> None:
        who = type(self).__name__
        self.check_activation(activation)
        given = {name: getattr(conv, name) for name in SIZES}
        set_sizes(self, who, self.dimensions, **given)
        for name in ("weight", "bias"):
            self.register_parameter(name, conv._parameters[name])
        self.init_layer(config, activation, self.in_channels, self.out_channels)

    @classmethod
    def from_float(
        cls,
        conv: nn.Module,
        config: TrainingConfig | QuantizationConfig | None = None,
        activation: str = "none",
    ) -> Any:
        """Create a layer that trains the parameters of a float layer.

        The parameters are the same objects, so ties and optimizers stay valid.

        Args:
            conv: an nn.Conv1d or nn.Conv2d, no subclass, with float32, bfloat16 or float16 weights.
            config: see the class.
            activation: "none" or "relu"; the activation that follows the float layer.

        Raises:
            TypeError: conv is not exactly the float class, its weight is parametrized, pruned or
                not float, or config is not a configuration.
            ValueError: activation is not "none" or "relu", or no convolution can be trained with
                the configuration.
        """
        config = cls.checked(f"{cls.__name__}.from_float", config)
        cls._check_float(conv)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init(conv, config, activation)
        return layer.train(conv.training)

    def to_quantized(self) -> QuantizedConv:
        """The layer to deploy; it holds integers and no float weight.

        Raises:
            ValueError: the weight holds NaN or infinities.
            RuntimeError: activations are static, and no range has been observed or learned.
        """
        weight, bias = self._folded()
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach())
        self.check_finite(weight)
        scale, zero_point = self.input_qparams()
        layer: QuantizedConv = self.quantized_class.from_tensors(
            weight,
            bias,
            self,
            self.config.deployed(),
            self.activation,
            weight_scale=self._weight_scale(weight),
            input_scale=scale,
            input_zero_point=zero_point,
        )
        return layer.train(self.training)

    def to_float(self) -> nn.Module:
        """The float layer without the activation; it shares this layer's parameters."""
        sizes = {name: getattr(self, name) for name in SIZES}
        conv: Any = float_class(self.dimensions)(**sizes, bias=False, device="meta")
        conv._parameters.update(weight=self.weight, bias=self.bias)
        return conv.train(self.training)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: float32, bfloat16 or float16; a batch of samples, or one sample without the
                dimension of the batch.

        Returns:
            The outputs in the dtype of ``input``, or in the dtype of autocast.

        Raises:
            TypeError: input is not a float32, bfloat16 or float16 tensor.
            ValueError: the number of dimensions or the channels of input are wrong, input is
                smaller than the kernel, or it is on another device than the layer.
            RuntimeError: the layer is in evaluation mode, its activations are static, and no range
                has been observed or learned.
        """
        if type(input) is not Tensor or input.is_nested:
            special = special_output(self, input)
            if special is not None:
                return special  # type: ignore[no-any-return]
        if not isinstance(input, torch.fx.Proxy):
            check_input(self, input, self.weight.device, "move one of them")
        if not _is_dynamo_compiling() and not self.was_called and isinstance(input, Tensor):
            self.was_called = True
        activation, place = self.activation, None
        if self._guarded and activation == "none" and type(input) is Tensor:
            place = None if _is_dynamo_compiling() else activation_after_call(self, input)
            if place is not None:
                activation = place.function
        output = self.compute(input, activation)
        return output if place is None else mark(output, place)

    def compute(self, input: Tensor, activation: str, rounding: Rounding = "own") -> Tensor:
        samples = input if input.dim() == self.dimensions + 2 else input.unsqueeze(0)
        if rounding == "own":
            given = self._rounded_input(samples)
        else:
            given = self._given(samples, rounding == "done")
        output = self._compute(given, activation)
        return output if samples is input else output.squeeze(0)

    # ---------------------------------------------------------------- the computation

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias that the layer computes with, and that will be deployed."""
        return self.weight, self.bias

    def _compute(self, given: Given, activation: str) -> Tensor:
        weight, bias = self._folded()
        if not self._quantizing:
            return activate(float_conv(self, given.values, weight, bias), activation)
        return self._quantized(given, weight, bias, activation, autocast_dtype(given.values))

    def _quantized(
        self,
        given: Given,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """The forward with integers, or their simulation."""
        values, scale, zero_point, exact = given
        dtype = dtype or values.dtype
        qat_weight, weight_scale = self._rounded_weight(weight)
        if self.simulate or not exact or not has_kernels(weight):
            if self.input_quantizer is None:
                values = simulated_input(values, self.config.activations)
            if weight_scale is None:
                qat_weight = simulated_weight(weight, self.config.weights)
            return activate(float_conv(self, values, qat_weight, bias), activation)
        values, padding = padded(self, values)
        qmin, qmax = self.config.activations.deployed().range
        symmetric = self.input_quantizer is None and self.config.activations.symmetric
        q = quantize_samples(values.detach(), scale, zero_point, qmin, qmax, symmetric)
        qweight = quantize_weight(weight, self.config.weights, weight_scale)
        sizes = Sizes(self.stride, tuple(padding), self.dilation, self.groups)
        return integer_conv(
            values,
            qat_weight,
            bias,
            q,
            Integers(*qweight, None),
            sizes,
            activation,
            dtype,
        )

    def _rounded_input(self, input: Tensor) -> Given:
        """Static activations: the rounded input. Dynamic activations, and in float: the input."""
        quantizer = self.input_quantizer
        if quantizer is None:
            return Given(input)
        if not self._quantizing:
            observe(quantizer, input)
            return Given(input)
        return self._given(rounded(quantizer, input))

    def _given(self, input: Tensor, exact: bool = True) -> Given:
        """An input that was rounded by the quantizer before."""
        if self.input_quantizer is None or not self._quantizing:
            return Given(input)
        scale, zero_point = current_qparams(self.input_quantizer)
        return Given(input, scale, zero_point + self.shift, exact)

    def _rounded_weight(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Learned steps: the rounded weight and its scales. Otherwise the weight itself."""
        if self.qweight_quantizer is None:
            return weight, None
        given = weight if torch.compiler.is_compiling() else _as_parameter(weight)
        values, scale, _ = learned_values(self.qweight_quantizer, weight, given, PerAxis(0))
        return values, scale

    def _weight_scale(self, weight: Tensor) -> Tensor | None:
        quantizer = self.qweight_quantizer
        return None if quantizer is None else quantizer.qparams(_as_parameter(weight))[0]

    @classmethod
    def _check_float(cls, conv: nn.Module) -> None:
        """Raise a TypeError unless ``conv`` is a float layer that can be trained."""
        wanted = float_class(cls.dimensions)
        reason = refusal(conv) if isinstance(conv, wanted) else type(conv).__name__
        if reason is not None:
            raise TypeError(
                f"{cls.__name__}.from_float: conv must be a plain nn.{wanted.__name__}, got "
                f"{reason}"
            )

    def extra_repr(self) -> str:
        return (
            f"{sizes_text(self)}, bias={self.bias is not None}, {self.config.weights}, activations "
            f"{activations_text(self.config.activations)}{self.state_text()}"
        )


def _as_parameter(weight: Tensor) -> nn.Parameter:
    """The weight as a parameter, whose values give learned steps outside of training, too."""
    if isinstance(weight, nn.Parameter):
        return weight
    return nn.Parameter(weight.detach(), requires_grad=False)


class QATConv2d(QATConv):
    """A two-dimensional convolution in training, computed like the deployed layer.

    Each forward quantizes input and weight and multiplies integers, with the operators of
    :class:`~torchquant.nn.QuantizedConv2d`. While ranges do not change, its output is the output of
    ``to_quantized()``, bit for bit. Gradients pass straight through the rounding. The convolution
    itself saves int8 integers and, for a ReLU, the sign of each output for the backward pass.

    The scales of the weight come from ranges, or are learned steps (``weight_quantizer``). The
    scales of the activations come from the range of each sample, or are one observed or learned
    scale (``input_quantizer``).

    State: ``weight`` ``[O, C / groups, kh, kw]`` and ``bias`` ``[O]`` (parameters, float),
    ``quantize_enabled`` uint8 ``[1]`` (see :meth:`enable_quantization`), and the state of the
    quantizers (``input_quantizer`` and ``qweight_quantizer``).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as for nn.Conv2d.
        config: a :class:`~torchquant.QATConfig`, or the configuration of the layer to deploy; None
            is ``QATConfig()``: 8 bits, dynamic.
        activation: "none" or "relu"; the layer applies it to its result.
        device: device of the state.
        dtype: dtype of weight and bias: float32, bfloat16 or float16.

    Raises:
        TypeError: config is not a configuration.
        ValueError: activation is not "none" or "relu", a size is not valid, or no convolution can
            be trained with the configuration.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018); Esser et al., "Learned Step Size Quantization"
    (2020).

    Example:
        >>> layer = QATConv2d(16, 32, 3, padding=1, activation="relu")
        >>> x = torch.randn(2, 16, 8, 8)
        >>> torch.equal(layer(x), layer.to_quantized()(x))
        True
        >>> layer(x).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([32, 16, 3, 3])
    """

    dimensions: ClassVar[int] = 2
    quantized_class: ClassVar[type[QuantizedConv]] = QuantizedConv2d


class QATConv1d(QATConv):
    """A one-dimensional convolution in training; otherwise as :class:`QATConv2d`.

    State: that of QATConv2d, with ``weight`` ``[O, C / groups, k]``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as for nn.Conv1d.
        config: see :class:`QATConv2d`.
        activation: see :class:`QATConv2d`.
        device: see :class:`QATConv2d`.
        dtype: see :class:`QATConv2d`.

    Raises:
        TypeError: config is not a configuration.
        ValueError: activation is not "none" or "relu", a size is not valid, or no convolution can
            be trained with the configuration.

    Example:
        >>> layer = QATConv1d(16, 32, 5, padding="same")
        >>> x = torch.randn(2, 16, 100)
        >>> torch.equal(layer(x), layer.to_quantized()(x))
        True
    """

    dimensions: ClassVar[int] = 1
    quantized_class: ClassVar[type[QuantizedConv]] = QuantizedConv1d


__all__ = ["QATConv1d", "QATConv2d"]
