"""What the verbs do with regions and say about them."""

import warnings
from typing import Any

import pytest
import torch
from support.chain_models import Decides, Functional, images, with_statistics
from support.chains import CONFIG, converted
from support.processes import in_processes
from support.regions_in_processes import Branch, convert_in_process
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.convert.regions import regions_in


def everything(module: nn.Module, name: str) -> bool:
    return True


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, values: Any, flag: bool = False) -> Tensor:
        return self.second(F.relu(self.first(values[0] if flag else values)))


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()


def reasons(model: nn.Module, x: Tensor) -> dict[str, str]:
    torchquant.prepare_(model, CONFIG, filter_fn=everything)
    torchquant.calibrate(model, [x])
    return {one.name: one.reason for one in torchquant.convert_(model).regions}


def test_arguments_that_are_no_tensors_are_named() -> None:
    class Lists(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 1e9 else self.head([x], flag=True)

    class Flags(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 1e9 else self.head(x[None], flag=True)

    found = reasons(Lists().eval(), images(2))
    assert found["head"] == "its argument values was no tensor but list"
    found = reasons(Flags().eval(), images(2))
    assert found["head"] == "its argument flag had another value than the default"


def test_the_report_of_convert_names_the_modules_that_are_no_region() -> None:
    torch.manual_seed(0)
    model = with_statistics(Decides())
    prepared = torchquant.prepare_(model, CONFIG)
    refused = [one for one in prepared.regions if one.action == "float"]
    assert refused and refused[0].name == ""
    torchquant.calibrate(model, [images(2)])
    report = torchquant.convert_(model)
    assert [one for one in report.regions if one.action == "float"] == refused
    assert any(one.action == "int8" for one in report.regions)
    again = torchquant.prepare_(with_statistics(Decides()), CONFIG)
    assert [one for one in again.regions if one.action == "float"] == refused


def test_integers_that_the_forward_converts_run_in_programs() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x.float() / 255)))

    torch.manual_seed(0)
    model: Any = Pixels().eval()
    x = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    torchquant.prepare_(model, CONFIG, filter_fn=everything)
    torchquant.calibrate(model, [x])
    torchquant.convert_(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model(x)
        (region,) = regions_in(model)
        assert region._programs is not None and region._programs.run([x]) is not None
        assert torch.equal(got, region._interpreted([x]))
        assert torch.equal(model(x.to(torch.int64)), got)
        assert torch.equal(model(x.to(torch.bfloat16)), got)
    y = model(x)
    y.sum().backward()
    assert model.first.bias.grad is not None


def test_inputs_of_low_precision_are_slower_and_say_so() -> None:
    torch.manual_seed(0)
    model, x = Branch().eval(), images(2)
    torchquant.prepare_(model, CONFIG, filter_fn=everything)
    torchquant.calibrate(model, [x])
    torchquant.convert_(model)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match=r"^the model: the input is bfloat16, so the calls"):
            got = model(x.bfloat16())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(x.bfloat16()), got)
        (region,) = regions_in(model)
        assert torch.equal(got, region._interpreted([x.bfloat16()]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.int64])
def test_inputs_of_other_types_are_refused_by_the_layer(dtype: torch.dtype) -> None:
    model, x, _ = converted(Functional)
    with torch.no_grad(), pytest.raises(TypeError) as raised:
        model(x.to(dtype))
    with torch.no_grad(), pytest.raises(TypeError) as alone:
        Functional.forward(model, x.to(dtype))  # type: ignore[arg-type]
    assert str(raised.value) == str(alone.value)


# ---------------------------------------------------------------- processes


def test_processes_agree_on_their_regions() -> None:
    """One process sees no batch of a region; then, their models are not the same."""
    first, second = in_processes(convert_in_process)
    wanted = first["all"]
    for one in (first["one"], second["one"], second["all"]):
        assert one["regions"] == wanted["regions"]
        assert ("sometimes", "int8") in one["regions"]
        assert all(torch.equal(t, wanted["state"][name]) for name, t in one["state"].items())
        assert torch.equal(one["result"], wanted["result"])
    message = (
        "convert_: model must have the same prepared layers in all processes, got 4 in process 0 "
        "and 2 in process 1 (sometimes.first, sometimes.second in one of them); call prepare_ "
        "with the same arguments in all processes"
    )
    assert first["other layers"] == second["other layers"] == message
