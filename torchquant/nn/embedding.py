"""QuantizedEmbedding and QuantizedEmbeddingBag: tables with weights of 2 to 8 bits."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from torchquant import ops
from torchquant._extension import load
from torchquant.configs import Int8WeightOnlyConfig, QuantizationConfig, check_config
from torchquant.nn import float_embedding
from torchquant.nn.intx_state import IntxState
from torchquant.nn.intx_weight import (
    integers_of,
    shape_refusal,
    values_of,
    weights_refusal,
)
from torchquant.nn.linear_arguments import check_size
from torchquant.nn.packed_state import Canonical
from torchquant.nn.state_names import PLACEHOLDER
from torchquant.nn.weight import INTX, WeightFormat

_fast_embedding_intx = load().embedding_intx
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # saves two look-ups in each call
Table = TypeVar("Table", bound="EmbeddingTable")
_MODES = ("sum", "mean", "max")


class EmbeddingTable(IntxState):
    """A table of ``num_embeddings`` rows; the base class of both quantized embeddings.

    A call dequantizes the rows that it needs. The table itself is never dequantized.

    Example:
        >>> issubclass(QuantizedEmbedding, EmbeddingTable)
        True
    """

    weight_format: ClassVar[WeightFormat] = INTX
    is_table: ClassVar[bool] = True
    # Read by code that calls torch's function with the attributes of an embedding, such as peft's.
    max_norm: ClassVar[None] = None
    norm_type: ClassVar[float] = 2.0
    float_class: ClassVar[type[nn.Module]]
    # ``sparse`` and ``scale_grad_by_freq`` concern the gradient of a float weight; to_float()
    # restores them.
    stored: ClassVar[tuple[str, ...]] = (
        *("num_embeddings", "embedding_dim", "padding_idx"),
        *("scale_grad_by_freq", "sparse"),
    )

    def init_table(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        config: QuantizationConfig | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Check and set the attributes, and register the weight."""
        who = type(self).__name__
        self.num_embeddings = check_size("num_embeddings", num_embeddings, who)
        self.embedding_dim = check_size("embedding_dim", embedding_dim, who)
        self.padding_idx = _row("padding_idx", padding_idx, num_embeddings, who)
        self.config = self.checked_config(who, config)
        reason = self.shape_refusal(self.config, self.weight_shape)
        if reason is not None:
            raise ValueError(f"{who}: {reason}")
        self.take_weights(self.config)
        self.register_weight(self.layout.empty(self.weight_shape, device), dtype)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    def canonical(self) -> Canonical:
        """Dtype and shape of each tensor of the layer's state dict, by name."""
        return self.layout.canonical_tensors(self.weight_shape)

    @classmethod
    def checked_config(cls, who: str, config: QuantizationConfig | None) -> QuantizationConfig:
        """The configuration, or the default one for None; raises if the class cannot have it."""
        config = check_config(who, config or Int8WeightOnlyConfig())
        reason = cls.config_refusal(config)
        if reason is not None:
            raise ValueError(f"{who}: config must fit an embedding, got {config}: {reason}")
        return config

    @classmethod
    def config_refusal(cls, config: QuantizationConfig) -> str | None:
        """The reason why no embedding can have ``config``, or None."""
        if config.activations is not None:
            name = type(config.activations).__name__
            return (
                "embeddings take indices and need a configuration of weights alone, such as "
                f"IntxWeightOnlyConfig(), not {name} activations"
            )
        return weights_refusal(config, "embedding")

    @classmethod
    def shape_refusal(cls, config: QuantizationConfig, shape: tuple[int, ...]) -> str | None:
        """The reason why a table of this shape cannot have ``config``, or None."""
        return shape_refusal(config, shape, "embedding_dim")

    @classmethod
    def from_float(
        cls: type[Table], embedding: nn.Module, config: QuantizationConfig | None = None
    ) -> Table:
        """Quantize a float embedding; the float embedding itself does not change.

        Hooks stay with the float embedding; :func:`torchquant.quantize_` moves them to the new one.

        Args:
            embedding: a module of the class that this class replaces, with float32, bfloat16 or
                float16 weights, on the CPU or on a CUDA device. The new layer is on the same
                device.
            config: the configuration; None is ``Int8WeightOnlyConfig()``.

        Returns:
            A layer in the training mode of ``embedding``, which returns values of the dtype of its
            weight.

        Raises:
            TypeError: embedding is of another class, has ``max_norm``, or its weight is
                parametrized or not float, or config is not a configuration.
            ValueError: the weight is empty, holds NaN or infinities, or is on a device without
                kernels; or no embedding of this shape can have the configuration.
        """
        who = f"{cls.__name__}.from_float"
        config = cls.checked_config(who, config)
        name = cls.float_class.__name__
        reason = float_embedding.refusal(embedding, cls.float_class)
        if reason is not None:
            raise TypeError(f"{who}: embedding must be a plain nn.{name}, got {reason}")
        shape = float_embedding.weight_shape(embedding)
        reason = float_embedding.value_refusal(embedding) or cls.shape_refusal(config, shape)
        if reason is not None:
            raise ValueError(f"{who}: embedding cannot be quantized: {reason}")
        weight = embedding._parameters["weight"]
        assert weight is not None
        arguments = {name: cls.stored_value(embedding, name) for name in cls.stored}
        layer = cls(**arguments, config=config, device="meta", dtype=weight.dtype)
        # Tensors created in inference mode could not be changed in place.
        with torch.inference_mode(False), torch.no_grad():
            layer.packed = layer.layout.pack_integers(*integers_of(weight, config.weights))
            layer.move_placeholder()
        return layer.train(embedding.training)

    def to_float(self) -> nn.Module:
        """A float embedding with the values that the integers represent."""
        weight = self.dequantized()
        arguments = {name: getattr(self, name) for name in self.stored}
        embedding = self.float_class(**arguments, _weight=weight)
        return embedding.train(self.training)

    def dequantized(self) -> Tensor:
        """The float weight that the integers represent, a new tensor in the layer's dtype."""
        integers, scale, zero_point = self.layout.unpack_integers(self.packed, self.weight_shape)
        zero = zero_point if self._has_zero_point else None
        return values_of(integers, scale, zero, self.config.weights).to(self.dtype)

    @classmethod
    def stored_value(cls, module: nn.Module, name: str) -> Any:
        """The value that a file stores for an argument in ``stored``."""
        return getattr(module, name)

    def probe(self, rows: int, generator: torch.Generator) -> Tensor:
        """``rows`` random indices on the CPU, used to test a changed layer."""
        return torch.randint(self.num_embeddings, (rows,), generator=generator)

    def _table(self) -> dict[str, Any]:
        """The arguments of the operators that describe the table."""
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "bits": self._bits,
            "group_size": self._group_size,
            "has_zero_point": self._has_zero_point,
            "output_dtype": self.dtype,
        }

    def _check_input(self, input: Tensor) -> None:
        who = type(self).__name__
        if isinstance(input, torch.fx.Proxy):
            return
        if not isinstance(input, Tensor):
            raise TypeError(f"{who}: input must be a tensor, got {type(input).__name__}")
        if input.device != self.packed.device:
            remedy = "load its weights first" if self.packed.is_meta else "move one of them"
            raise ValueError(
                f"{who}: input must be on the layer's device {self.packed.device}, "
                f"got one on {input.device}; {remedy}"
            )

    def extra_repr(self) -> str:
        parts = [str(self.num_embeddings), str(self.embedding_dim), *self._flags()]
        return ", ".join((*parts, str(self.config.weights)))

    def _flags(self) -> list[str]:
        return [] if self.padding_idx is None else [f"padding_idx={self.padding_idx}"]


class QuantizedEmbedding(EmbeddingTable):
    """``nn.Embedding`` with a table of 2 to 8 bits.

    A value is the float that its integer represents, rounded to the layer's dtype once: a call
    returns rows of ``layer.weight``, bit by bit. An embedding that shares its weight with the
    output layer of a model can have the same tensor ``packed`` as that layer.

    The table cannot be trained, so ``sparse`` and ``scale_grad_by_freq`` have no effect, and no
    gradient belongs to ``padding_idx``.

    State dict: as :class:`~torchquant.nn.QuantizedIntxLinear` with N = num_embeddings and
    K = embedding_dim, without ``bias``.

    Args:
        num_embeddings: the number of rows.
        embedding_dim: the size of a row.
        padding_idx: kept for :meth:`to_float`.
        scale_grad_by_freq: kept for :meth:`to_float`.
        sparse: kept for :meth:`to_float`.
        config: the configuration, with weights per row (``PerAxis(0)``) or in groups, and without
            activations; None is ``Int8WeightOnlyConfig()``.
        device: device of the table, which is not initialised; :meth:`from_float` creates a layer
            with values.
        dtype: the dtype of the result and of the readable ``weight``; None is float32.

    Raises:
        TypeError: config is not a configuration.
        ValueError: a size is not a positive integer, padding_idx is not a row, no embedding can
            have the configuration, or its groups are larger than embedding_dim.

    Example:
        >>> from torchquant import IntxWeightOnlyConfig
        >>> embedding = nn.Embedding(1000, 64)
        >>> layer = QuantizedEmbedding.from_float(embedding, IntxWeightOnlyConfig(4, group_size=32))
        >>> indices = torch.tensor([[1, 999]])
        >>> layer(indices).shape, torch.equal(layer(indices), layer.weight[indices])
        (torch.Size([1, 2, 64]), True)
        >>> embedding.weight.nbytes / layer.packed.nbytes > 5
        True
        >>> layer
        QuantizedEmbedding(1000, 64, int4 in groups of 32)
    """

    float_class = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        config: QuantizationConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.init_table(num_embeddings, embedding_dim, padding_idx, config, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows.

        Args:
            input: int64 or int32 indices of any shape.

        Returns:
            ``[*input.shape, embedding_dim]`` in the layer's dtype.

        Raises:
            TypeError: input is not a tensor of integers.
            ValueError: input is on another device than the layer.
            IndexError: an index is not a row of the table.
        """
        if type(input) is Tensor and input.is_cpu and not _is_dynamo_compiling():
            placeholder = self._parameters[PLACEHOLDER]
            try:
                return _fast_embedding_intx(  # type: ignore[no-any-return]
                    input,
                    self._buffers["packed"],
                    self.num_embeddings,
                    self.embedding_dim,
                    self._bits,
                    self._group_size,
                    self._has_zero_point,
                    placeholder.dtype,  # type: ignore[union-attr]
                )
            except ValueError:
                self._check_input(input)  # raises with the argument names of a layer
                raise
        self._check_input(input)
        return ops.embedding_intx(input, self.packed, **self._table())


class QuantizedEmbeddingBag(EmbeddingTable):
    """``nn.EmbeddingBag`` with a table of 2 to 8 bits: sums, means or maxima of its rows.

    The rows of a bag are added in float32 in the order of the indices, from 0, and the result is
    rounded to the layer's dtype once. A bag without rows is 0.

    The table cannot be trained, so ``sparse`` and ``scale_grad_by_freq`` have no effect.

    State dict: as :class:`QuantizedEmbedding`.

    Args:
        num_embeddings: the number of rows.
        embedding_dim: the size of a row.
        scale_grad_by_freq: kept for :meth:`to_float`.
        mode: sum, mean (the sum, divided by the number of rows) or max.
        sparse: kept for :meth:`to_float`.
        include_last_offset: offsets has one element more, the end of the last bag.
        padding_idx: indices of this row do not count.
        config: see :class:`QuantizedEmbedding`.
        device: see :class:`QuantizedEmbedding`.
        dtype: see :class:`QuantizedEmbedding`.

    Raises:
        TypeError: config is not a configuration.
        ValueError: as for :class:`QuantizedEmbedding`, or mode is not the name of a mode.

    Example:
        >>> embedding = nn.EmbeddingBag(1000, 64, mode="sum")
        >>> layer = QuantizedEmbeddingBag.from_float(embedding)
        >>> indices, offsets = torch.tensor([5, 6, 7]), torch.tensor([0, 2])
        >>> torch.equal(layer(indices, offsets)[0], layer.weight[5] + layer.weight[6])
        True
    """

    float_class = nn.EmbeddingBag
    stored: ClassVar[tuple[str, ...]] = (*EmbeddingTable.stored, "mode", "include_last_offset")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        config: QuantizationConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise ValueError(
                f"{type(self).__name__}: mode must be one of {', '.join(_MODES)}, got {mode!r}"
            )
        self.mode, self.include_last_offset = mode, include_last_offset
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.init_table(num_embeddings, embedding_dim, padding_idx, config, device, dtype)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Add rows up.

        Args:
            input: int64 or int32 indices: ``[bags, N]``, or ``[N]`` with offsets.
            offsets: int64 or int32 ``[bags]``: where each bag begins in input; None if each row of
                input is a bag.
            per_sample_weights: float32, bfloat16 or float16 of input's shape, multiplied with the
                rows; only with mode "sum". It gets a gradient.

        Returns:
            ``[bags, embedding_dim]`` in the layer's dtype.

        Raises:
            TypeError: a tensor has another dtype, or input is not a tensor.
            ValueError: shapes or offsets do not fit each other, or input is on another device than
                the layer.
            IndexError: an index is not a row of the table.
        """
        self._check_input(input)
        return ops.embedding_bag_intx(
            input,
            self.packed,
            offsets,
            per_sample_weights,
            mode=self.mode,
            padding_idx=self.padding_idx,
            include_last_offset=self.include_last_offset,
            **self._table(),
        )

    def _flags(self) -> list[str]:
        return [*super()._flags(), f"mode={self.mode!r}"]


def _row(name: str, index: int | None, rows: int, who: str) -> int | None:
    """A row's index, counted from the beginning of the table."""
    if index is None:
        return None
    if not -rows <= index < rows:
        raise ValueError(
            f"{who}: {name} must be from {-rows} to {rows - 1} (num_embeddings = {rows}), "
            f"got {index}"
        )
    return index % rows


__all__ = ["QuantizedEmbedding", "QuantizedEmbeddingBag"]
