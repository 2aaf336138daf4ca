"""QuantizedLinear: a linear layer with integer weights that runs on the int8 kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchquant import ops
from torchquant._extension import load
from torchquant.configs import Dynamic, QuantizationConfig, Static
from torchquant.nn.base import QuantizedModule, autocast_dtype
from torchquant.nn.intx_linear import QuantizedIntxLinear
from torchquant.nn.intx_weight import group_size_of, most_inputs
from torchquant.nn.linear_arguments import static_parameters
from torchquant.nn.linear_layer import LinearLayer
from torchquant.nn.packed_state import Canonical
from torchquant.nn.projections import ProjectionGroup
from torchquant.scheme import PerAxis

_fast_linear_dynamic = load().linear_dynamic


class QuantizedLinear(LinearLayer):
    """``y = activation(x @ weight.T + bias)`` on int8 weights with one scale per output channel.

    Integers of fewer than 8 bits are stored as int8, too;
    :class:`~torchquant.nn.QuantizedIntxLinear` stores them without gaps.

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
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer = QuantizedLinear.from_float(linear)
        >>> x = torch.randn(4, 64)
        >>> bool((layer(x) - linear(x)).abs().max() < 0.1)
        True
        >>> print(layer.extra_repr()[:60])
        in_features=64, out_features=32, bias=True, int8 per channel
    """

    group_type: ClassVar[Any] = ProjectionGroup

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
        self.init_sizes(in_features, out_features, config, activation)
        activations = self.config.activations
        self._is_fast = not self._static
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
        self.init_input(device)
        self.init_bias(bias, device, dtype)

    def canonical(self) -> Canonical:
        """Dtype and shape of each tensor of the layer's state dict, by name."""
        channel = (self.out_features,)
        tensors: Canonical = {
            "qweight": self.weight_format.canonical(self.weight_shape),
            "qweight_scale": (torch.float32, channel),
        }
        if self.qweight_zero_point is not None:
            tensors["qweight_zero_point"] = (torch.int32, channel)
        return {**tensors, **self.canonical_rest()}

    @classmethod
    def variants(cls) -> tuple[type[QuantizedModule], ...]:
        """This class and :class:`QuantizedIntxLinear`; a derived class stands alone."""
        return (cls, QuantizedIntxLinear) if cls is QuantizedLinear else (cls,)

    @classmethod
    def class_for(
        cls, config: QuantizationConfig, shape: tuple[int, ...] | None = None
    ) -> type[QuantizedModule]:
        """The class of the linear layer that has ``config``.

        :class:`QuantizedIntxLinear` has weights in groups, weights beside float activations, and
        weights of fewer than 8 bits beside dynamic activations. Other layers are of this class, and
        so are layers with too many inputs for one scale of fewer bits. Layers of fewer bits beside
        static activations are of this class, too, because programs run them; convert_ calls their
        :meth:`outside_programs` where no program does.

        Args:
            config: the configuration of a layer.
            shape: the shape of the weight; None for a layer of any shape.

        Example:
            >>> from torchquant import IntxActivationIntxWeightConfig as Config
            >>> [QuantizedLinear.class_for(Config(bits)).__name__ for bits in (8, 4)]
            ['QuantizedLinear', 'QuantizedIntxLinear']
            >>> QuantizedLinear.class_for(Config(4), (64, 100_000)).__name__
            'QuantizedLinear'
        """
        weights, activations = config.weights, config.activations
        if cls is not QuantizedLinear:
            return cls
        if group_size_of(weights) is not None or activations is None:
            return QuantizedIntxLinear
        fits = shape is None or shape[1] <= most_inputs(weights.bits)
        small = weights.bits < 8 and isinstance(activations, Dynamic) and fits
        return QuantizedIntxLinear if small else cls

    def outside_programs(self) -> QuantizedModule:
        """A layer of fewer than 8 bits that stores them without gaps, which programs cannot run."""
        bits, static = self.config.weights.bits, self._static
        if not (static and bits < 8 and self.in_features <= most_inputs(bits)):
            return self
        zero_point = self.qweight_zero_point
        layer = QuantizedIntxLinear.from_integers(
            self.qweight,
            self.qweight_scale,
            None if zero_point is None else zero_point.to(torch.int8),
            self.bias,
            self.config,
            self.activation,
            input_scale=self.input_scale,
            input_zero_point=self.input_zero_point,
            dtype=self.dtype,
        )
        layer.adopt(self)
        return layer.train(self.training)

    @classmethod
    def config_refusal(cls, config: QuantizationConfig) -> str | None:
        """The reason why no layer of this class can have ``config``, or None."""
        if config.weights.granularity != PerAxis(0):
            return f"linear weights need PerAxis(0), not {config.weights.granularity}"
        if not isinstance(config.activations, (Dynamic, Static)):
            name = "None" if config.activations is None else type(config.activations).__name__
            return f"linear layers need Dynamic or Static activations, not {name}"
        return None

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
        who = f"{cls.__name__}.from_float"
        given = static_parameters(config, input_scale, input_zero_point, weight.device, who)
        out_features, in_features = weight.shape  # attributes of a layer may be out of date
        sizes = (in_features, out_features, bias is not None)
        layer = cls(*sizes, config, activation, "meta", weight.dtype)
        (qmin, qmax), symmetric = config.weights.range, config.weights.symmetric
        # Tensors created in inference mode could not take part in the training of an adapter.
        with torch.inference_mode(False), torch.no_grad():
            packed, layer.qweight_scale, zero_point = ops.quantize_pack(
                weight.detach(), weight_scale, qmin=qmin, qmax=qmax, symmetric=symmetric
            )
            if not symmetric:
                layer.qweight_zero_point = zero_point
            layer.take_tensors(packed, bias, given)
        return layer

    def dequantized_matrix(self) -> Tensor:
        """The float weight as float32 ``[out_features, in_features]``."""
        scale, zero_point = self.qweight_scale, self.qweight_zero_point
        return ops.dequantize(self.qweight, scale, zero_point, granularity=PerAxis(0))

    def decoder_arguments(self) -> dict[str, Any]:
        """The layer's tensors and numbers, as the steps of a decoder (``_C.Decoder``) take them."""
        return {
            "kind": "int8",
            "weight_scale": self.qweight_scale,
            "weight_zero_point": self.qweight_zero_point,
            "symmetric": self._activation_symmetric,
            "activation_bits": self._activation_bits,
            **super().decoder_arguments(),
        }

    def _fast_output(self, input: Tensor, activation: str) -> Tensor:
        buffers = self._buffers
        return _fast_linear_dynamic(  # type: ignore[no-any-return]
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

    def _output(self, input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        if self._static:
            return self._static_output(input, bias, activation)
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


__all__ = ["QuantizedLinear"]
