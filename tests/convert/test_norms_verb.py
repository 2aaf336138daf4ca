"""replace_norms_ and restore_norms_: norms that are replaced, norms that stay, and the way back."""

from __future__ import annotations

import pytest
import torch
from support.norms import GemmaRMSNorm, LlamaRMSNorm
from torch import Tensor, nn

import torchquant
from torchquant.convert.norms import looks_like_a_norm


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.again = norm, norm
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.again(self.linear(self.first(x)))
        return result


def test_parameters_names_ties_and_hooks_stay() -> None:
    norm = LlamaRMSNorm(64)
    model = Block(norm)
    weight, keys = model.first.weight, list(model.state_dict())
    calls: list[str] = []
    norm.register_forward_hook(lambda *_: calls.append("hook"))
    report = torchquant.replace_norms_(model)
    assert [str(row) for row in report.norms] == ["replaced: first (LlamaRMSNorm)"]
    assert model.first is norm
    assert model.again is norm
    assert isinstance(norm, LlamaRMSNorm)
    assert isinstance(norm, torchquant.nn.ReplacedNorm)
    assert norm.weight is weight
    assert list(model.state_dict()) == keys
    model(torch.randn(2, 64))
    assert calls == ["hook", "hook"]
    model(torch.randn(2, 64)).sum().backward()
    assert weight.grad is not None


def test_norms_that_compute_a_different_function_are_left_with_the_reason_of_their_kind() -> None:
    class CenteredRMSNorm(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.amax(-1, keepdim=True))

    class TwiceLayerNorm(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.ModuleDict(
        {
            "rms": CenteredRMSNorm(64),
            "layer": TwiceLayerNorm(64),
            "batch": nn.BatchNorm1d(64),
            "instance": nn.InstanceNorm1d(64),
            "group": nn.GroupNorm(2, 64),
            "local": nn.LocalResponseNorm(3),
            "two": nn.LayerNorm([8, 8]),
            "linear": nn.Linear(64, 64),
        }
    )
    classes = {name: type(module) for name, module in model.named_modules()}
    report = torchquant.replace_norms_(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {row.name: row.reason for row in report.norms} == {
        "rms": "its forward gives other values than a LayerNorm or an RMSNorm over the last "
        "dimension",
        "layer": "its forward gives other values than a LayerNorm over the last dimension",
        "batch": "it normalizes over the batch, not the last dimension",
        "instance": "it normalizes each channel over all positions, not the last dimension",
        "group": "it normalizes groups of channels, not the last dimension",
        "local": "it normalizes over neighbouring channels, not the last dimension",
        "two": "it normalizes several dimensions, [8, 8], not one",
    }
    assert all(row.action == "left" for row in report.norms)
    assert report.summary() == "0 of 7 norms replaced"
    assert report["two"] is report.norms[-1]
    assert report.to_dict()["norms"][0]["action"] == "left"


def test_nothing_changes_if_something_raises() -> None:
    def choose(module: nn.Module, name: str) -> bool:
        if name == "1":
            raise KeyError(name)
        return True

    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    with pytest.raises(KeyError):
        torchquant.replace_norms_(model, choose)
    assert [type(norm) for norm in model] == [nn.LayerNorm, nn.LayerNorm]


@pytest.mark.parametrize("error", [IndexError, AttributeError, AssertionError, SystemExit])
def test_a_norm_that_raises_is_left_and_the_others_are_replaced(error: type[Exception]) -> None:
    class ResponseNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(64)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            raise error("too many indices, 3")

    ResponseNorm.__module__ = "timm.layers"  # of other classes, such a forward does not run
    model = nn.Sequential(nn.LayerNorm(64), ResponseNorm(), nn.LayerNorm(64))
    report = torchquant.replace_norms_(model)
    assert [row.action for row in report.norms] == ["replaced", "left", "replaced"]
    assert report.norms[1].reason == (
        f"a probe of it failed ({error.__name__}: too many indices, 3)"
    )


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
    first, cls = model[0], type(model[0])
    report = torchquant.replace_norms_(model)
    assert model[0] is first
    assert type(first) is cls
    assert report.norms[0].reason == "already a norm of torchquant"
    assert report.replaced == ()


def test_filter() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    report = torchquant.replace_norms_(model, lambda _, name: name == "1")
    assert [norm.reason for norm in report.norms] == ["filter_fn", ""]
    assert type(model[0]) is nn.LayerNorm


def test_the_model_itself_may_be_a_norm() -> None:
    norm = nn.LayerNorm(8)
    assert len(torchquant.replace_norms_(norm).replaced) == 1
    assert len(torchquant.restore_norms_(norm).restored) == 1
    assert type(norm) is nn.LayerNorm


def test_a_replaced_norm_adds_the_residual() -> None:
    model = nn.Sequential(nn.LayerNorm(64))
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    expected = model[0](x + y)
    torchquant.replace_norms_(model)
    torch.testing.assert_close(model[0](x, residual=y), expected)
    assert torch.equal(model[0](x, residual=None), model[0](x))
    wide = model[0].double()(x.double(), residual=y.double())
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("training", [False, True])
def test_undo_gives_the_same_bits(training: bool) -> None:
    model = nn.Sequential(Block(LlamaRMSNorm(64)), Block(GemmaRMSNorm(64)), Block(nn.LayerNorm(64)))
    model.train(training)
    x = torch.randn(5, 64)
    expected, classes = model(x), [type(module) for module in model.modules()]
    attributes = [dict(module.__dict__) for module in model.modules()]
    assert len(torchquant.replace_norms_(model).replaced) == 3
    assert not torch.equal(model(x), expected)
    report = torchquant.restore_norms_(model)
    assert [row.action for row in report.norms] == ["restored"] * 3
    assert report.norms == report.restored
    assert report.summary() == "3 of 3 norms restored"
    assert [type(module) for module in model.modules()] == classes
    assert [dict(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(model(x), expected)
    assert torchquant.restore_norms_(model).norms == ()


def test_to_float_restores_norms() -> None:
    model = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256))
    torchquant.replace_norms_(model)
    torchquant.quantize_(model)
    report = torchquant.to_float_(model)
    assert type(model[0]) is nn.LayerNorm
    assert "1 norm has its own forward again." in report.notes


def test_the_random_state_stays() -> None:
    before = torch.get_rng_state()
    torchquant.replace_norms_(nn.Sequential(LlamaRMSNorm(8)))
    torch.set_rng_state(before)
    norm = LlamaRMSNorm(8)
    state = torch.get_rng_state()
    torchquant.replace_norms_(nn.Sequential(norm, nn.LayerNorm(8)))
    assert torch.equal(torch.get_rng_state(), state)


def test_looks_like_a_norm() -> None:
    class Scale(nn.LayerNorm):
        pass

    assert looks_like_a_norm(GemmaRMSNorm(8))
    assert looks_like_a_norm(Scale(8))
    assert not looks_like_a_norm(nn.Sequential(nn.LayerNorm(8)))


@pytest.mark.parametrize("verb", [torchquant.replace_norms_, torchquant.restore_norms_])
def test_the_model_must_be_a_module(verb: object) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        verb(3)  # type: ignore[operator]


def test_filter_fn_must_be_callable() -> None:
    with pytest.raises(TypeError, match="filter_fn must be a function"):
        torchquant.replace_norms_(nn.Sequential(), "all")  # type: ignore[arg-type]


def test_blocks_share_a_line() -> None:
    model = nn.ModuleList([Block(nn.LayerNorm(64)) for _ in range(3)])
    report = torchquant.replace_norms_(model)
    assert [line.names for line in report.lines()] == [("{0..2}.first",)]
    assert report.summary() == "3 of 3 norms replaced"
