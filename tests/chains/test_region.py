"""Regions of prepared and converted models: bits, copies, hooks, changes, gradients."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.chain_models import (
    IMAGE_MODELS,
    Functional,
    Gated,
    Sequence,
    Shared,
    UNet,
)
from support.chains import converted, plain
from torch import Tensor, nn

import torchquant
from torchquant import functional, ops
from torchquant.chains import region as region_module
from torchquant.convert.regions import regions_in


@pytest.fixture
def only_interpreter(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches programs off, and on again."""
    allowed = region_module.may_use_kernels

    def switch(off: bool) -> None:
        monkeypatch.setattr(
            region_module, "may_use_kernels", (lambda inputs: False) if off else allowed
        )

    return switch


@pytest.mark.parametrize("cls", [*IMAGE_MODELS, Sequence])
def test_programs_have_the_bits_of_the_interpreter(
    cls: Callable[[], nn.Module], only_interpreter: Callable[[bool], None]
) -> None:
    model, x, wanted = converted(cls)
    for layout in (torch.contiguous_format, torch.channels_last):
        for batch in (x, x[:1], x * 3):
            if batch.dim() == 4:
                batch = batch.contiguous(memory_format=layout)
            with torch.no_grad():
                only_interpreter(True)
                slow = plain(model(batch))
                only_interpreter(False)
                fast = plain(model(batch))
            assert torch.equal(fast, slow)
    with torch.no_grad():
        got = plain(model(x))
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_there_is_a_program() -> None:
    model, x, _ = converted(Functional)
    with torch.no_grad():
        model(x)
    (region,) = regions_in(model)
    programs = region._programs
    assert programs is not None and programs.ready
    assert sum(program is not None for _, program in programs.items) == 1


def test_a_chain_equals_its_layers_one_by_one() -> None:
    """The values of a chain, computed with public operators and the layers alone."""
    model, x, _ = converted(Shared)
    (region,) = regions_in(model)
    assert region.plan is not None
    # The input; what the shared convolution reads; what is averaged; the averages.
    assert len(region.plan.edges) == 4

    def rounded(value: Tensor, edge: int) -> Tensor:
        scale, zero_point = model.chain_scale[edge : edge + 1], model.chain_zero_point[edge]
        return ops.fake_quantize(value, scale, zero_point.reshape(1))

    with torch.no_grad():
        y = rounded(torch.relu(model.stem(rounded(x, 0))), 1)
        y = rounded(torch.relu(model.conv(y)), 1)
        y = rounded(torch.relu(model.conv(y)), 2)
        scale, zero_point = region.edge_qparams(2)
        q = functional.quantize(y, scale, zero_point, dtype=torch.int8)
        y = functional.int8_adaptive_avg_pool(q, scale, zero_point, 1)
        wanted = model.fc(rounded(y.flatten(1), 3))
        assert torch.equal(model(x), wanted)
    assert torch.equal(model.conv.input_scale, model.chain_scale[1:2])


def test_residuals_are_added_before_rounding() -> None:
    model, *_ = converted(Gated)
    (region,) = regions_in(model)
    assert region.plan is not None
    residuals = [group for group in region.plan.groups.values() if group.residual is not None]
    assert not residuals  # here the second summand is a product, not a layer
    kinds = [
        type(region.plan.operations[group.calls[0]]).__name__
        for group in region.plan.groups.values()
    ]
    assert kinds.count("Mul") == 1 and kinds.count("Add") == 1


def test_hooks_see_the_same_values() -> None:
    model, x, _ = converted(Functional)
    with torch.no_grad():
        wanted = model(x)
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output.clone())
        )
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
    assert seen.keys() == {name for name, _ in model.named_modules() if name}
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
        alone = model.fc(model(x).new_zeros(1, 16))
    assert alone.shape == (1, 10)


def test_a_hook_of_the_root_runs_and_keeps_the_program() -> None:
    model, x, _ = converted(Functional)
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(1))
    with torch.no_grad():
        model(x)
    (region,) = regions_in(model)
    assert calls == [1] and region._programs is not None and region._programs.ready


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict", "file"])
def test_copies(way: str, tmp_path: Any) -> None:
    model, x, _ = converted(UNet)
    with torch.no_grad():
        wanted = model(x)
    if way == "deepcopy":
        other: Any = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "file":
        torchquant.save(model, tmp_path / "model.safetensors")
        other = torchquant.load(tmp_path / "model.safetensors", UNet().eval())
    else:
        other = copy.deepcopy(model)
        other.chain_scale.mul_(2)
        other.load_state_dict(model.state_dict())
    (region,) = regions_in(other)
    assert region.root is other
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(other(x), wanted)
        other.chain_scale.mul_(1.5)
        assert not torch.equal(other(x), wanted)
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("cls", [Functional, Gated, UNet])
def test_gradients_are_those_of_the_interpreter(
    cls: Callable[[], nn.Module], only_interpreter: Callable[[bool], None]
) -> None:
    model, x, _ = converted(cls)
    x.requires_grad_()
    with torch.no_grad():
        wanted = plain(model(x))
    plain(model(x))  # the first call shows which results require gradients; the others run programs
    grads = []
    for off in (False, True):
        only_interpreter(off)
        model.zero_grad()
        x.grad = None
        got = plain(model(x))
        assert torch.equal(got, wanted)
        got.square().sum().backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        grads.append({"x": x.grad, **named})
    fast, slow = grads
    assert fast.keys() == slow.keys() and len(fast) > 2
    for name in fast:
        assert torch.equal(fast[name], slow[name]), name
        assert fast[name].abs().sum() > 0


def test_without_anything_to_train_no_graph_is_built() -> None:
    model, x, _ = converted(Functional)
    model.requires_grad_(False)
    assert not model(x).requires_grad


def test_nan_stays_in_its_sample() -> None:
    model, x, _ = converted(Functional)
    with torch.no_grad():
        wanted = model(x)
        x[1, 0, 3, 3] = float("nan")
        got = model(x)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], wanted[[0, 2]])


def test_half_precision_keeps_the_scales() -> None:
    model, x, _ = converted(Functional)
    scale = model.chain_scale.clone()
    with torch.no_grad():
        wanted = model(x)
        rough = model.to(torch.bfloat16)(x.bfloat16())
        assert rough.dtype == torch.bfloat16
        model.float()
        assert torch.equal(model.chain_scale, scale)
        got = model(x)
    assert (got - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.slow
def test_compiled_models_have_the_same_bits() -> None:
    model, x, _ = converted(Gated)
    with torch.no_grad():
        wanted = model(x)["out"]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x)["out"], wanted)
