"""A converted model that somebody changes, in any way that its forward can notice."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.chains import CONFIG
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.chains.guard import Expected
from torchquant.chains.region import RegionForward
from torchquant.convert.regions import regions_in
from torchquant.graph import purity

OFFSET = 0.0
NAMES = ["a"]


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


class Block(nn.Module):
    kind = "block"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = conv(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Net(nn.Module):
    flag = False

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(), nn.Identity())
        self.blocks = nn.ModuleList([Block()])
        self.first = self.second = nn.ReLU()
        self.downsample = None
        self.register_module("extra", None)
        self.last = conv()
        self.sizes = [1]
        self.options = {"a": 1}
        self.config = SimpleNamespace(double=False)
        self.unread = 1

    @property
    def scale(self) -> float:
        return 1.0

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        for block in self.blocks:
            x = block(x)
        if self.flag:
            x = x * 2
        if self.downsample is not None:
            x = self.downsample(x)
        if self.extra is not None:
            x = self.extra(x)
        if self.config.double:
            x = x + x
        if "b" in NAMES or "b" in self.options:
            x = x * 4
        if hasattr(self, "optional"):
            x = x * 5
        x = self.second(self.first(self.activate(x)))
        return self.last(x * len(self.sizes) * self.scale) + OFFSET


def images() -> Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def original() -> Net:
    """A converted model; its forward may use all of Python, as those of known libraries may."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(purity, "_TRACED_LIBRARIES", ("torch", __name__.partition(".")[0]))
        torch.manual_seed(0)
        net = Net().eval()
        torchquant.prepare_(net, CONFIG, filter_fn=lambda module, name: True)
        torchquant.calibrate(net, [images()])
        torchquant.convert_(net)
    return net


@pytest.fixture
def model(original: Net) -> Net:
    (region,) = regions_in(original)
    net = copy.deepcopy(original)
    (own,) = regions_in(net)
    own.expected = Expected(net, region.trace)  # not that of a copy
    return net


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Classes and variables are as before after each test."""
    places: list[Any] = [Net, Block, nn.Identity, nn.ReLU]
    before = [dict(vars(place)) for place in places]
    offset, names = OFFSET, list(NAMES)
    yield
    for place, state in zip(places, before, strict=True):
        for name in set(vars(place)) - set(state):
            delattr(place, name)
        for name, value in state.items():
            if vars(place).get(name) is not value:
                setattr(place, name, value)
    globals()["OFFSET"] = offset
    NAMES[:] = names


def twice(x: Tensor) -> Tensor:
    return x * 2


def doubled(self: Any, x: Tensor) -> Tensor:
    return x * 2


class Doubling(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "append": lambda net: net.body.append(nn.Sigmoid()),
    "insert": lambda net: net.body.insert(0, nn.Sigmoid()),
    "extend": lambda net: net.body.extend([nn.Sigmoid()]),
    "delete": lambda net: net.body.__delitem__(1),
    "append to a list": lambda net: net.blocks.append(Block().eval()),
    "insert into a list": lambda net: net.blocks.insert(0, nn.Sigmoid()),
    "inner forward": lambda net: setattr(net.body[0], "forward", twice),
    "forward of a leaf": lambda net: setattr(net.body[1], "forward", twice),
    "forward of a layer": lambda net: setattr(net.last, "forward", twice),
    "forward of a class": lambda net: setattr(Net, "forward", doubled),
    "forward of an inner class": lambda net: setattr(Block, "forward", doubled),
    "forward of a leaf's class": lambda net: setattr(nn.Identity, "forward", doubled),
    "class attribute": lambda net: setattr(Net, "flag", True),
    "attribute over a class attribute": lambda net: setattr(net, "flag", True),
    "attribute over a method": lambda net: setattr(net, "activate", twice),
    "method of a class": lambda net: setattr(Net, "activate", doubled),
    "property": lambda net: setattr(Net, "scale", property(lambda self: 3.0)),
    "value over a property": lambda net: setattr(Net, "scale", 3.0),
    "None set later": lambda net: setattr(net, "downsample", nn.Sigmoid()),
    "registered None set later": lambda net: setattr(net, "extra", nn.Sigmoid()),
    "register_module": lambda net: net.register_module("extra", nn.Sigmoid()),
    "optional attribute": lambda net: setattr(net, "optional", 1),
    "optional child": lambda net: net.register_module("optional", nn.ReLU()),
    "optional buffer": lambda net: net.register_buffer("optional", torch.ones(1)),
    "second name": lambda net: setattr(net, "second", nn.Sigmoid()),
    "first name": lambda net: setattr(net, "first", nn.Sigmoid()),
    "class": lambda net: setattr(net.body[0], "__class__", Doubling),
    "contents of a list": lambda net: net.sizes.append(2),
    "contents of a dictionary": lambda net: net.options.update(b=2),
    "attribute of an attribute": lambda net: setattr(net.config, "double", True),
    "variable": lambda net: globals().update(OFFSET=1.0),
    "contents of a variable": lambda net: NAMES.append("b"),
    "attributes of a layer": lambda net: setattr(net.last, "padding", (0, 0)),
    "other dictionary": lambda net: setattr(
        net.body[0], "__dict__", {**vars(net.body[0]), "forward": twice}
    ),
}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(model: Net, change: str, ran: bool) -> None:
    """The forward of the class runs, and one warning says what was changed."""
    with torch.no_grad():
        if ran:
            model(images())
        CHANGES[change](model)
        with pytest.warns(RuntimeWarning, match=r"^the model: .+ was changed, so the values"):
            got = model(images())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(images()), got)
        assert torch.equal(got, type(model).forward(model, images()))


INSTANCE = [name for name in CHANGES if not any(word in name for word in ("variable", "class"))]


@pytest.mark.parametrize("change", [*INSTANCE, "class attribute", "variable"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("pickled", [False, True])
def test_copies_notice_changes(model: Net, change: str, when: str, pickled: bool) -> None:
    def copied(net: Net) -> Net:
        return pickle.loads(pickle.dumps(net)) if pickled else copy.deepcopy(net)

    with torch.no_grad():
        if when == "before":
            model(images())
            CHANGES[change](model)
            other = copied(model)
        else:
            other = copied(model)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(other(images()), model(images()))
            CHANGES[change](other)
        with pytest.warns(RuntimeWarning, match="was changed"):
            got = other(images())
        assert torch.equal(got, Net.forward(other, images()))


def test_what_nothing_reads_may_change(model: Net) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model(images())
        (region,) = regions_in(model)
        programs = region._programs
        model.unread = 2
        model.another = nn.ReLU()
        model.register_buffer("more", torch.zeros(1))
        Net.unread = 5  # type: ignore[misc]
        del Net.unread
        assert torch.equal(model(images()), wanted)
    assert region._programs is programs


def test_equal_plain_values_are_no_change(model: Net) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model(images())
        model.last.padding = tuple(range(1, 2)) * 2
        assert torch.equal(model(images()), wanted)
        assert isinstance(model.forward, RegionForward)


def test_the_message_names_the_change(model: Net) -> None:
    model.body.append(nn.Sigmoid())
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="a child of Sequential was changed"):
        model(images())
