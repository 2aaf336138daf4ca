"""The layers of the convolution benchmark: those of four networks, and two curves.

Every layer of ResNet-50, VGG-16, MobileNetV2 and EfficientNet (B0 and Lite0 have the same ones,
except that B0 adds its gates) on images of 224 x 224, once, with a batch of 1 and of 8.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

BATCHES = (1, 8)
STEM, DENSE, POINT, DEPTHWISE, GROUPED = "stem", "dense", "1x1", "depthwise", "grouped"
FAMILIES = (STEM, DENSE, POINT, DEPTHWISE, GROUPED)

# Of a bottleneck stage of ResNet-50: inner channels, outer channels, stride, pixels before it.
RESNET = ((64, 256, 1, 56), (128, 512, 2, 56), (256, 1024, 2, 28), (512, 2048, 2, 14))
# Of a stage: outputs, pixels, layers.
VGG = ((64, 224, 2), (128, 112, 2), (256, 56, 3), (512, 28, 3), (512, 14, 3))
# Of a stage of inverted residuals: factor of the inner channels, outputs, blocks, stride, kernel.
MOBILENET = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)
EFFICIENTNET = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
GATES = ((32, 8), (1152, 48), (48, 1152))  # of EfficientNet-B0: 1x1 on one pixel
# Curves: a 3x3 layer of 64 channels over pixels, one of 128 channels over images.
CURVE_PIXELS = (14, 20, 28, 40, 56, 80, 112, 160, 224)
CURVE_BATCHES = (1, 2, 4, 8, 16, 32)
PATTERN = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)-(\d+)k(\d+)(?:s(\d+))?(?:g(\d+))?")


@dataclass(frozen=True)
class ConvShape:
    """One layer on one batch. The padding is half of the kernel."""

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1
    networks: tuple[str, ...] = field(default=(), compare=False)

    @property
    def padding(self) -> int:
        """On every side."""
        return self.kernel // 2

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = (
            (size + 2 * self.padding - self.kernel) // self.stride + 1
            for size in (self.height, self.width)
        )
        return height, width

    @property
    def out_pixels(self) -> int:
        """Of all images together."""
        height, width = self.out_size
        return self.batch * height * width

    @property
    def operations(self) -> int:
        """Multiplications and additions, those with padding included."""
        inner = self.channels // self.groups * self.kernel * self.kernel
        return 2 * self.out_pixels * self.outputs * inner

    @property
    def weight_bytes(self) -> int:
        """Bytes of the int8 weight."""
        return self.outputs * self.channels // self.groups * self.kernel * self.kernel

    @property
    def limit_bytes(self) -> int:
        """The int8 weight, input and result, each once."""
        read = self.batch * self.channels * self.height * self.width
        return self.weight_bytes + read + self.out_pixels * self.outputs

    @property
    def cycle_bytes(self) -> int:
        """The same: the next call reads them again."""
        return self.limit_bytes

    @property
    def family(self) -> str:
        """Which layers it is judged with: one of `FAMILIES`."""
        if self.groups == self.channels and self.groups > 1:
            return DEPTHWISE
        if self.groups > 1:
            return GROUPED
        if self.kernel == 1:
            return POINT
        return STEM if self.channels <= 4 else DENSE

    def load_request(self) -> dict[str, int]:
        """The layer."""
        return {
            "channels": self.channels,
            "outputs": self.outputs,
            "kernel": self.kernel,
            "stride": self.stride,
            "groups": self.groups,
        }

    def input_request(self) -> dict[str, int]:
        """The batch."""
        return {"batch": self.batch, "height": self.height, "width": self.width}

    def fields(self) -> dict[str, Any]:
        """The shape in a results file."""
        return {
            "shape": str(self),
            **self.input_request(),
            **self.load_request(),
            "family": self.family,
            "networks": list(self.networks),
        }

    def __str__(self) -> str:
        text = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        text += f"-{self.outputs}k{self.kernel}"
        text += f"s{self.stride}" if self.stride > 1 else ""
        return text + (f"g{self.groups}" if self.groups > 1 else "")


# A layer without its batch: channels, pixels of a side, outputs, kernel, stride, groups.
Layer = tuple[int, int, int, int, int, int]


def _resnet50() -> Iterator[Layer]:
    yield 3, 224, 64, 7, 2, 1
    before = 64
    for inner, outer, stride, size in RESNET:
        after = size // stride
        yield before, size, inner, 1, 1, 1
        yield inner, size, inner, 3, stride, 1
        yield inner, after, outer, 1, 1, 1
        yield before, size, outer, 1, stride, 1  # beside the block
        yield outer, after, inner, 1, 1, 1
        yield inner, after, inner, 3, 1, 1
        before = outer


def _vgg16() -> Iterator[Layer]:
    before = 3
    for outputs, size, layers in VGG:
        for _ in range(layers):
            yield before, size, outputs, 3, 1, 1
            before = outputs


def _inverted_residuals(stages: tuple[tuple[int, ...], ...]) -> Iterator[Layer]:
    yield 3, 224, 32, 3, 2, 1
    before, size = 32, 112
    for factor, outputs, blocks, first_stride, kernel in stages:
        for block in range(blocks):
            stride, inner = (1 if block else first_stride), factor * before
            if factor > 1:
                yield before, size, inner, 1, 1, 1
            yield inner, size, inner, kernel, stride, inner
            size //= stride
            yield inner, size, outputs, 1, 1, 1
            before = outputs
    yield before, size, 1280, 1, 1, 1


def _efficientnet() -> Iterator[Layer]:
    gates = ((channels, 1, outputs, 1, 1, 1) for channels, outputs in GATES)
    return chain(_inverted_residuals(EFFICIENTNET), gates)


NETWORKS = {
    "ResNet-50": _resnet50,
    "VGG-16": _vgg16,
    "MobileNetV2": lambda: _inverted_residuals(MOBILENET),
    "EfficientNet": _efficientnet,
}


def network_shapes() -> list[ConvShape]:
    """Every layer of every network once, layer by layer, with each batch."""
    found: dict[Layer, list[str]] = {}
    for network, layers in NETWORKS.items():
        for layer in layers():
            names = found.setdefault(layer, [])
            if network not in names:
                names.append(network)
    return [
        _shape(batch, layer, tuple(names)) for layer, names in found.items() for batch in BATCHES
    ]


def _shape(batch: int, layer: Layer, networks: tuple[str, ...]) -> ConvShape:
    channels, size, outputs, kernel, stride, groups = layer
    return ConvShape(batch, channels, size, size, outputs, kernel, stride, groups, networks)


def curves() -> dict[str, list[ConvShape]]:
    """A 3x3 layer over the pixels of one image, and one over the number of images."""
    pixels = [ConvShape(1, 64, size, size, 64, 3) for size in CURVE_PIXELS]
    images = [ConvShape(batch, 128, 28, 28, 128, 3) for batch in CURVE_BATCHES]
    return {"pixels": pixels, "images": images}


SMOKE_SHAPES = (
    ConvShape(1, 3, 16, 16, 8, 3, 2),
    ConvShape(1, 16, 8, 8, 24, 1),
    ConvShape(2, 32, 8, 8, 32, 3, 1, 32),
)
SMOKE_CURVES = {"pixels": [ConvShape(1, 16, size, size, 16, 3) for size in (4, 8)]}


def select(shapes: list[ConvShape], patterns: list[str]) -> list[ConvShape]:
    """The shapes whose text, family or network matches one of the patterns; all without patterns.

    A pattern without `*`, `?` or `[` can be a shape of one's own, `"1x64x56x56-64k3"`: batch,
    channels, height, width, outputs, kernel, then `s` and the stride, `g` and the groups.

    Raises:
        ValueError: a pattern matches no shape; a benchmark without shapes would look fast.
    """
    if not patterns:
        return shapes
    chosen: dict[ConvShape, None] = {}
    for pattern in patterns:
        found = [
            shape
            for shape in shapes
            if any(
                fnmatch.fnmatchcase(text.lower(), pattern.lower())
                for text in (str(shape), shape.family, *shape.networks)
            )
        ]
        own = PATTERN.fullmatch(pattern)
        if own and not found:
            found = [_own_shape(pattern, *(int(number or 1) for number in own.groups()))]
        if not found:
            raise ValueError(
                f"{pattern!r} matches no shape, family or network of the benchmark, "
                f"for example {shapes[0]}; try '8x*', '*k3', 'depthwise', 'vgg*' or your own shape"
            )
        chosen.update(dict.fromkeys(found))
    known = [shape for shape in shapes if shape in chosen]
    return known + [shape for shape in chosen if shape not in known]


def _own_shape(pattern: str, *numbers: int) -> ConvShape:
    batch, channels, height, width, outputs, kernel, stride, groups = numbers
    shape = ConvShape(batch, channels, height, width, outputs, kernel, stride, groups)
    if min(numbers) < 1 or shape.channels % shape.groups or shape.outputs % shape.groups:
        raise ValueError(
            f"{pattern!r} must have sizes of at least 1, and channels and outputs that the groups "
            "divide"
        )
    return shape
