"""Convolutions in all their options, and their operators against their specification."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from support import check_everywhere, floats, integers, positive
from torchquant import functional, ops

FORMATS = ("contiguous", "channels_last", "sliced channels", "every second row", "transposed")


@dataclass(frozen=True)
class Convolution:
    """A convolution's shape and options; the tensors follow from them and the seed."""

    batch: int
    channels: int  # of a group
    outputs: int  # of a group
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    bias: bool = True
    activation: str = "none"
    form: str = "contiguous"  # of the input in memory
    seed: int = 0

    @property
    def weight(self) -> Tensor:
        shape = (self.groups * self.outputs, self.channels, *self.kernel)
        return integers(*shape, seed=self.seed + 1)

    @property
    def sizes(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation")
        return {name: list(getattr(self, name)) for name in names} | {"groups": self.groups}

    @property
    def scale(self) -> Tensor:
        return positive(self.groups * self.outputs, seed=self.seed + 2)

    @property
    def bias_values(self) -> Tensor | None:
        return floats(self.groups * self.outputs, seed=self.seed + 3) if self.bias else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.groups * self.channels, *self.size)

    def formed(self, t: Tensor) -> Tensor:
        """The same values in memory of another shape."""
        if self.form == "channels_last" and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if self.form == "transposed":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        last = t.movedim(1, -1)
        if self.form == "sliced channels":
            wide = torch.full((*last.shape[:-1], last.shape[-1] + 3), 77, dtype=t.dtype)
            wide[..., 1:-2] = last
            return wide[..., 1:-2].movedim(-1, 1)
        if self.form == "every second row":
            wide = torch.full((last.shape[0], 2 * last.shape[1], *last.shape[2:]), 7, dtype=t.dtype)
            wide[:, ::2] = last
            return wide[:, ::2].movedim(-1, 1)
        return t.contiguous()

    def check_dynamic(
        self, dtype: torch.dtype, threads: tuple[int, ...] = (1,), **options: Any
    ) -> None:
        x = self.formed(floats(*self.input_shape, seed=self.seed + 4, dtype=dtype))
        self.check("conv_dynamic", (x,), threads, **options)

    def check_static(
        self,
        input: Tensor,
        scale: Tensor,
        zero: Any,
        threads: tuple[int, ...] = (1,),
        **options: Any,
    ) -> None:
        self.check("conv_static", (self.formed(input), scale, zero), threads, **options)

    def check(
        self, name: str, arguments: tuple[Any, ...], threads: tuple[int, ...], **options: Any
    ) -> None:
        side = (self.scale, self.bias_values)
        common = {**self.sizes, "activation": self.activation, **options}
        specified = getattr(functional, name)(*arguments, self.weight, *side, **common)
        packed = ops.pack_conv_weight(self.weight, self.groups)
        shape = list(self.weight.shape)
        call = getattr(ops, name)
        check_everywhere(
            lambda: call(*arguments, packed, *side, weight_shape=shape, **common),
            specified,
            threads,
            self,
        )


@st.composite
def convolutions(draw: Any) -> Convolution:
    spatial = draw(st.integers(1, 2))
    few = st.integers(1, 3)
    kernel = tuple(draw(st.sampled_from((1, 2, 3, 5))) for _ in range(spatial))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(spatial))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(2 * spatial))
    size = []
    for i in range(spatial):
        least = max(1, dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1])
        size.append(draw(st.integers(least, least + 6)))
    channels = st.one_of(st.integers(1, 20), st.sampled_from((31, 32, 33, 64, 65)))
    return Convolution(
        batch=draw(few),
        channels=draw(channels),
        outputs=draw(channels),
        size=tuple(size),
        kernel=kernel,
        stride=tuple(draw(st.integers(1, 3)) for _ in range(spatial)),
        padding=padding,
        dilation=dilation,
        groups=draw(st.sampled_from((1, 1, 2, 5))),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(("none", "relu", "relu6", "silu"))),
        form=draw(st.sampled_from(FORMATS)),
        seed=draw(st.integers(0, 99)),
    )


# The kernels of well-known networks, and sizes around the blocks of the kernels.
NAMED: dict[str, Convolution] = {
    "stem": Convolution(2, 3, 64, (23, 21), (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
    "pointwise": Convolution(2, 64, 130, (7, 7), (1, 1), (1, 1), (0,) * 4, (1, 1)),
    "pointwise, stride": Convolution(1, 96, 24, (9, 9), (1, 1), (2, 2), (0,) * 4, (1, 1)),
    "3x3": Convolution(1, 64, 64, (14, 13), (3, 3), (1, 1), (1,) * 4, (1, 1), activation="relu"),
    "3x3, uneven padding": Convolution(1, 40, 48, (9, 8), (3, 3), (2, 2), (0, 1, 0, 1), (1, 1)),
    "5x5": Convolution(1, 20, 33, (9, 9), (5, 5), (1, 1), (2,) * 4, (1, 1)),
    "dilated": Convolution(1, 32, 16, (12, 12), (3, 3), (1, 1), (4,) * 4, (4, 4)),
    "dilated, whole chunks": Convolution(
        1, 64, 70, (7, 7), (3, 3), (1, 1), (2,) * 4, (2, 2), activation="relu"
    ),
    "small stem": Convolution(2, 3, 24, (12, 9), (3, 3), (2, 2), (1,) * 4, (1, 1)),
    "stem without padding": Convolution(2, 3, 64, (9, 11), (3, 3), (1, 1), (0,) * 4, (1, 1)),
    "padding wider than the image": Convolution(1, 5, 7, (2, 3), (3, 3), (1, 1), (5,) * 4, (1, 1)),
    "grouped": Convolution(2, 8, 8, (8, 8), (3, 3), (1, 1), (1,) * 4, (1, 1), groups=32),
    "one channel in a group": Convolution(2, 1, 1, (8, 8), (3, 3), (1, 1), (1,) * 4, (1, 1), 33),
    "one channel, two outputs": Convolution(1, 1, 2, (8, 8), (3, 3), (2, 2), (1,) * 4, (1, 1), 20),
    "one dimension": Convolution(3, 20, 36, (50,), (5,), (2,), (2, 1), (1,)),
    "deep": Convolution(1, 520, 70, (4, 4), (3, 3), (1, 1), (1,) * 4, (1, 1)),
}
