"""QuantizedConv1d and QuantizedConv2d: convolutions with integer weights, on the int8 kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchquant import functional, ops
from torchquant.configs import Dynamic, QuantizationConfig, Static, check_config
from torchquant.nn.base import QuantizedModule, autocast_dtype
from torchquant.nn.call_guard import activation_after_call
from torchquant.nn.conv_geometry import (
    SIZES,
    check_input,
    padded,
    plain_value,
    random_input,
    set_sizes,
    sizes_text,
    weight_shape,
)
from torchquant.nn.conv_weight import quantize_weight, weight_refusal
from torchquant.nn.float_conv import float_class, refusal, value_refusal
from torchquant.nn.inputs import special_output
from torchquant.nn.linear_arguments import check_activation, static_parameters
from torchquant.nn.packed_state import Canonical, shared_parameter
from torchquant.nn.replaced_activation import mark
from torchquant.nn.weight import INT8_CONV, ConvFormat, WeightFormat
from torchquant.ops._arguments import has_kernels
from torchquant.scheme import PerAxis

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # saves two look-ups in each call


class QuantizedConv(QuantizedModule):
    """What QuantizedConv1d and QuantizedConv2d share; see there."""

    input_scale: Tensor | None
    input_zero_point: Tensor | None
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
    stored: ClassVar[tuple[str, ...]] = (*SIZES, "bias", "activation")
    fused_activations: ClassVar[tuple[str, ...]] = tuple(functional.ACTIVATIONS)
    weight_format: ClassVar[WeightFormat] = INT8_CONV

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
        config: QuantizationConfig | None = None,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        set_sizes(
            self,
            who,
            self.dimensions,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode,
        )
        self.config = self._checked(who, config)
        self.activation = check_activation(activation, who)
        self._static = isinstance(self.config.activations, Static)
        self.register_weight(self.layout.empty(self.weight_shape, device), dtype, bias)
        # Explicit dtypes: users load models under other default dtypes.
        scale = torch.ones(out_channels, dtype=torch.float32, device=device)
        self.register_buffer("qweight_scale", scale)
        self.register_buffer("qweight_zero_point", None)
        one = torch.ones(1, dtype=torch.float32, device=device)
        self.register_buffer("input_scale", one if self._static else None)
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        self.register_buffer("input_zero_point", zero if self._static else None)
        zeros = torch.zeros(out_channels, dtype=dtype or torch.float32, device=device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(out_channels, in_channels / groups, *kernel_size)``."""
        return weight_shape(self)

    @property
    def layout(self) -> WeightFormat:
        """The format that packs the weight, with the number of groups."""
        return ConvFormat(self.groups)

    def canonical(self) -> Canonical:
        """Dtype and shape of each tensor of the layer's state dict, by name."""
        channel = (self.out_channels,)
        tensors: Canonical = {
            "qweight": self.weight_format.canonical(self.weight_shape),
            "qweight_scale": (torch.float32, channel),
        }
        if self._static:
            tensors["input_scale"] = (torch.float32, (1,))
            tensors["input_zero_point"] = (torch.int32, (1,))
        if self.bias is not None:
            tensors["bias"] = (self.bias.dtype, channel)
        return tensors

    @classmethod
    def config_refusal(cls, config: QuantizationConfig) -> str | None:
        """The reason why no convolution can have ``config``, or None."""
        reason = weight_refusal(config)
        if reason is None and not isinstance(config.activations, (Dynamic, Static)):
            name = "None" if config.activations is None else type(config.activations).__name__
            return f"convolutions need Dynamic or Static activations, not {name}"
        return reason

    @classmethod
    def from_float(
        cls,
        conv: nn.Module,
        config: QuantizationConfig | None = None,
        activation: str = "none",
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> Any:
        """Quantize a float layer; the float layer itself does not change.

        The new layer has the same bias: the same parameter object, so that ties stay. Hooks stay
        with the float layer; :func:`torchquant.quantize_` moves them to the new layer.

        Args:
            conv: an nn.Conv1d or nn.Conv2d, no subclass, with float32, bfloat16 or float16 weights,
                on the CPU or on a CUDA device. The new layer is on the same device.
            config: the configuration; None is ``Int8DynamicActivationInt8WeightConfig()``.
            activation: an activation function that the layer applies to its result; see the class.
            input_scale: float32 ``[1]``, on any device; required for static activations.
            input_zero_point: int32 ``[1]``, on any device, for static activations; None is 0.

        Returns:
            A layer in the training mode of ``conv``.

        Raises:
            TypeError: conv is not exactly the float class, its weight is parametrized, pruned or
                not float, or config is not a configuration.
            ValueError: the weight is empty, holds NaN or infinities, or is on a device without
                kernels; input_scale is missing for static activations, or given for dynamic ones;
                input_scale or input_zero_point is out of range.
        """
        who = f"{cls.__name__}.from_float"
        config = cls._checked(who, config)
        check_activation(activation, who)
        wanted = float_class(cls.dimensions)
        reason = refusal(conv) if isinstance(conv, wanted) else type(conv).__name__
        if reason is not None:
            raise TypeError(f"{who}: conv must be a plain nn.{wanted.__name__}, got {reason}")
        reason = value_refusal(conv)
        if reason is not None:
            raise ValueError(f"{who}: conv cannot be quantized: {reason}")
        weight, bias = conv._parameters["weight"], conv._parameters["bias"]
        assert weight is not None
        layer = cls.from_tensors(
            weight,
            bias,
            conv,
            config,
            activation,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
        )
        return layer.train(conv.training)

    @classmethod
    def from_tensors(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        sizes: Any,
        config: QuantizationConfig,
        activation: str = "none",
        *,
        weight_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> Any:
        """Quantize a float weight into a new layer.

        Args:
            weight: float ``[O, C / groups, *kernel_size]``; the layer works in its dtype.
            bias: float ``[O]``, or None; a parameter becomes the layer's own parameter.
            sizes: a convolution of any form, whose sizes and padding the new layer has.
            config: see the class.
            activation: see the class.
            weight_scale: float32 ``[O]``; None derives the scales from ranges.
            input_scale: see :meth:`from_float`.
            input_zero_point: see :meth:`from_float`.

        Raises:
            ValueError: input_scale or input_zero_point is missing, superfluous or out of range.
        """
        who = f"{cls.__name__}.from_float"
        given = static_parameters(config, input_scale, input_zero_point, weight.device, who)
        layer = cls(
            **{name: getattr(sizes, name) for name in SIZES},
            bias=bias is not None,
            config=config,
            activation=activation,
            device="meta",
            dtype=weight.dtype,
        )
        # Tensors created in inference mode could not take part in the training of an adapter.
        with torch.inference_mode(False), torch.no_grad():
            qweight, layer.qweight_scale = quantize_weight(weight, config.weights, weight_scale)
            layer.packed = layer.layout.pack(qweight)
            if given is not None:
                layer.input_scale, layer.input_zero_point = given
            if bias is not None:
                layer.bias = shared_parameter(bias)
            layer.move_placeholder()
        return layer

    def to_float(self) -> nn.Module:
        """The float layer with the values that the integers represent, without the activation.

        It has the dtype and the bias of this layer.
        """
        sizes = {name: getattr(self, name) for name in SIZES}
        conv: Any = float_class(self.dimensions)(**sizes, bias=self.bias is not None, device="meta")
        conv.weight = nn.Parameter(self.dequantized())
        conv.bias = self.bias
        return conv.train(self.training)  # type: ignore[no-any-return]

    def dequantized(self) -> Tensor:
        """The float weight that the integers represent, a new tensor in the layer's dtype."""
        weight = ops.dequantize(self.qweight, self.qweight_scale, None, granularity=PerAxis(0))
        return weight.to(self.dtype)

    @classmethod
    def stored_value(cls, module: nn.Module, name: str) -> Any:
        """The value that a file stores for an argument in ``stored``; tuples are lists in JSON."""
        return plain_value(super().stored_value(module, name))

    def probe(self, rows: int, generator: torch.Generator) -> Tensor:
        """``rows`` random float32 inputs on the CPU, used to test a changed layer."""
        return random_input(self, rows, generator)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        All outputs of a sample are NaN if the sample holds a NaN. In a dynamic layer they are also
        NaN if the sample holds an infinity.

        Args:
            input: float32, bfloat16 or float16; a batch of samples, or one sample without the
                dimension of the batch.

        Returns:
            The outputs in the dtype of ``input``, or in the dtype of autocast; channels_last if a
            batch of images is.

        Raises:
            TypeError: input is not a float32, bfloat16 or float16 tensor.
            ValueError: the number of dimensions or the channels of input are wrong, input is
                smaller than the kernel, or it is on another device than the layer.
        """
        if type(input) is not Tensor or input.is_nested:
            special = special_output(self, input)
            if special is not None:
                return special  # type: ignore[no-any-return]
        if not isinstance(input, torch.fx.Proxy):
            remedy = "load its weights first" if self.packed.is_meta else "move one of them"
            check_input(self, input, self.packed.device, remedy)
        activation, place = self.activation, None
        if self._guarded and activation == "none" and self._fuses_activation:
            plain = type(input) is Tensor and has_kernels(input) and not _is_dynamo_compiling()
            place = activation_after_call(self, input) if plain else None
            if place is not None:
                activation = place.function
        samples = input if input.dim() == self.dimensions + 2 else input.unsqueeze(0)
        output = self._output(samples, activation)
        if samples is not input:
            output = output.squeeze(0)
        return output if place is None else mark(output, place)

    def _output(self, input: Tensor, activation: str) -> Tensor:
        dtype = autocast_dtype(input) or input.dtype
        input, padding = padded(self, input)
        part = self.config.activations
        if self._static:
            assert self.input_scale is not None
            qmin, qmax = part.range
            return ops.conv_static(
                input,
                self.input_scale,
                self.input_zero_point,
                self.packed,
                self.qweight_scale,
                self.bias,
                weight_shape=self.weight_shape,
                stride=self.stride,
                padding=padding,
                dilation=self.dilation,
                groups=self.groups,
                activation=activation,
                output_dtype=dtype,
                input_qmin=qmin,
                input_qmax=qmax,
            )
        return ops.conv_dynamic(
            input,
            self.packed,
            self.qweight_scale,
            self.bias,
            weight_shape=self.weight_shape,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            symmetric=part.symmetric,
            activation=activation,
            output_dtype=dtype,
            activation_bits=part.bits,
        )

    @classmethod
    def _checked(cls, who: str, config: QuantizationConfig | None) -> QuantizationConfig:
        config = check_config(who, config)
        reason = cls.config_refusal(config)
        if reason is not None:
            raise ValueError(f"{who}: config must fit a convolution, got {config}: {reason}")
        return config

    def extra_repr(self) -> str:
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"{sizes_text(self)}, bias={self.bias is not None}, {self.config.weights}, activations "
            f"{activations_text(self.config.activations)}{fused}"
        )


def activations_text(part: Any) -> str:
    """The activations of a convolution in words: what is a token of other layers is a sample.

    Example:
        >>> activations_text(Dynamic())
        'int8 per sample with zero point'
    """
    return str(part).replace("per token", "per sample")


class QuantizedConv2d(QuantizedConv):
    """A two-dimensional convolution on integers of 2 to 8 bits, with bias and activation.

    Dynamic activations are quantized with one scale per sample, from the range of the sample.
    Static activations are quantized with one scale that was observed or learned before. Padding
    adds nothing to a sum, also with a zero point. Padding modes other than zeros repeat values of
    the input before they are quantized.

    In memory, the weight is packed for the kernels of its device; everything else about the state
    is as in :class:`~torchquant.nn.QuantizedLinear`.

    State dict: ``qweight`` int8 ``[O, C / groups, kh, kw]``, ``qweight_scale`` float32 ``[O]``
    (equal scales for weights per tensor), ``input_scale`` float32 ``[1]`` and ``input_zero_point``
    int32 ``[1]`` (static activations only), ``bias`` ``[O]`` (absent without bias).

    Scales stay float32 under ``.to(torch.bfloat16)``; the bias is an ordinary parameter, which is
    added in float32 whatever its dtype. The output has the dtype of the input, or the dtype of
    autocast in an autocast region, and the memory format of the input. Gradients reach the input
    (straight through the quantizer) and a bias that requires gradients; the weight is frozen.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as for nn.Conv2d.
        config: the configuration, with symmetric weights per channel or per tensor, and ``Dynamic``
            or ``Static`` activations; None is ``Int8DynamicActivationInt8WeightConfig()``.
        activation: "none" or the name of an activation function
            (``torchquant.functional.ACTIVATIONS``); applied after the bias.
        device: device of the state, which is not initialised; :meth:`from_float` creates a layer
            with values.
        dtype: the dtype in which the layer works: that of its bias and its readable ``weight``;
            None is float32.

    Raises:
        TypeError: config is not a configuration.
        ValueError: activation is not the name of a function, a size is not valid, or no convolution
            can have the configuration.

    Example:
        >>> conv = nn.Conv2d(16, 32, 3, padding=1)
        >>> layer = QuantizedConv2d.from_float(conv)
        >>> x = torch.randn(1, 16, 8, 8)
        >>> bool((layer(x) - conv(x)).abs().max() < 0.1)
        True
        >>> print(layer.extra_repr()[:69])
        16, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=True,
    """

    dimensions: ClassVar[int] = 2


class QuantizedConv1d(QuantizedConv):
    """A one-dimensional convolution on integers; otherwise as :class:`QuantizedConv2d`.

    State dict: that of QuantizedConv2d, with ``qweight`` int8 ``[O, C / groups, k]``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as for nn.Conv1d.
        config: see :class:`QuantizedConv2d`.
        activation: see :class:`QuantizedConv2d`.
        device: see :class:`QuantizedConv2d`.
        dtype: see :class:`QuantizedConv2d`.

    Raises:
        TypeError: config is not a configuration.
        ValueError: activation is not the name of a function, a size is not valid, or no convolution
            can have the configuration.

    Example:
        >>> conv = nn.Conv1d(16, 32, 5, padding="same")
        >>> layer = QuantizedConv1d.from_float(conv)
        >>> layer(torch.randn(16, 100)).shape
        torch.Size([32, 100])
    """

    dimensions: ClassVar[int] = 1


__all__ = ["QuantizedConv1d", "QuantizedConv2d"]
