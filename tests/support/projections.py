"""Models whose layers are applied to one tensor, converted with and without one product."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant.nn.projections as projections
from support import floats
from torchquant import Fusion, QuantizationConfig, quantize_
from torchquant import QuantizationReport as Report

Calls = list[int]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The number of members of each product of several layers."""
    calls: Calls = []
    split = projections._split

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[5]))
        return split(*arguments)

    monkeypatch.setattr(projections, "_split", counted)
    return calls


class Attention(nn.Module):
    """Attention as in Hugging Face: views between the calls, and a branch on values after them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        shape = (*x.shape[:-1], -1, 16)
        q = self.q(x).view(shape).transpose(-3, -2)
        k = self.k(x).view(shape).transpose(-3, -2)
        v = self.v(x).view(shape).transpose(-3, -2)
        if q.shape[1] > 1 and mask is not None:
            k = k + mask
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(64), Attention(), nn.LayerNorm(64), GatedMLP()])
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm1, attention, norm2, mlp in self.layers:
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return x


X = floats(2, 5, 64)


def both(
    model: nn.Module, config: QuantizationConfig | None = None
) -> tuple[nn.Module, nn.Module, Report]:
    """The model converted without groups and with groups, and the lines of the report."""
    plain = copy.deepcopy(model.eval())
    quantize_(plain, config, fusion=Fusion(projections=False))
    report = quantize_(model, config)
    return plain, model, report


def lines(report: Report) -> list[str]:
    return [str(fusion) for fusion in report.fusions if fusion.kind == "projections"]


@pytest.fixture(params=["no_grad", "inference_mode"])
def gradients_off(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.no_grad() if request.param == "no_grad" else torch.inference_mode():
        yield
