"""replace_norms_: norms that are replaced, and norms that stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchquant
from torchquant.convert.norms import looks_like_a_norm


class LlamaRMSNorm(nn.Module):
    """The norm of transformers: the cast is before the weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class GemmaRMSNorm(LlamaRMSNorm):
    """The same state, but a different function: the weight is 1 + w."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.again = norm, norm
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.again(self.linear(self.first(x)))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(64), nn.LayerNorm(64, bias=False), nn.RMSNorm(64, eps=1e-5), LlamaRMSNorm(64)],
    ids=["layer", "layer without bias", "rms", "llama"],
)
def test_results_change_by_rounding_only(norm: nn.Module, dtype: torch.dtype) -> None:
    model = nn.Sequential(norm).to(dtype)
    x = (torch.randn(5, 7, 64) * torch.logspace(-2, 2, 5)[:, None, None]).to(dtype)
    expected = model(x)
    report = torchquant.replace_norms_(model)
    assert [norm.action for norm in report.norms] == ["replaced"]
    got = model(x)
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=4 * unit, atol=4 * unit)
    norm.to(torch.float32)  # the parameters are shared between the cases


def test_parameters_names_ties_and_hooks_stay() -> None:
    model = Block(LlamaRMSNorm(64))
    weight, keys = model.first.weight, list(model.state_dict())
    calls: list[str] = []
    model.first.register_forward_hook(lambda *_: calls.append("hook"))
    report = torchquant.replace_norms_(model)
    assert [str(norm) for norm in report.norms] == ["replaced: first (LlamaRMSNorm)"]
    assert isinstance(model.first, torchquant.nn.RMSNorm)
    assert model.first is model.again
    assert model.first.weight is weight
    assert model.first.cast_before_weight
    assert list(model.state_dict()) == keys
    model(torch.randn(2, 64))
    assert calls == ["hook", "hook"]
    model.first.weight.grad = None
    model(torch.randn(2, 64)).sum().backward()
    assert weight.grad is not None


def test_norms_that_compute_a_different_function_are_left_with_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "gemma": GemmaRMSNorm(64),
            "batch": nn.BatchNorm1d(64),
            "two": nn.LayerNorm([8, 8]),
            "linear": nn.Linear(64, 64),
        }
    )
    before = dict(model.named_modules())
    report = torchquant.replace_norms_(model)
    assert dict(model.named_modules()) == before
    assert [norm.name for norm in report.norms] == ["gemma", "batch", "two"]
    assert all(norm.action == "left" and norm.reason for norm in report.norms)
    assert str(report).startswith("0 of 3 norms replaced\nleft: gemma (GemmaRMSNorm): ")


def test_a_norm_with_a_replaced_forward_is_left() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    assert torchquant.replace_norms_(model).norms[0].reason == "forward replaced on the instance"


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(8))
    assert "meta device" in torchquant.replace_norms_(model).norms[0].reason


def test_a_second_call_changes_nothing() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    torchquant.replace_norms_(model)
    first = model[0]
    report = torchquant.replace_norms_(model)
    assert model[0] is first
    assert report.norms[0].reason == "already a norm of torchquant"
    assert report.replaced == ()


def test_filter() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    report = torchquant.replace_norms_(model, lambda _, name: name == "1")
    assert [norm.reason for norm in report.norms] == ["filter_fn", ""]
    assert type(model[0]) is nn.LayerNorm


def test_blocks_share_a_line() -> None:
    model = nn.ModuleList([Block(nn.LayerNorm(64)) for _ in range(3)])
    lines = str(torchquant.replace_norms_(model)).splitlines()
    assert lines == ["3 of 3 norms replaced", "replaced: {0..2}.first (LayerNorm) (3 times)"]


def test_a_replaced_norm_adds_the_residual() -> None:
    model = nn.Sequential(nn.LayerNorm(64))
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    expected = model[0](x + y)
    torchquant.replace_norms_(model)
    torch.testing.assert_close(model[0](x, residual=y), expected)


def test_looks_like_a_norm() -> None:
    assert looks_like_a_norm(GemmaRMSNorm(8))
    assert not looks_like_a_norm(nn.Sequential(nn.LayerNorm(8)))


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        torchquant.replace_norms_(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="filter_fn must be a function"):
        torchquant.replace_norms_(nn.Sequential(), "all")  # type: ignore[arg-type]
