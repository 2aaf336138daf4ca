"""LinearLayer: what every quantized linear layer does, whatever the format of its weight."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from torchquant import functional
from torchquant.configs import QuantizationConfig, Static, check_config
from torchquant.nn.base import QuantizedModule
from torchquant.nn.call_guard import activation_after, caller
from torchquant.nn.float_form import NN_LINEAR, FloatForm
from torchquant.nn.float_linear import refusal, value_refusal, weight_shape
from torchquant.nn.inputs import special_output
from torchquant.nn.linear_arguments import check_activation, check_size
from torchquant.nn.packed_state import Canonical, shared_parameter
from torchquant.nn.replaced_activation import mark

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # saves two look-ups in each call
Layer = TypeVar("Layer", bound="LinearLayer")


class LinearLayer(QuantizedModule):
    """``y = activation(x @ weight.T + bias)``; the base class of quantized linear layers.

    A subclass defines :meth:`config_refusal`, :meth:`from_tensors`, :meth:`canonical` and
    ``dequantized_matrix``, registers its tensors in ``__init__``, and computes in ``_output``. It
    may compute in ``_fast_output``, too, if ``_is_fast`` is true.

    Example:
        >>> from torchquant.nn import QuantizedIntxLinear, QuantizedLinear
        >>> issubclass(QuantizedLinear, LinearLayer), issubclass(QuantizedIntxLinear, LinearLayer)
        (True, True)
    """

    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bias: nn.Parameter | None
    stored: ClassVar[tuple[str, ...]] = ("in_features", "out_features", "bias", "activation")
    fused_activations: ClassVar[tuple[str, ...]] = tuple(functional.ACTIVATIONS)
    _group: Any
    # Whether ``_fast_output`` takes the calls in eager mode.
    _is_fast: bool = False
    # The class of the float layer, if it is not nn.Linear, and the layout of its weight.
    float_form: FloatForm = NN_LINEAR

    def init_sizes(
        self,
        in_features: int,
        out_features: int,
        config: QuantizationConfig | None,
        activation: str,
    ) -> None:
        """Check and set the attributes that are no tensors; the first step of ``__init__``."""
        who = type(self).__name__
        self.in_features = check_size("in_features", in_features, who)
        self.out_features = check_size("out_features", out_features, who)
        self.config = self.checked_config(who, config)
        self.activation = check_activation(activation, who)
        self._static = isinstance(self.config.activations, Static)

    def init_input(self, device: torch.device | str | None) -> None:
        """Register scale and zero point of the input, which static activations have."""
        one = torch.ones(1, dtype=torch.float32, device=device)
        self.register_buffer("input_scale", one if self._static else None)
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        self.register_buffer("input_zero_point", zero if self._static else None)

    def init_bias(
        self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Register the bias, the last step of ``__init__``."""
        zeros = torch.zeros(self.out_features, dtype=dtype or torch.float32, device=device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @classmethod
    def checked_config(cls, who: str, config: QuantizationConfig | None) -> QuantizationConfig:
        """The configuration, or the default one for None; raises if the class cannot have it."""
        config = check_config(who, config)
        reason = cls.config_refusal(config)
        if reason is not None:
            raise ValueError(f"{who}: config must fit a linear layer, got {config}: {reason}")
        return config

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(out_features, in_features)``."""
        return self.out_features, self.in_features

    def canonical_rest(self) -> Canonical:
        """The part of :meth:`canonical` that does not concern the weight."""
        tensors: Canonical = {}
        if self._static:
            tensors["input_scale"] = (torch.float32, (1,))
            tensors["input_zero_point"] = (torch.int32, (1,))
        if self.bias is not None:
            tensors["bias"] = (self.bias.dtype, (self.out_features,))
        return tensors

    @classmethod
    def from_float(
        cls: type[Layer],
        linear: nn.Module,
        config: QuantizationConfig | None = None,
        activation: str = "none",
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> Layer:
        """Quantize a float layer; the float layer itself does not change.

        The new layer has the same bias: the same parameter object, so that ties stay. Hooks stay
        with the float layer; :func:`torchquant.quantize_` moves them to the new layer.

        Args:
            linear: an nn.Linear, or a module that computes the same (transformers' Conv1D), with
                float32, bfloat16 or float16 weights, on the CPU or on a CUDA device. The new layer
                is on the same device.
            config: the configuration; None is the default of the class.
            activation: an activation function that the layer applies to its result; see the class.
            input_scale: float32 ``[1]``, on any device; required for static activations.
            input_zero_point: int32 ``[1]``, on any device, for static activations; None is 0.

        Returns:
            A layer in the training mode of ``linear``.

        Raises:
            TypeError: linear does not compute what an nn.Linear computes, its weight is
                parametrized, pruned or not float, or config is not a configuration.
            ValueError: the weight is empty, holds NaN or infinities, or is on a device without
                kernels; the layer has a shape that the class does not take; input_scale is missing
                for static activations, or given for other ones; input_scale or input_zero_point is
                out of range.
        """
        who = f"{cls.__name__}.from_float"
        config = cls.checked_config(who, config)
        check_activation(activation)
        reason = refusal(linear)
        if reason is not None:
            raise TypeError(f"{who}: linear must be a plain nn.Linear, got {reason}")
        reason = value_refusal(linear) or cls.shape_refusal(config, weight_shape(linear))
        if reason is not None:
            raise ValueError(f"{who}: linear cannot be quantized: {reason}")
        form = FloatForm.of(linear)
        layer = cls.from_tensors(
            form.matrix(linear.weight),  # type: ignore[arg-type]
            linear.bias,  # type: ignore[arg-type]
            config,
            activation,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
        )
        form.give_to(layer)
        return layer.train(linear.training)

    @classmethod
    def from_tensors(
        cls: type[Layer],
        weight: Tensor,
        bias: Tensor | None,
        config: QuantizationConfig,
        activation: str = "none",
        *,
        weight_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> Layer:
        """Quantize a float weight into a new layer; defined by each class."""
        raise NotImplementedError

    def take_tensors(
        self, packed: Tensor, bias: Tensor | None, given: tuple[Tensor, Tensor] | None
    ) -> None:
        """Give a new layer, which was made on the meta device, its values.

        Args:
            packed: the packed weight.
            bias: a parameter becomes the layer's own parameter.
            given: scale and zero point of the input, for static activations.
        """
        self.packed = packed
        if given is not None:
            self.input_scale, self.input_zero_point = given
        if bias is not None:
            self.bias = shared_parameter(bias)
        self.move_placeholder()

    def to_float(self) -> nn.Module:
        """A float layer with the values that the integers represent, without the activation.

        It has the dtype and the bias of this layer. It is an ``nn.Linear``, or a module of the
        class from which this layer was made.
        """
        linear = self.float_form.module(nn.Parameter(self.dequantized()), self.bias)
        return linear.train(self.training)

    def dequantized(self) -> Tensor:
        """The float weight that the integers represent, a new tensor in the layer's dtype."""
        return self.float_form.matrix(self.dequantized_matrix().to(self.dtype))

    def dequantized_matrix(self) -> Tensor:
        """The float weight as float32 ``[out_features, in_features]``; defined by each class."""
        raise NotImplementedError

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
                            return shared  # type: ignore[no-any-return]
                    if activation == "none" and self._fuses_activation:
                        place = activation_after(self, input, frame, call)
                        if place is not None:
                            activation = place.function
                elif self._group is not None:
                    self._group.forget()
            if self._is_fast:
                try:
                    output = self._fast_output(input, activation)
                except (ValueError, IndexError):
                    self._check_input(input)  # raises with the argument names of a layer
                    raise
                return output if place is None else mark(output, place)
        self._check_input(input)
        output = self._output(input, self.bias, activation)
        return output if place is None else mark(output, place)

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """``F.linear(input, self.weight, bias)`` on integers; None if the layout is another one."""
        if self.float_form.transposed:
            return None
        self._check_input(input)
        bias = None if bias is None else bias.expand(self.out_features)
        return self._output(input, bias, "none")

    def decoder_arguments(self) -> dict[str, Any]:
        """The layer's tensors and numbers, as the steps of a decoder (``_C.Decoder``) take them."""
        bias = None if self.bias is None else self.bias.detach()
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, "packed": self.packed, "bias": bias, **self.static_arguments()}

    def static_arguments(self) -> dict[str, Any]:
        """Scale, zero point and range of the input, of static activations; otherwise empty."""
        if not self._static:
            return {}
        assert self.input_scale is not None and self.input_zero_point is not None
        qmin, qmax = self.config.activations.range
        return {
            "input_scale": float(self.input_scale),
            "input_zero_point": int(self.input_zero_point),
            "input_qmin": qmin,
            "input_qmax": qmax,
        }

    def _fast_output(self, input: Tensor, activation: str) -> Tensor:
        """The forward of a plain tensor on the layer's device, at the least cost per call."""
        raise NotImplementedError

    def _output(self, input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """The forward through torch.ops."""
        raise NotImplementedError

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
        who = type(self).__name__
        if not isinstance(input, Tensor):
            if isinstance(input, torch.fx.Proxy):
                return
            raise TypeError(f"{who}: input must be a tensor, got {type(input).__name__}")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"{who}: input must be [..., in_features] with in_features = {self.in_features}, "
                f"got {list(input.shape)}"
            )
        if input.device != self.packed.device:
            remedy = "load its weights first" if self.packed.is_meta else "move one of them"
            raise ValueError(
                f"{who}: input must be on the layer's device {self.packed.device}, "
                f"got one on {input.device}; {remedy}"
            )

    def extra_repr(self) -> str:
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        activations = self.config.activations or "float"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.config.weights}, activations {activations}{fused}"
        )

    # Changes of the weight that a group of layers must be notified of.
    def weight_replaced(self) -> None:
        if self._group is not None:
            self._group.moved()

    def load_packed_by_assignment(self, packed: Tensor) -> None:
        if self._group is not None:
            self._group.dissolve()
        super().load_packed_by_assignment(packed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        group = self.__dict__.pop("_group", None)
        if group is not None:  # the copy of the group forms once all copied members have joined
            group.join(self._group_index, self)


__all__ = ["LinearLayer"]
