"""Forwards that one program runs, without Python in between, with the bits of the interpreter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits
from support.chain_models import conv_norm, images, with_statistics
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.chains import region as region_module
from torchquant.chains.operations import Affine, Channels, Norm
from torchquant.chains.schedule import Segment
from torchquant.configs import (
    Float,
    QuantizationConfig,
    Static,
    Weights,
    config_from_dict,
    config_to_dict,
)
from torchquant.convert.regions import regions_in

CONFIG = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")


def calibrated(model: nn.Module, x: Tensor, config: Any = CONFIG) -> Any:
    """The region of a converted model."""
    torchquant.prepare_(model, config)
    torchquant.calibrate(model, [x])
    torchquant.convert_(model)
    (region,) = regions_in(model)
    return region


def python_calls(region: Any) -> list[str]:
    """What runs between programs."""
    calls = region.trace.calls
    return [
        calls[item].target
        for item, _ in region._programs.items
        if isinstance(item, int) and calls[item].kind not in ("input", "tensor")
    ]


def check(
    model: nn.Module, *inputs: Tensor, monkeypatch: pytest.MonkeyPatch, config: Any = CONFIG
) -> Any:
    """One program, the interpreter's bits for every input, close to the float model."""
    with_statistics(model)
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
        region = calibrated(model, inputs[0], config)
        fast = [model(x) for x in inputs]
        for x in inputs:
            assert region._programs.run([x]) is not region_module.REFUSED
        segments = [item for item, _ in region._programs.items if isinstance(item, Segment)]
        assert len(segments) == 1 and not python_calls(region)
        with monkeypatch.context() as patch:
            patch.setattr(region_module, "may_use_kernels", lambda inputs: False)
            for x, got, want in zip(inputs, fast, wanted, strict=True):
                assert_same_bits(model(x), got)
                assert (got - want).norm() < 0.15 * want.norm()
    return region


class Written(nn.Module):
    """A convolution, some calls on its result, and a convolution."""

    def __init__(self, between: Callable[[Any, Tensor], Any], outputs: int = 16) -> None:
        super().__init__()
        self.between = between
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.gamma = nn.Parameter(torch.randn(16, 1, 1))
        self.one = nn.Parameter(torch.randn(1))
        self.register_buffer("row", torch.randn(16))
        self.layer_norm, self.shuffle = nn.LayerNorm(16), nn.ChannelShuffle(2)
        self.head = nn.Conv2d(outputs, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, self.stem(x)))


def shuffled(self: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return torch.transpose(x.view(n, 4, c // 4, h, w), 1, 2).contiguous().view(n, -1, h, w)


def reshaped(self: Any, x: Tensor) -> Tensor:
    b, c = x.shape[0], x.shape[1]
    return x.reshape(b, 2, c // 2, x.shape[2], x.shape[3]).permute(0, 2, 1, 3, 4).reshape(x.shape)


def halves(self: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.cat([b, F.relu(a)], 1)


def split(self: Any, x: Tensor) -> Tensor:
    a, b, c = torch.split(x, [4, 4, 8], 1)
    return torch.cat((c, b + a, x[:, :4], x.narrow(1, 2, 3)), dim=1)[:, 1:17]


WAYS: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "view, transpose, view": (shuffled, 16),
    "reshape, permute, reshape": (reshaped, 16),
    "nn.ChannelShuffle": (lambda self, x: self.shuffle(x), 16),
    "chunk": (halves, 16),
    "split": (split, 16),
    "slices": (lambda self, x: torch.cat((x[:, 8:], x[:, :8]), 1), 16),
    "flip": (lambda self, x: x.flip(1), 16),
    "batch norm": (lambda self, x: F.relu(self.norm(F.relu(x))), 16),
    "gamma": (lambda self, x: self.gamma * x + x, 16),
    "row.view": (lambda self, x: x - self.row.view(1, -1, 1, 1), 16),
    "one": (lambda self, x: F.silu(x * self.one), 16),
    "numbers": (lambda self, x: (3 - x) * 0.5 + 1 + x / 4, 16),
    "crop": (lambda self, x: x[:, :, 1:-1, 2:], 16),
    "crop with dots": (lambda self, x: x[..., 3:20], 16),
    "F.pad": (lambda self, x: F.pad(x, (1, 2, 0, 1)), 16),
    "pixel shuffle": (lambda self, x: F.pixel_shuffle(x, 2), 4),
    "pixel unshuffle": (lambda self, x: F.pixel_unshuffle(x, 2), 64),
    "adaptive max pool": (lambda self, x: F.adaptive_max_pool2d(x, (3, 2)), 16),
    "layer norm": (
        lambda self, x: self.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x,
        16,
    ),
    "F.layer_norm": (
        lambda self, x: F.layer_norm(x.permute(0, 2, 3, 1), (16,), self.row, None, 1e-6).permute(
            0, 3, 1, 2
        ),
        16,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_calls_between_convolutions(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    between, outputs = WAYS[way]
    torch.manual_seed(0)
    sizes = images(2), images(3, 24), images(1, 16)
    check(Written(between, outputs), *sizes, monkeypatch=monkeypatch)


class Dense(nn.Module):
    """DenseNet's order: the norm comes first and reads all that was made before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(4))
        self.last, self.head = nn.BatchNorm2d(48), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.max_pool2d(F.relu(self.stem(x)), 2)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)))))
        x = F.relu(self.last(torch.cat(parts, 1)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Shuffled(nn.Module):
    """ShuffleNet's unit three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_norm(3, 16), nn.Linear(16, 8)
        self.branches = nn.ModuleList(
            nn.Sequential(
                *(conv_norm(8, 8, 1), nn.ReLU(), conv_norm(8, 8, groups=8)),
                *(conv_norm(8, 8, 1), nn.ReLU()),
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for branch in self.branches:
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, branch(right)), dim=1)
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(x.mean([2, 3]))


class Next(nn.Module):
    """ConvNeXt's block: a linear layer on pixels, a number for each channel, an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spatial = nn.Conv2d(3, 64, 4, stride=4), nn.Conv2d(64, 64, 3, padding=1)
        self.norm, self.last = nn.LayerNorm(64), nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.scale = nn.Parameter(torch.rand(64, 1, 1))
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
            y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
            x = x + self.scale * y
        return self.head(self.last(x.mean([2, 3])))


class Returned(nn.Module):
    """Float sums, pools and rows that are results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y = F.relu(self.second(y) + y)
        return F.avg_pool2d(y, 2).mean([2, 3])


@pytest.mark.parametrize("cls", [Dense, Shuffled, Next, Returned])
def test_blocks(cls: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    region = check(cls(), images(2), images(5, 40), images(1), monkeypatch=monkeypatch)
    kinds = {Dense: Affine, Shuffled: Channels, Next: Norm}
    if cls in kinds:
        assert any(isinstance(operation, kinds[cls]) for operation in region.plan.operations)


def test_parts_of_concatenations_share_a_scale() -> None:
    torch.manual_seed(0)
    dense = calibrated(with_statistics(Dense()), images(2)).plan
    concats = [i for i, op in enumerate(dense.operations) if type(op).__name__ == "Concat"]
    assert len({dense.edge_of[index] for index in concats}) == 1
    assert not dense.points.intersection(concats)  # their parts are rounded


def test_values_that_no_layer_sees_are_observed() -> None:
    """Half of a value goes through a branch; the scale holds the other half, too."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(4, 4, 1)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.stem(x).chunk(2, 1)
            return self.head(torch.cat((a, F.relu(self.branch(b))), 1))

    model = Half().eval()
    with torch.no_grad():
        model.stem.weight[:4] *= 100
        x = images(2)
        greatest = model.stem(x).abs().max()
        region = calibrated(model, x)
        plan = region.plan
        edge = plan.layers["branch"]
        assert float(region.edge_qparams(edge)[0]) * 255 >= greatest


def test_a_parameter_that_changes() -> None:
    torch.manual_seed(0)
    model: Any = with_statistics(Written(WAYS["gamma"][0]))
    x = images(2)
    with torch.no_grad():
        calibrated(model, x)
        before = model(x)
        model.gamma.mul_(2)
        after = model(x)
        assert not torch.equal(before, after)
        region = regions_in(model)[0]
        assert_same_bits(region._interpreted([x]), after)
        model.norm.running_mean.add_(1)
        assert_same_bits(model(x), after)  # this forward does not read it


def test_a_batch_norm_that_changes() -> None:
    torch.manual_seed(0)
    model: Any = with_statistics(Written(WAYS["batch norm"][0]))
    x = images(2)
    with torch.no_grad():
        region = calibrated(model, x)
        before = model(x)
        model.norm.running_mean.add_(1)
        after = model(x)
        assert not torch.equal(before, after)
        assert_same_bits(region._interpreted([x]), after)


def test_gradients_reach_the_numbers() -> None:
    for name in ("batch norm", "gamma", "layer norm"):
        torch.manual_seed(0)
        model: Any = with_statistics(Written(WAYS[name][0]))
        x = images(1)
        calibrated(model, x)
        parameter = {"batch norm": model.norm.weight, "gamma": model.gamma}.get(
            name, model.layer_norm.weight
        )
        model(x).sum().backward()
        assert parameter.grad is not None and bool((parameter.grad != 0).any())


@pytest.mark.parametrize("cls", [Dense, Shuffled])
def test_other_weights(cls: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bits, and linear layers with zero points."""
    torch.manual_seed(0)
    config = QuantizationConfig(Weights(8), Static(bits=8, symmetric=True))
    check(cls(), images(2), monkeypatch=monkeypatch, config=config)


# ---------------------------------------------------------------- the output of a layer


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return F.relu(self.second(y) + y)


def test_an_output_that_is_int8() -> None:
    """The result of the region is rounded, because the configuration of the last layer says so."""
    part = Static(bits=4, symmetric=True)
    last = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax", output=part)
    model, x = Two().eval(), images(2)
    with torch.no_grad():
        region = calibrated(model, x, {"second": last, "first": CONFIG})
        assert len(region.plan.edges) == 3 and part in region.plan.edges
        y = model(x)
        assert_same_bits(region._interpreted([x]), y)
        assert len(y.unique()) <= 15


def test_an_output_that_is_float() -> None:
    first = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax", output=Float())
    model, x = Two().eval(), images(2)
    with torch.no_grad():
        torchquant.prepare_(model, {"first": first, "second": CONFIG})
        torchquant.calibrate(model, [x])
        report = torchquant.convert_(model)
        (region,) = regions_in(model)
        assert region.plan.dropped == {
            "second": "it reads the output of first, which is configured as float"
        }
        y = model(x)
        assert_same_bits(region._interpreted([x]), y)
        assert python_calls(region) == ["second"]
    reasons = {one.reason for one in report.regions[0].breaks}
    assert "the output of first is configured as float" in reasons
    assert "second: it reads the output of first, which is configured as float" in reasons


def test_outputs_that_do_not_fit() -> None:
    other = torchquant.Int8StaticActivationInt8WeightConfig(output=Static(bits=4))
    model, x = Two().eval(), images(2)
    with torch.no_grad():
        region = calibrated(model, x, {"first": other, "second": CONFIG})
    assert region.plan.dropped == {
        "second": "it reads the value of first, which has other activations"
    }


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x)) + self.head(self.second(x))


def test_outputs_that_contradict_each_other() -> None:
    """One layer reads both."""
    configs = {
        name: torchquant.Int8StaticActivationInt8WeightConfig(output=Static(bits=bits))
        for name, bits in (("first", 8), ("second", 4))
    }
    model: Any = Joined().eval()
    torchquant.prepare_(model, {**configs, "head": CONFIG})
    with pytest.raises(ValueError, match="the outputs of first and second share a scale"):
        torchquant.calibrate(model, [images(2)])


@pytest.mark.parametrize("output", [8, "int8", Static])
def test_an_output_that_is_no_part(output: Any) -> None:
    with pytest.raises(TypeError, match="output must be None, Static"):
        torchquant.Int8StaticActivationInt8WeightConfig(output=output)


def test_an_output_needs_static_activations() -> None:
    with pytest.raises(ValueError, match="output must be None unless activations are Static"):
        QuantizationConfig(output=Float())


@pytest.mark.parametrize("output", [None, Float(), Static(bits=4)])
def test_outputs_in_files(output: Any, tmp_path: Path) -> None:
    config = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax", output=output)
    assert config_from_dict(config_to_dict(config)) == config
    assert ("output" in config_to_dict(config)) == (output is not None)
    torch.manual_seed(0)
    model, other, x = Two().eval(), Two().eval(), images(2)
    with torch.no_grad():
        calibrated(model, x, {"second": config, "first": CONFIG})
        torchquant.save(model, tmp_path / "model")
        torchquant.load(tmp_path / "model", other)
        assert_same_bits(other(x), model(x))
        plan, wanted = (regions_in(one)[0].plan for one in (other, model))
        assert (plan.edges, plan.points) == (wanted.edges, wanted.points)
