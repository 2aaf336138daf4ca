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
    images,
    with_statistics,
)
from torch import Tensor, nn

import torchquant
from torchquant import ops
from torchquant.chains import region as region_module
from torchquant.chains.region import RegionForward
from torchquant.convert.regions import regions_in
from torchquant.nn import QuantizedConv2d, QuantizedLinear

CONFIG = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")


def input_of(cls: Any, batch: int = 3) -> Tensor:
    x = images(batch)
    return x.flatten(2)[:, :, :60].contiguous() if cls is Sequence else x


def converted(cls: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Any]:
    """A converted model, an input, and the outputs of the float model."""
    torch.manual_seed(0)
    model, x = with_statistics(cls()), input_of(cls)
    with torch.no_grad():
        wanted = plain(model(x))
    torchquant.prepare_(model, CONFIG)
    torchquant.calibrate(model, [x])
    torchquant.convert_(model)
    return model, x, wanted


def plain(output: Any) -> Tensor:
    result: Tensor = output["out"] if isinstance(output, dict) else output
    return result


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
    assert len(region.plan.edges) == 2  # the input; what the shared convolution reads

    def rounded(value: Tensor, edge: int) -> Tensor:
        scale, zero_point = model.chain_scale[edge : edge + 1], model.chain_zero_point[edge]
        return ops.fake_quantize(value, scale, zero_point.reshape(1))

    with torch.no_grad():
        y = rounded(torch.relu(model.stem(rounded(x, 0))), 1)
        y = rounded(torch.relu(model.conv(y)), 1)
        y = torch.relu(model.conv(y))
        wanted = model.fc(y.mean([2, 3]))
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


def replace_conv(model: Any) -> None:
    model.third = nn.Conv2d(32, 16, 1).eval()


def add_attribute(model: Any) -> None:
    model.third = nn.Sequential(model.third)


def train(model: Any) -> None:
    model.train()


class Dropping(Functional):
    """Its results depend on the mode, at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first.append(nn.Dropout(0.0))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x) if self.training else x)


def train_root(model: Any) -> None:
    model.training = True


def train_dropout(model: Any) -> None:
    model.first[2].train()


@pytest.mark.parametrize("change", [replace_conv, add_attribute, train_root, train_dropout, train])
@pytest.mark.parametrize("copied", [False, True])
def test_changes_are_respected(change: Callable[[Any], None], copied: bool) -> None:
    model, x, _ = converted(Dropping)
    if copied:
        model = copy.deepcopy(model)
    change(model)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match=r"the values between its layers are float"):
            got = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(x), got)  # one warning
            wanted = Dropping.forward(model, x)  # type: ignore[arg-type]
    assert torch.equal(got, wanted)


def test_a_mode_that_nothing_reads_changes_nothing() -> None:
    model, x, _ = converted(Functional)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model(x)
        assert torch.equal(model.train()(x), wanted)
    (region,) = regions_in(model)
    assert region._programs is not None and region._programs.holds()


def test_a_change_that_is_taken_back_is_no_change() -> None:
    model, x, _ = converted(Dropping)
    with torch.no_grad():
        wanted = model(x)
        model.train()
        with pytest.warns(RuntimeWarning, match="training mode"):
            model(x)
        model.eval()
        assert torch.equal(model(x), wanted)


def test_attributes_that_the_forward_reads() -> None:
    class Scaled(Functional):
        factor: float

        def __init__(self) -> None:
            super().__init__()
            self.steps = 1

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.steps):
                x = torch.relu(self.first(x))
            return self.third(torch.cat([x, self.second(x)], 1))

    model, x, _ = converted(Scaled)
    model.steps = 0
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match=r"Scaled.steps was changed"),
        pytest.raises(ValueError, match="channels"),  # as in the forward of the class
    ):
        model(x)


@pytest.mark.parametrize("cls", [Functional, Gated, UNet])
def test_gradients_are_those_of_the_interpreter(
    cls: Callable[[], nn.Module], only_interpreter: Callable[[bool], None]
) -> None:
    model, x, _ = converted(cls)
    x.requires_grad_()
    with torch.no_grad():
        wanted = plain(model(x))
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


def test_other_arguments_run_the_forward_of_the_class() -> None:
    class Optional(Functional):
        def forward(self, x: Tensor, scale: float = 1.0, *, flag: bool = False) -> Tensor:
            x = torch.relu(self.first(x)) * scale
            return self.third(torch.cat([x, self.second(x)], 1))

    model, x, _ = converted(Optional)
    with torch.no_grad():
        usual = model(x)
        assert torch.equal(model(x, 1.0), usual) and torch.equal(model(x=x, flag=False), usual)
        other = model(x, 2.0)
        assert torch.equal(other, Optional.forward(model, x, 2.0))  # type: ignore[arg-type]


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


def test_to_float_removes_regions() -> None:
    model, x, wanted = converted(Functional)
    torchquant.to_float_(model)
    assert not regions_in(model) and "chain_scale" not in model.state_dict()
    with torch.no_grad():
        assert (model(x) - wanted).norm() < 0.05 * wanted.norm()


def test_prepared_models_compute_the_same() -> None:
    model, x = with_statistics(Functional()), images(2)
    with torch.no_grad():
        wanted = model(x)
        torchquant.prepare_(model, CONFIG, example_inputs=x[:1])
        (region,) = regions_in(model)
        assert isinstance(region, RegionForward) and region.plan is not None
        torch.testing.assert_close(model(x), wanted)
        other = copy.deepcopy(model)
        for one in (model, other):
            torchquant.calibrate(one, [x])
            torchquant.convert_(one)
        assert torch.equal(model(x), other(x))
    assert isinstance(model.third, QuantizedConv2d)


def test_layers_without_range_leave_the_region() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
            self.third = nn.Conv2d(16, 16, 3)
            self.second.weight.data.zero_()
            self.second.bias.data.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.third(torch.relu(self.second(torch.relu(self.first(x)))))

    model, x = Zero().eval(), images(2)
    torchquant.prepare_(model, CONFIG)
    with pytest.warns(RuntimeWarning, match="third"):
        torchquant.calibrate(model, [x])
    report = torchquant.convert_(model)
    assert [row.action for row in report.layers] == ["converted", "converted", "skipped"]
    (region,) = regions_in(model)
    assert region.plan is not None and set(region.plan.layers) == {"first", "second"}
    with torch.no_grad():
        assert torch.equal(model(x), model.third.bias.reshape(1, -1, 1, 1).expand(2, 16, 26, 26))


def test_random_calls_stay_random() -> None:
    class Noisy(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nn.functional.dropout(x, 0.5))

    model, x, _ = converted(Noisy)
    (region,) = regions_in(model)
    assert region.plan is not None and len(region.plan.layers) == 3
    with torch.no_grad():
        torch.manual_seed(0)
        first = model(x)
        assert not torch.equal(model(x), first)
        torch.manual_seed(0)
        assert torch.equal(model(x), first)


def test_a_record_with_other_results_is_dropped() -> None:
    class Aliases(Functional):
        """``+=`` changes a tensor under two names; the record knows one of them."""

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = y
            y += 1
            return self.third(torch.cat([z, y], 1))

    model, x = with_statistics(Aliases()), images(2)
    torchquant.prepare_(model, CONFIG)
    torchquant.calibrate(model, [x])
    report = torchquant.convert_(model)
    assert "give other results" in report.regions[0].reason
    assert str(report.regions[0]).startswith("float between the layers of the model (Aliases)")
    assert not regions_in(model) and isinstance(model.third, QuantizedConv2d)
    with torch.no_grad():
        assert torch.equal(model(x), Aliases.forward(model, x))  # type: ignore[arg-type]


def test_float_layers_of_a_region_can_be_quantized_later() -> None:
    model, x, _ = converted(Functional)
    assert type(model.fc) is nn.Linear  # too small to benefit
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model(x)
        torchquant.quantize_(model, filter_fn="fc")
        assert isinstance(model.fc, QuantizedLinear)
        got = model(x)
        assert 0 < (got - wanted).abs().max() < 0.05
        torchquant.to_float_(model)


def test_a_calibration_that_fails_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Functional()), images(2)
    other = copy.deepcopy(model)
    torchquant.prepare_(model, CONFIG)
    (region,) = regions_in(model)
    with pytest.raises(RuntimeError):
        torchquant.calibrate(model, [x, torch.zeros(1, 5, 4, 4)])
    assert region.plan is None and not region.observers and not region.observing
    torchquant.calibrate(model, [x])
    torchquant.prepare_(other, CONFIG)
    torchquant.calibrate(other, [x])
    for one in (model, other):
        torchquant.convert_(one)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_a_second_preparation_covers_all_layers() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Functional()), images(2)
    torchquant.prepare_(model, CONFIG, filter_fn="first.*")
    (first,) = regions_in(model)
    torchquant.prepare_(model, CONFIG, filter_fn=["second.*", "third", "fc"])
    (region,) = regions_in(model)
    assert region is not first
    assert set(region.activations) == {"first.0", "second.0", "third", "fc"}
    torchquant.calibrate(model, [x])
    report = torchquant.convert_(model)
    assert report.regions[0].share == 1.0 and not report.regions[0].breaks


@pytest.mark.slow
def test_compiled_models_have_the_same_bits() -> None:
    model, x, _ = converted(Gated)
    with torch.no_grad():
        wanted = model(x)["out"]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x)["out"], wanted)
