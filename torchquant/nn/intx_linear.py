"""QuantizedIntxLinear: a linear layer with weights of 2 to 8 bits, stored without gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchquant import ops
from torchquant._extension import load
from torchquant.configs import (
    Dynamic,
    Int8DynamicActivationIntxWeightConfig,
    QuantizationConfig,
    Static,
)
from torchquant.functional import _bits
from torchquant.nn.base import autocast_dtype
from torchquant.nn.intx_state import IntxState
from torchquant.nn.intx_weight import (
    group_size_of,
    integers_of,
    shape_refusal,
    values_of,
    weights_refusal,
)
from torchquant.nn.linear_arguments import static_parameters
from torchquant.nn.linear_layer import LinearLayer
from torchquant.nn.packed_state import Canonical
from torchquant.nn.state_names import rename_state
from torchquant.nn.weight import INTX, WeightFormat
from torchquant.scheme import quant_range

_fast_linear_dynamic_intx = load().linear_dynamic_intx
_fast_linear_intx = load().linear_intx


class _Alone:
    """Says why no call computes several of these layers together."""

    @staticmethod
    def obstacle(members: Sequence[Any]) -> str:
        parts = [member.config.weights for member in members]
        packed = any(part.bits < 8 or group_size_of(part) is not None for part in parts)
        what = "their weights have fewer bits or groups" if packed else "their inputs stay float"
        return f"{what}, where one product saves little"


class QuantizedIntxLinear(IntxState, LinearLayer):
    """``y = activation(x @ weight.T + bias)`` on weights of 2 to 8 bits.

    A weight takes as many bits as it has, on disk and in memory. Inputs of an output channel share
    a scale: all of them, or those of a group. Dynamic activations are quantized with one scale per
    token, and the layer multiplies integers. Without quantization of the activations
    (``IntxWeightOnlyConfig``) it multiplies floats.

    In memory, one tensor ``packed`` holds integers, scales and zero points in the layout of the
    kernels; ``qweight``, ``qweight_scale`` and ``qweight_zero_point`` are read from it. State
    dicts, pickles and copies hold these three, so they do not depend on a device or a layout.

    State dict: ``qweight`` uint8 ``[N, ceil(K * bits / 8)]``
    (:func:`torchquant.functional.pack_integers`), ``qweight_scale`` float32 ``[N]``, or
    ``[N, groups]`` with groups, ``qweight_zero_point`` int8 of the same shape (absent if
    symmetric), ``input_scale`` and ``input_zero_point`` (static activations only), ``bias`` ``[N]``
    (absent without bias).

    Dtypes, gradients, autocast and ``weight`` are as in :class:`~torchquant.nn.QuantizedLinear`.

    Args:
        in_features: K, size of the input's last dimension.
        out_features: N, size of the output's last dimension.
        bias: whether the layer has a bias.
        config: the configuration, with weights per channel or in groups, and activations that are
            ``Dynamic``, ``Static`` or None; None is ``Int8DynamicActivationIntxWeightConfig()``.
        activation: as in :class:`~torchquant.nn.QuantizedLinear`.
        device: device of the state, which is not initialised; :meth:`from_float` creates a layer
            with values.
        dtype: the dtype in which the layer works: that of its bias and its readable ``weight``;
            None is float32.

    Raises:
        TypeError: config is not a configuration.
        ValueError: activation is not the name of a function, a size is not a positive integer, no
            such layer can have the configuration, or its groups are larger than in_features.

    Example:
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer = QuantizedIntxLinear.from_float(linear)
        >>> x = torch.randn(4, 64)
        >>> bool((layer(x) - linear(x)).abs().max() < 0.5)
        True
        >>> print(layer.extra_repr()[:67])
        in_features=64, out_features=32, bias=True, int4 in groups of 32, a
        >>> layer.packed.numel()  # integers 1024, scales 256, and 64 for each 16 outputs
        1408
    """

    weight_format: ClassVar[WeightFormat] = INTX
    in_programs: ClassVar[bool] = False
    group_type: ClassVar[Any] = _Alone

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
        reason = self.shape_refusal(self.config, self.weight_shape)
        if reason is not None:
            raise ValueError(f"{type(self).__name__}: {reason}")
        activations = self.config.activations
        self.take_weights(self.config)
        dynamic = isinstance(activations, Dynamic)
        self._floats = activations is None
        self._is_fast = not self._static
        self._activation_symmetric: bool = activations.symmetric if dynamic else True
        self._activation_bits: int = activations.bits if dynamic else 8
        self.register_weight(self.layout.empty(self.weight_shape, device), dtype, bias)
        self.init_input(device)
        self.init_bias(bias, device, dtype)

    def canonical(self) -> Canonical:
        """Dtype and shape of each tensor of the layer's state dict, by name."""
        return {**self.layout.canonical_tensors(self.weight_shape), **self.canonical_rest()}

    @classmethod
    def checked_config(cls, who: str, config: QuantizationConfig | None) -> QuantizationConfig:
        """The configuration, or the default one for None; raises if the class cannot have it."""
        return super().checked_config(who, config or Int8DynamicActivationIntxWeightConfig())

    @classmethod
    def config_refusal(cls, config: QuantizationConfig) -> str | None:
        """The reason why no layer of this class can have ``config``, or None."""
        reason = weights_refusal(config, "linear")
        if reason is None and not isinstance(config.activations, (Dynamic, Static, type(None))):
            name = type(config.activations).__name__
            return f"linear layers need Dynamic or Static activations or None, not {name}"
        return reason

    @classmethod
    def shape_refusal(cls, config: QuantizationConfig, shape: tuple[int, ...]) -> str | None:
        """The reason why a layer whose weight has this shape cannot have ``config``, or None."""
        return shape_refusal(config, shape)

    @classmethod
    def from_tensors(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        config: QuantizationConfig,
        activation: str = "none",
        *,
        weight_scale: Tensor | None = None,
        weight_zero_point: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> QuantizedIntxLinear:
        """Quantize a float weight into a new layer.

        Args:
            weight: float ``[N, K]``; the layer works in its dtype.
            bias: float ``[N]``, or None; a parameter becomes the layer's own parameter.
            config: see the class.
            activation: see the class.
            weight_scale: float32 ``[N]``, or ``[N, groups]``; None derives scales and zero points
                from the ranges of the weight.
            weight_zero_point: int8 of the same shape; goes with ``weight_scale``, if weights are
                not symmetric.
            input_scale: see :meth:`from_float`.
            input_zero_point: see :meth:`from_float`.

        Raises:
            ValueError: scales and zero points do not fit the weight or the configuration.
        """
        cls._check_given(config, weight_scale, weight_zero_point)
        who = f"{cls.__name__}.from_float"
        static_parameters(config, input_scale, input_zero_point, weight.device, who)
        integers, scale, zero_point = integers_of(
            weight, config.weights, weight_scale, weight_zero_point
        )
        return cls.from_integers(
            integers,
            scale,
            zero_point,
            bias,
            config,
            activation,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            dtype=weight.dtype,
        )

    @classmethod
    def from_integers(
        cls,
        integers: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        config: QuantizationConfig | None = None,
        activation: str = "none",
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantizedIntxLinear:
        """A layer with integers that were chosen before, for example by GPTQ.

        Args:
            integers: int8 ``[N, K]``, each of ``config``'s bits.
            weight_scale: float32 ``[N]``, or ``[N, groups]``.
            weight_zero_point: int8 of the same shape, of ``config``'s bits; None if symmetric.
            bias: float ``[N]``, or None; a parameter becomes the layer's own parameter.
            config: see the class.
            activation: see the class.
            input_scale: see :meth:`from_float`.
            input_zero_point: see :meth:`from_float`.
            dtype: the dtype in which the layer works; None is float32.

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: an integer has more bits, or a shape is wrong.

        Example:
            >>> integers = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
            >>> layer = QuantizedIntxLinear.from_integers(integers, torch.full((32, 2), 0.1))
            >>> torch.equal(layer.integers, integers)
            True
        """
        who = f"{cls.__name__}.from_integers"
        config = cls.checked_config(who, config)
        cls._check_given(config, weight_scale, weight_zero_point)
        given = static_parameters(config, input_scale, input_zero_point, integers.device, who)
        out_features, in_features = integers.shape
        sizes = (in_features, out_features, bias is not None)
        layer = cls(*sizes, config, activation, "meta", dtype)
        # Tensors created in inference mode could not take part in the training of an adapter.
        with torch.inference_mode(False), torch.no_grad():
            packed = layer.layout.pack_integers(integers, weight_scale, weight_zero_point)
            layer.take_tensors(packed, bias, given)
        return layer

    @classmethod
    def _check_given(
        cls, config: QuantizationConfig, scale: Tensor | None, zero_point: Tensor | None
    ) -> None:
        wanted = scale is not None and not config.weights.symmetric
        if wanted is not (zero_point is not None):
            need = "be given with weight_scale" if wanted else "be None"
            raise ValueError(
                f"{cls.__name__}: weight_zero_point must {need} for {config.weights}, got "
                f"{'None' if zero_point is None else 'a tensor'}"
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        """Load a state dict; int8 integers ``[N, K]`` fit, too, as older versions stored them."""
        state = dict(state_dict)
        key, zeros = f"{prefix}qweight", f"{prefix}qweight_zero_point"
        rename_state(state, prefix, self.renamed)
        integers, zero_point = state.get(key), state.get(zeros)
        if isinstance(integers, Tensor) and integers.dtype == torch.int8:
            if tuple(integers.shape) == self.weight_shape and _fits(integers, self._bits):
                state[key] = _bits.pack(integers, self._bits)
            if isinstance(zero_point, Tensor) and zero_point.dtype == torch.int32:
                state[zeros] = zero_point.to(torch.int8)
        super()._load_from_state_dict(state, prefix, *rest, **options)

    def dequantized_matrix(self) -> Tensor:
        """The float weight as float32 ``[out_features, in_features]``."""
        integers, scale, zero_point = self.layout.unpack_integers(self.packed, self.weight_shape)
        zero = zero_point if self._has_zero_point else None
        return values_of(integers, scale, zero, self.config.weights)

    def decoder_arguments(self) -> dict[str, Any]:
        """The layer's tensors and numbers, as the steps of a decoder (``_C.Decoder``) take them."""
        return {
            "kind": "intx",
            "bits": self._bits,
            "group_size": self._group_size,
            "has_zero_point": self._has_zero_point,
            "symmetric": None if self._floats else self._activation_symmetric,
            "activation_bits": self._activation_bits,
            **super().decoder_arguments(),
        }

    def _fast_output(self, input: Tensor, activation: str) -> Tensor:
        if self._floats:
            return _fast_linear_intx(  # type: ignore[no-any-return]
                input,
                self._buffers["packed"],
                self._parameters["bias"],
                self.out_features,
                self._bits,
                self._group_size,
                self._has_zero_point,
                activation,
            )
        return _fast_linear_dynamic_intx(  # type: ignore[no-any-return]
            input,
            self._buffers["packed"],
            self._parameters["bias"],
            self.out_features,
            self._bits,
            self._group_size,
            self._has_zero_point,
            self._activation_symmetric,
            activation,
            self._activation_bits,
        )

    def _output(self, input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        arguments: dict[str, Any] = {
            "out_features": self.out_features,
            "bits": self._bits,
            "group_size": self._group_size,
            "has_zero_point": self._has_zero_point,
            "activation": activation,
            "output_dtype": autocast_dtype(input),
        }
        if self._static:
            assert self.input_scale is not None
            qmin, qmax = self.config.activations.range
            arguments["output_dtype"] = arguments["output_dtype"] or input.dtype
            return ops.linear_static_intx(
                input,
                self.input_scale,
                self.input_zero_point,
                self.packed,
                bias,
                input_qmin=qmin,
                input_qmax=qmax,
                **arguments,
            )
        if self._floats:
            return ops.linear_intx(input, self.packed, bias, **arguments)
        return ops.linear_dynamic_intx(
            input,
            self.packed,
            bias,
            symmetric=self._activation_symmetric,
            activation_bits=self._activation_bits,
            **arguments,
        )


def _fits(integers: Tensor, bits: int) -> bool:
    """True if integers have that many bits; those on the meta device have no values."""
    if integers.is_meta or not integers.numel():
        return True
    qmin, qmax = quant_range(bits)
    return qmin <= int(integers.min()) and int(integers.max()) <= qmax


__all__ = ["QuantizedIntxLinear"]
