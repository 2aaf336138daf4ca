"""The networks of `torchquant bench cnn`, from torchvision and timm, with random weights."""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PIXELS = 224
STATISTICS_IMAGES = 4  # of 224 x 224, as many pixels as of other sizes


@dataclass(frozen=True)
class Network:
    """Where a network comes from, and how much it computes.

    `operations`: multiplications and additions of convolutions and linear layers, one image of
    224 x 224; `weights`: their number.
    """

    module: str
    function: str
    operations: int
    weights: int
    arguments: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """The package that is not installed."""
        package = self.module.partition(".")[0]
        return package if find_spec(package) is None else None


NETWORKS = {
    "ResNet-18": Network("torchvision.models", "resnet18", 3_628_146_688, 11_678_912),
    "ResNet-50": Network("torchvision.models", "resnet50", 8_178_368_512, 25_502_912),
    "MobileNetV2": Network("torchvision.models", "mobilenet_v2", 601_548_544, 3_469_760),
    "EfficientNet-Lite0": Network(
        "timm", "create_model", 770_375_104, 4_608_992, ("efficientnet_lite0",)
    ),
}


@dataclass(frozen=True)
class NetworkCase:
    """One network on a batch."""

    network: str
    batch: int
    pixels: int = PIXELS

    @property
    def operations(self) -> int:
        """Multiplications and additions of the whole batch."""
        images = self.batch * (self.pixels / PIXELS) ** 2
        return round(NETWORKS[self.network].operations * images)

    @property
    def limit_bytes(self) -> int:
        """The int8 weights: activations can stay in the caches."""
        return NETWORKS[self.network].weights

    @property
    def cycle_bytes(self) -> int:
        """The same: the next call reads them again."""
        return self.limit_bytes

    def load_request(self) -> dict[str, Any]:
        """The network, and the size for which its peers prepare it."""
        return {"network": self.network, "pixels": self.pixels}

    def input_request(self) -> dict[str, int]:
        """The batch."""
        return {"batch": self.batch}

    def fields(self) -> dict[str, Any]:
        """The case in a results file."""
        return {"network": self.network, "batch": self.batch, "pixels": self.pixels}

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch}"


def random_network(name: str, pixels: int = PIXELS) -> nn.Module:
    """A network in evaluation mode. The same name gives the same weights.

    Its batch norms have the statistics of their inputs, so that no activation vanishes or grows
    from layer to layer, and a bias, so that most activations are positive: rounding errors then do
    not grow from layer to layer either, as in a trained network.

    Raises:
        ImportError: torchvision or timm is not installed, or cannot be imported.
    """
    torch.manual_seed(0)
    model = create(name)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        nn.init.ones_(norm.bias)
        norm.momentum = None  # the average over all batches: of the only one
    with torch.no_grad():
        model.train()(images(statistics_images(pixels), pixels))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def create(name: str) -> nn.Module:
    """A network as its package initializes it.

    Raises:
        ImportError: torchvision or timm is not installed, or cannot be imported.
    """
    declare_vision_operators()
    network = NETWORKS[name]
    make = getattr(importlib.import_module(network.module), network.function)
    model: nn.Module = make(*network.arguments)
    return model


def statistics_images(pixels: int) -> int:
    """How many images suffice for statistics: the last layers have few pixels of each."""
    return max(STATISTICS_IMAGES, round(STATISTICS_IMAGES * (PIXELS / pixels) ** 2))


def images(count: int, pixels: int = PIXELS) -> Tensor:
    """Random images `[count, 3, pixels, pixels]`, smooth like photographs."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.randn(count, 3, max(pixels // 8, 1), max(pixels // 8, 1), generator=generator)
    smooth = nn.functional.interpolate(coarse, (pixels, pixels), mode="bilinear")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


_libraries: list[Any] = []  # a declaration ends with its object


def declare_vision_operators() -> None:
    """Make torchvision importable beside a torch without CUDA.

    Its wheels on PyPI hold a library for CUDA, which does not load there. The import then fails,
    because torchvision describes its operators `nms` and `qnms`, which the library would have
    defined. Models do not use them; here they are declared without an implementation.
    """
    if "torchvision" in sys.modules or _libraries:
        return
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return
    _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
    for operator in ("nms", "qnms"):
        _libraries[-1].define(
            f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )


def _loads(folder: Path) -> bool:
    """Whether torchvision's library loads; where it does, the operators exist from now on."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")
