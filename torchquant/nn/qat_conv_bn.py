"""QATConvBn2d: a convolution and its batch norm, trained as the one integer layer they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.configs import QuantizationConfig
from torchquant.nn.base import autocast_dtype
from torchquant.nn.conv_simulation import float_conv
from torchquant.nn.qat_conv import QATConv2d
from torchquant.nn.qat_parts import Given, activate
from torchquant.training.configuration import TrainingConfig

# Below this magnitude of its factor, a channel's batch cannot give the statistics of the
# convolution: its output is all but 0. The running statistics take their place.
_LEAST_FACTOR = 2.0**-60


class QATConvBn2d(QATConv2d):
    """A two-dimensional convolution and the batch norm after it, in training.

    The deployed layer is one convolution. Its weight is ``w * factor`` and its bias ``shift +
    (bias - mean) * factor``, with ``factor = gain / sqrt(variance + eps)``, ``gain`` and ``shift``
    the weight and bias of the batch norm, and ``mean`` and ``variance`` its running statistics.

    In training mode, the layer quantizes ``w * factor`` with the running variance, so that the
    integers do not jump with each batch. It convolves, and then normalizes with the statistics of
    the batch: it multiplies by ``sqrt(running variance + eps) / sqrt(batch variance + eps)``, and
    subtracts the mean of the batch. The running statistics are updated like those of the batch
    norm. In evaluation mode, and in training mode after :meth:`freeze_statistics`, the running
    statistics are fixed. The output is then the output of ``to_quantized()``, bit for bit.

    State: that of :class:`QATConv2d`, ``bn`` (the batch norm, with its own names), and
    ``statistics_frozen`` uint8 ``[1]``.

    :func:`torchquant.prepare_qat_` finds the pairs and uses :meth:`from_float`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as for nn.Conv2d; usually without a bias, which the batch norm has.
        eps, momentum: as for nn.BatchNorm2d.
        config, activation, device, dtype: see :class:`QATConv2d`.

    Raises:
        TypeError, ValueError: as :class:`QATConv2d`.

    Source: Jacob et al. (2018), section 3.2; Krishnamoorthi, "Quantizing deep convolutional
    networks for efficient inference" (2018), section 3.2.2: the correction by the running variance.

    Example:
        >>> conv, bn = nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32)
        >>> layer = QATConvBn2d.from_float(conv, bn)
        >>> x = torch.randn(4, 16, 8, 8)
        >>> _ = layer(x)  # updates the statistics
        >>> _ = layer.freeze_statistics()
        >>> torch.equal(layer(x), layer.to_quantized()(x))
        True
    """

    bn: nn.BatchNorm2d
    statistics_frozen: Tensor
    _frozen: bool = False  # a copy of the buffer's value, which forward reads instead

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        config: TrainingConfig | QuantizationConfig | None = None,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*sizes, bias, padding_mode, config, activation, device, dtype)
        self._take(nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype))

    def _take(self, bn: nn.BatchNorm2d) -> None:
        self.bn = bn
        bn.train(self.training)
        flag = torch.zeros(1, dtype=torch.uint8, device=self.weight.device)
        self.register_buffer("statistics_frozen", flag)

    @classmethod
    def from_float(  # type: ignore[override]
        cls,
        conv: nn.Module,
        bn: nn.Module,
        config: TrainingConfig | QuantizationConfig | None = None,
        activation: str = "none",
    ) -> QATConvBn2d:
        """Create a layer that trains the parameters of a convolution and of its batch norm.

        The parameters and the batch norm are the same objects, so optimizers stay valid.

        Args:
            conv: see :meth:`QATConv2d.from_float`.
            bn: an nn.BatchNorm2d with running statistics, for the outputs of ``conv``.
            config: see :class:`QATConv2d`.
            activation: "none" or "relu"; the activation that follows the batch norm.

        Raises:
            TypeError: conv or bn is of another class, or config is not a configuration.
            ValueError: bn does not fit, or as in :meth:`QATConv2d.from_float`.
        """
        reason = cls.norm_refusal(conv, bn)
        if reason is not None:
            error = ValueError if type(bn) is nn.BatchNorm2d else TypeError
            raise error(f"{cls.__name__}.from_float: bn must fit the convolution, got {reason}")
        assert isinstance(bn, nn.BatchNorm2d)
        layer: QATConvBn2d = super().from_float(conv, config, activation)
        layer._take(bn)
        return layer

    @classmethod
    def norm_refusal(cls, conv: nn.Module, bn: nn.Module) -> str | None:
        """The reason why a batch norm cannot be folded into the convolution before it, or None."""
        if type(bn) is not nn.BatchNorm2d:
            return f"{type(bn).__name__}, which is not exactly an nn.BatchNorm2d"
        channels = getattr(conv, "out_channels", None)
        if bn.num_features != channels:
            return f"a batch norm of {bn.num_features} channels after a convolution with {channels}"
        if bn.running_mean is None or bn.running_var is None:
            return "a batch norm without running statistics (track_running_stats=False)"
        parameters = [p for p in conv._parameters.values() if p is not None]
        if any(bn.running_mean.device != parameter.device for parameter in parameters):
            return f"a batch norm on {bn.running_mean.device}, the convolution on another device"
        return None

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """The batch norm."""
        return (self.bn,)

    def freeze_statistics(self, frozen: bool = True) -> Any:
        """Normalize with the running statistics and keep them, also in training mode."""
        self.statistics_frozen.fill_(bool(frozen))
        self._frozen = bool(frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Any:
        """Set the mode; the batch norm is in training mode only if its statistics change."""
        super().train(mode)
        if "bn" in self._modules:  # a layer that is being made has none yet
            self.bn.train(mode and not self._frozen)
        return self

    @property
    def keeps_statistics(self) -> bool:
        """True if the running statistics stay as they are in training mode, too."""
        return self._frozen

    def _read_stage(self) -> None:
        super()._read_stage()
        frozen = self._buffers.get("statistics_frozen")
        if frozen is not None and not frozen.is_meta:
            self._frozen = bool(frozen)
            self.train(self.training)

    # ---------------------------------------------------------------- the computation

    def _factor(self) -> Tensor:
        """``gain / sqrt(running variance + eps)`` of each channel, in float32."""
        deviation = self._running_deviation()
        gain = self.bn.weight
        return deviation.reciprocal() if gain is None else gain.to(torch.float32) / deviation

    def _running_deviation(self) -> Tensor:
        assert self.bn.running_var is not None
        return torch.sqrt(self.bn.running_var.to(torch.float32) + self.bn.eps)

    def _scaled_weight(self, factor: Tensor) -> Tensor:
        weight = self.weight.to(torch.float32) * factor.reshape(-1, 1, 1, 1)
        return weight.to(self.weight.dtype)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        factor = self._factor()
        assert self.bn.running_mean is not None
        mean = self.bn.running_mean.to(torch.float32)
        start = -mean if self.bias is None else self.bias.to(torch.float32) - mean
        bias = start * factor
        if self.bn.bias is not None:
            bias = bias + self.bn.bias.to(torch.float32)
        return self._scaled_weight(factor), bias.to(self.weight.dtype)

    def _compute(self, given: Given, activation: str) -> Tensor:
        if not self._quantizing:
            output = float_conv(self, given.values, self.weight, self.bias)
            return activate(self.bn(output), activation)
        if self._frozen or not self.training:
            return super()._compute(given, activation)
        dtype = autocast_dtype(given.values) or given.values.dtype
        output = self._normalized(given)
        if self.bn.bias is not None:
            output = output + self.bn.bias.to(torch.float32).reshape(-1, 1, 1)
        return activate(output.to(dtype), activation)

    def _normalized(self, given: Given) -> Tensor:
        """The output normalized with the statistics of the batch, without the shift; float32."""
        factor = self._factor()
        weight = self._scaled_weight(factor)
        output = self._quantized(given, weight, None, "none", torch.float32).to(torch.float32)
        count = output.numel() // output.shape[1]
        if count < 2:
            raise ValueError(
                "QATConvBn2d: a batch in training mode must give more than one value per channel, "
                f"got an output of shape {list(output.shape)}; freeze_statistics() or eval() uses "
                "the running statistics"
            )
        variance, mean = torch.var_mean(output, (0, 2, 3), correction=0)
        # The statistics of the convolution with the weight that is not scaled.
        usable = factor.detach().abs() >= _LEAST_FACTOR
        divisor = torch.where(usable, factor, 1.0)
        deviation = self._running_deviation()
        own_variance = variance / divisor.square()
        correction = torch.where(
            usable, deviation / torch.sqrt(own_variance + self.bn.eps), torch.ones_like(deviation)
        )
        self._update_statistics(mean / divisor, own_variance, count, usable)
        return (output - mean.reshape(-1, 1, 1)) * correction.reshape(-1, 1, 1)

    @torch.no_grad()
    def _update_statistics(
        self, mean: Tensor, variance: Tensor, count: int, usable: Tensor
    ) -> None:
        """Update the running statistics as nn.BatchNorm2d does, where the batch gives them."""
        bn = self.bn
        assert bn.running_mean is not None and bn.running_var is not None
        share = bn.momentum
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if share is None:  # the average of all batches
                share = 1.0 / float(bn.num_batches_tracked)
        if share is None:
            share = 0.0
        if self.bias is not None:
            mean = mean + self.bias.to(torch.float32)
        unbiased = variance * (count / (count - 1))
        for running, new in ((bn.running_mean, mean), (bn.running_var, unbiased)):
            updated = running + share * (new.to(running.dtype) - running)
            running.copy_(torch.where(usable, updated, running))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', statistics frozen' if self._frozen else ''}"


__all__ = ["QATConvBn2d"]
