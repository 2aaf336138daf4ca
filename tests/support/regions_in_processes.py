"""Conversions in several processes, for tests/convert; a process can import this file."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from support.chain_models import images
from support.chains import CONFIG


def everything(module: nn.Module, name: str) -> bool:
    return True


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Branches(nn.Module):
    """A part of it runs for bright images only."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = Branch(), Branch()

    def forward(self, x: Tensor) -> Tensor:
        y = self.always(x)
        return y + self.sometimes(x) if x.mean() > 5 else y


CASES = ("one", "all", "other layers")


def convert_in_process(rank: int) -> dict[str, Any]:
    """Processes that see the same; those that see other parts; those with other layers."""
    return {case: convert_case(rank, case) for case in CASES}


def convert_case(rank: int, case: str) -> Any:
    torch.manual_seed(0)
    model = Branches().eval()
    chosen = "always.*" if case == "other layers" and rank == 1 else everything
    torchquant.prepare_(model, CONFIG, filter_fn=chosen)
    batches = [images(2)]
    if rank == 0 or case == "all":
        batches.append(images(1) + 10)
    torchquant.calibrate(model, batches)
    try:
        report = torchquant.convert_(model)
    except ValueError as error:
        return str(error)
    x = images(2) + 10
    with torch.no_grad():
        return {
            "regions": [(one.name, one.action) for one in report.regions],
            "state": model.state_dict(),
            "result": model(x),
        }
