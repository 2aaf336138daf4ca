"""find_recipe: what is told apart from a plain norm, and what the probe leaves behind."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from support.norms import (
    ChannelsFirstLayerNorm,
    CohereLayerNorm,
    DebertaLayerNorm,
    GatedRMSNorm,
    GemmaRMSNorm,
    LlamaRMSNorm,
    NemotronLayerNorm,
    OlmoLayerNorm,
    T5LayerNorm,
    TimmLayerNorm,
)
from torch import Tensor, nn

from torchquant.nn.norm_probe import find_recipe
from torchquant.nn.norm_recipe import NormRecipe


def recipe_for(norm: nn.Module) -> NormRecipe:
    recipe = find_recipe(norm)
    assert isinstance(recipe, NormRecipe), recipe
    return recipe


@pytest.mark.parametrize(
    ("norm", "family", "one_plus", "cast", "eps"),
    [
        (LlamaRMSNorm(64, 1e-5), "rms", False, True, 1e-5),
        (T5LayerNorm(64), "rms", False, True, 1e-6),
        (GemmaRMSNorm(64), "rms", True, False, 1e-6),
        (nn.RMSNorm(64), "rms", False, False, torch.finfo(torch.float32).eps),
        (nn.RMSNorm(64, eps=1e-3, elementwise_affine=False), "rms", False, False, 1e-3),
        (nn.LayerNorm(64), "layer", False, False, 1e-5),
        (nn.LayerNorm(64, elementwise_affine=False), "layer", False, False, 1e-5),
        (TimmLayerNorm(64, eps=1e-6), "layer", False, False, 1e-6),
        (NemotronLayerNorm(64), "layer", True, False, 1e-5),
        (CohereLayerNorm(64), "layer", False, False, 1e-6),
        (OlmoLayerNorm(64), "layer", False, False, 1e-5),
        (DebertaLayerNorm(64), "layer", False, False, 1e-12),
        (GatedRMSNorm(64), "rms", False, True, 1e-6),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_formulas(norm: nn.Module, family: str, one_plus: bool, cast: bool, eps: float) -> None:
    recipe = recipe_for(norm)
    assert (recipe.family, recipe.one_plus) == (family, one_plus)
    assert (recipe.cast_before_weight, recipe.eps) == (cast, eps)
    in_float32 = {key[3:] for key in recipe.calls if key[0] == torch.float32}
    assert in_float32 == {(rank, mode) for rank in (1, 2, 3, 4, 5) for mode in (False, True)}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_values_of_the_parameters_do_not_matter(value: float) -> None:
    """Weights of 1, or of 0 in Gemma, would hide what the weight does."""
    gemma, llama = GemmaRMSNorm(64), LlamaRMSNorm(64)
    for norm in (gemma, llama):
        nn.init.constant_(norm.weight, value)
    assert recipe_for(gemma).one_plus
    assert not recipe_for(llama).one_plus


class Branch(LlamaRMSNorm):
    """An RMSNorm, doubled where ``condition`` is true."""

    def condition(self, x: Tensor) -> bool:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        result = super().forward(hidden_states)
        return result * 2 if self.condition(hidden_states) else result


class InTrainingNorm(Branch):
    def condition(self, x: Tensor) -> bool:
        return self.training


class InEvaluationNorm(Branch):
    def condition(self, x: Tensor) -> bool:
        return not self.training


class FourDimensionsNorm(Branch):
    def condition(self, x: Tensor) -> bool:
        return x.dim() == 4


class ChannelsNorm(Branch):
    def condition(self, x: Tensor) -> bool:
        return x.dim() == 3 and x.shape[1] == 64


class RecordingNorm(Branch):
    def condition(self, x: Tensor) -> bool:
        return self.training and torch.is_grad_enabled()


class HalfNorm(Branch):
    def condition(self, x: Tensor) -> bool:
        return x.dtype == torch.bfloat16


class ClampingNorm(Branch):
    def condition(self, x: Tensor) -> bool:
        return bool(x.abs().amax() > 5e3)


@pytest.mark.parametrize(
    ("norm", "missing", "remark"),
    [
        (InTrainingNorm(64), lambda key: key[4], "calls in training mode run its own forward"),
        (RecordingNorm(64), lambda key: key[4], "calls in training mode run its own forward"),
        (
            FourDimensionsNorm(64),
            lambda key: key[3] == 4,
            "calls of 4-dimensional input run its own forward",
        ),
        (
            ChannelsNorm(64),
            lambda key: key[3] == 3,
            "calls of 3-dimensional input run its own forward",
        ),
        (HalfNorm(64), lambda key: key[0] == torch.bfloat16, ""),
        (GatedRMSNorm(64), lambda key: False, "calls with gate run its own forward"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_branches_are_left_to_the_norm(norm: nn.Module, missing: Any, remark: str) -> None:
    recipe = recipe_for(norm)
    assert recipe.calls
    assert not [key for key in recipe.calls if missing(key)]
    assert recipe.remark == remark


def test_values_out_of_the_ordinary_are_tried() -> None:
    assert find_recipe(ClampingNorm(64)) == (
        "its forward gives other values than a LayerNorm or an RMSNorm over the last dimension"
    )


class CountingNorm(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.calls: Any = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(hidden_states)


class ListingNorm(CountingNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.calls = {"sizes": []}

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls["sizes"].append(hidden_states.shape)
        return LlamaRMSNorm.forward(self, hidden_states)


class ClassCountingNorm(LlamaRMSNorm):
    calls: ClassVar[int] = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(hidden_states)


@pytest.mark.parametrize("cls", [CountingNorm, ListingNorm, ClassCountingNorm])
def test_a_norm_with_a_memory_is_left_and_remembers_nothing(cls: Any) -> None:
    norm = cls(64)
    before = repr(norm.calls)
    assert find_recipe(norm) == "its forward may do more than compute, so it was not run"
    assert repr(norm.calls) == before


def test_a_library_s_norm_with_a_memory_is_left_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of norms of known libraries run; what a run changes in the copy is seen."""
    monkeypatch.setattr(CountingNorm, "__module__", "timm.made_up")
    norm = CountingNorm(64)
    before = repr(norm.calls)
    assert find_recipe(norm) == "its forward changes the module (calls)"
    assert repr(norm.calls) == before


class InPlaceNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.copy_(super().forward(hidden_states))


class DetachedNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.detach())


class NoisyNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        torch.rand(1)
        return super().forward(hidden_states)


class BufferNorm(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.register_buffer("scale", torch.ones(()))


class NeedyNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states)


class HoldingNorm(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        object.__setattr__(self, "parent", nn.Linear(2, 2))


class SuperNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        result: Tensor = super(type(self), self).forward(hidden_states)
        return result


class MatrixNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4, 16)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class ResponseNorm(nn.Module):
    """The GlobalResponseNorm of timm's ConvNeXt V2; it takes [B, H, W, C] only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight, self.bias = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.norm(p=2, dim=(1, 2), keepdim=True)
        scale = mean / (mean.mean(-1, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias, self.weight, x * scale)


class ChannelsFirstRMSNorm(LlamaRMSNorm):
    """timm's RmsNorm2d: its output has its input's strides, and not those of a transposed one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.pow(2).mean(dim=1, keepdim=True)
        scaled = hidden_states * torch.rsqrt(mean + self.variance_epsilon)
        return scaled * self.weight.reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (InPlaceNorm(64), "its forward changes its input"),
        (DetachedNorm(64), "its forward gives other values than"),
        (InEvaluationNorm(64), "its forward gives other values than"),
        (NoisyNorm(64), "its forward gives other values than"),
        (BufferNorm(64), "it has buffers, which its forward may read or change"),
        (NeedyNorm(64), "its forward needs gate and scale besides the input"),
        (HoldingNorm(64), "it refers to another module (parent)"),
        (SuperNorm(64), "its class cannot be derived from: "),
        (MatrixNorm(), "its parameters must have one dimension of one length, not weight [4, 16]"),
        (ResponseNorm(64), "its forward gives other values than a LayerNorm or an RMSNorm over"),
        (ChannelsFirstRMSNorm(64), "its forward gives other values than"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_reasons(norm: nn.Module, reason: str) -> None:
    found = find_recipe(norm)
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_channels_first() -> None:
    recipe = recipe_for(ChannelsFirstLayerNorm(64))
    assert recipe.channels_first
    assert {key[3] for key in recipe.calls} == {4}
    assert recipe.remark == ""


def test_norms_that_differ_in_values_only_are_probed_once() -> None:
    known: dict[Any, NormRecipe | str] = {}
    first = find_recipe(LlamaRMSNorm(64), known)
    assert find_recipe(LlamaRMSNorm(64), known) is first
    assert find_recipe(LlamaRMSNorm(64, 1e-5), known) is not first
    assert find_recipe(LlamaRMSNorm(48), known) is not first
    assert len(known) == 3


def test_the_output_of_a_written_norm_has_its_inputs_strides() -> None:
    assert recipe_for(LlamaRMSNorm(64)).contiguous
    assert not recipe_for(nn.LayerNorm(64)).contiguous
