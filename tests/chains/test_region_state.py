"""The scales of a region stay exact, whatever is done to the model that holds them."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chain_models import Functional, images, with_statistics
from support.chains import CONFIG
from torch import Tensor, nn

import torchquant
from torchquant.chains.region import RegionForward
from torchquant.convert.regions import regions_in


@pytest.fixture(scope="module")
def made() -> Any:
    """Two converted models with other scales, all of whose layers are int8, and an input."""
    x, models = images(2), []
    for factor in (1, 3):
        torch.manual_seed(factor)
        model: Any = with_statistics(Functional())
        torchquant.prepare_(model, CONFIG, filter_fn=lambda module, name: True)
        torchquant.calibrate(model, [factor * x])
        torchquant.convert_(model)
        models.append(model)
    model, other = models
    assert not torch.equal(model.chain_scale, other.chain_scale)  # type: ignore[arg-type]
    return model, other, x


def scales(model: Any) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if "scale" in name}


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


STEPS: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "type": lambda model: model.type(torch.float16),
    "parent": lambda model: nn.Sequential(model).bfloat16()[0],
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "share_memory": lambda model: model.share_memory(),
    "float": lambda model: model.float(),
}


@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", ["bfloat16", "deepcopy", "pickle", "parent"])
def test_scales_stay_exact(made: Any, first: str, second: str) -> None:
    model, other, x = made
    with torch.no_grad():
        one = copy.deepcopy(model)
        one(x)
        for step in (first, second, "bfloat16"):
            one = STEPS[step](one)
        wanted = scales(model)
        assert scales(one).keys() == wanted.keys()
        assert all(torch.equal(t, wanted[name]) for name, t in scales(one).items())
        assert {t.dtype for t in scales(one).values()} == {torch.float32}
        one.load_state_dict(other.state_dict())
        one = STEPS[second](one)
        assert all(torch.equal(t, scales(one)[name]) for name, t in scales(other).items())
        exact = copy.deepcopy(other).to(one.third.bias.dtype)
        for parameter, rounded in zip(exact.parameters(), one.parameters(), strict=True):
            parameter.copy_(rounded)  # biases follow .to(dtype)
        assert torch.equal(one(x), exact(x))


def test_a_state_in_another_dtype(made: Any) -> None:
    """Its scales are rounded already; they are float32 again."""
    model, _, x = made
    state = {
        name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()
    }
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    one.load_state_dict(state)
    two.load_state_dict(state, assign=True)
    with torch.no_grad():
        two.third.bias.data = two.third.bias.data.float()
        two.float()
        assert torch.equal(one(x), two(x))
    assert two.chain_scale.dtype == torch.float32
    assert torch.equal(one.chain_scale, two.chain_scale)


def test_files_hold_exact_scales(made: Any, tmp_path: Path) -> None:
    model, _, x = made
    low = copy.deepcopy(model).bfloat16()
    torchquant.save(low, tmp_path / "model.safetensors")
    loaded = torchquant.load(tmp_path / "model.safetensors", Functional().eval())
    assert torch.equal(loaded.chain_scale, model.chain_scale)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(loaded(x), low(x))


def test_replicas_have_regions_of_their_own(made: Any) -> None:
    """As torch.nn.parallel.replicate makes them; here with other layers on the same device."""
    model, other, x = made
    original = copy.deepcopy(model)
    replica = original._replicate_for_data_parallel()
    for name, child in other.named_children():
        setattr(replica, name, child)
    replica._buffers = dict(other._buffers)
    (region,) = regions_in(replica)
    assert region.root is replica and original.forward.root is original
    with torch.no_grad():
        assert torch.equal(replica(x), other(x))
        assert torch.equal(original(x), model(x))
    replica.bfloat16()
    assert original.third.bias.dtype == torch.float32


def test_a_replica_of_a_changed_model_runs_the_class(made: Any) -> None:
    model = copy.deepcopy(made[0])
    model.third = nn.Identity()
    with pytest.warns(RuntimeWarning, match="was changed"):
        replica = model._replicate_for_data_parallel()
    assert "forward" not in vars(replica)


def test_to_float_gives_the_methods_of_the_class_back(made: Any) -> None:
    own = {"forward", "_apply", "_replicate_for_data_parallel"}
    model = copy.deepcopy(made[0])
    assert own <= vars(model).keys()
    torchquant.to_float_(model)
    assert not own & vars(model).keys()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_have_regions(wrap: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Functional()), images(2)
    wrapped = wrap(model)
    plain = copy.deepcopy(model)
    report = torchquant.prepare_(wrapped, CONFIG)
    assert [one.action for one in report.regions if one.kind == "Functional"] == ["found"]
    torchquant.prepare_(plain, CONFIG)
    torchquant.calibrate(model, [x])
    torchquant.calibrate(plain, [x])
    torchquant.convert_(wrapped)
    torchquant.convert_(plain)
    assert isinstance(model.forward, RegionForward)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_other_parameters_in_a_functional_call(made: Any) -> None:
    model, _, x = made
    changed = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        for parameter in changed.parameters():
            parameter.add_(1)
        parameters = {name: p.detach() for name, p in changed.named_parameters()}
        got = torch.func.functional_call(model, parameters, (x,))
        assert torch.equal(got, changed(x)) and not torch.equal(got, before)
        assert torch.equal(model(x), before)
