"""What programs point to: memory that is replaced, weights and tables of wrong sizes."""

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.chain_models import Functional
from support.chains import converted
from torch import Tensor

from torchquant import ops
from torchquant._extension import load
from torchquant.chains.programs import Programs
from torchquant.convert.regions import regions_in

RawProgram: Any = load().Program
INT8 = (1.0, 0, -128, 127)
INPUT = {"kind": "input", "inputs": [], "output": 0, "place": 0}
OUTPUT = {"kind": "output", "inputs": [1], "output": -1, "place": 0}


def conv(weight: Tensor, groups: int = 1, **changed: Any) -> dict[str, Any]:
    return {
        "kind": "conv",
        "inputs": [0],
        "output": 1,
        "in_channels": weight.shape[1] * groups,
        "out_channels": weight.shape[0],
        "groups": groups,
        "packed": ops.pack_conv_weight(weight, groups),
        "weight_scale": torch.ones(weight.shape[0]),
        "kernel": list(weight.shape[2:]),
        "activation": "none",
        **changed,
    }


def weight(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int8)


@pytest.mark.parametrize(
    "replace",
    [
        lambda t: t.share_memory_(),
        lambda t: t.untyped_storage().resize_(1 << 20),
        lambda t: t.untyped_storage().resize_(0),
    ],
    ids=["share_memory_", "larger", "empty"],
)
@pytest.mark.parametrize("name", ["packed", "weight_scale", "bias"])
def test_a_program_refuses_other_memory(replace: Callable[[Tensor], Any], name: str) -> None:
    step = conv(weight(16, 8, 3, 3), bias=torch.zeros(16))
    program = RawProgram([INT8, None], [INPUT, step, OUTPUT])
    x = torch.ones(1, 8, 5, 5)
    assert torch.equal(program.run([x])[0], torch.full((1, 16, 3, 3), 72.0))
    replace(step[name])
    with pytest.raises(ValueError, match=r"^Program.run: the tensors of the layers must keep"):
        program.run([x])


@pytest.mark.parametrize("moment", ["before", "between guard and run"])
def test_a_region_computes_with_the_new_memory(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any
    model, x, _ = converted(Functional)
    with torch.no_grad():
        wanted = model(x)
        other = copy.deepcopy(model)
        other(x)
        if moment == "before":
            other.third.packed.share_memory_()
        else:
            holds = Programs.holds

            def moved(self: Programs) -> bool:
                held = holds(self)
                other.third.packed.share_memory_()
                return held

            monkeypatch.setattr(Programs, "holds", moved)
        assert torch.equal(other(x), wanted)
        monkeypatch.undo()
        assert torch.equal(other(x), wanted)
        (region,) = regions_in(other)
        assert region._programs is not None and region._programs.holds()


SMALL = weight(16, 8, 3, 3)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too small": ({"packed": torch.zeros(1, 64, dtype=torch.int8)}, "packed must be the weight of"),
    "other kernel": ({"kernel": [5, 5]}, "packed must be the weight of 16 outputs and 8 inputs"),
    "other inputs": ({"in_channels": 64}, "packed must be the weight of 16 outputs and 64 inputs"),
    "other outputs": (
        {"out_channels": 17, "weight_scale": torch.ones(17)},
        "packed must be the weight of 17 outputs",
    ),
    "other groups": ({"groups": 8}, "packed must be the weight of 16 outputs and 1 inputs"),
    "groups 0": ({"groups": 0}, "groups must divide in_channels and out_channels, got 0"),
    "groups 3": ({"groups": 3}, "groups must divide in_channels and out_channels, got 3"),
    "no channels": ({"in_channels": 0}, "in_channels and out_channels must be positive, got 0"),
    "a huge kernel": ({"kernel": [1 << 20, 1 << 20]}, "kernel is out of range"),
    "scales": ({"weight_scale": torch.ones(15)}, "one element for each of 16 channels"),
    "linear with kernel": ({"kind": "linear"}, "a linear layer must have one group and no kernel"),
    "no input": ({"inputs": []}, "step 1 has another number of inputs"),
    "two inputs": ({"inputs": [0, 0]}, "step 1 has another number of inputs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_of_wrong_sizes_are_refused(case: str) -> None:
    changed, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        RawProgram([INT8, None], [INPUT, {**conv(SMALL), **changed}, OUTPUT])


def test_layouts_of_every_kind_are_taken() -> None:
    for groups, shape in [
        (1, (5, 3, 7, 7)),
        (2, (6, 4, 1, 1)),
        (70, (140, 1, 3, 3)),
        (1, (4, 1, 2, 2)),
    ]:
        RawProgram([INT8, None], [INPUT, conv(weight(*shape), groups), OUTPUT])


@pytest.mark.parametrize(
    ("values", "step", "message"),
    [
        ([INT8, INT8], {"kind": "map", "tables": []}, "must have a table of int8"),
        ([INT8, None], {"kind": "map", "tables": []}, "must have a table of floats"),
        ([INT8, None], {"kind": "map", "tables": [torch.zeros(0)]}, "256 elements"),
        ([INT8, INT8], {"kind": "map", "tables": [torch.zeros(255)]}, "256 elements"),
        ([INT8, INT8], {"kind": "concat", "tables": []}, "must have a table for each input"),
        ([INT8, None], {"kind": "norm", "channels": 3}, "must read and write floats"),
        ([INT8, None], {"kind": "channels", "index": [0]}, "must write what it reads"),
        ([None, None], {"kind": "adaptive_max_pool"}, "must read and write int8 values"),
        (
            [INT8, INT8],
            {"kind": "affine", "channels": 3, "gain": torch.ones(2)},
            "one element for each of 3 channels",
        ),
        ([INT8, None], {"kind": "max_pool"}, "must read and write int8 values"),
        ([INT8, None], {"kind": "flatten"}, "must write what it reads"),
        ([INT8, None], {"kind": "add"}, "another number of inputs"),
        ([INT8, INT8], {"kind": "flatten", "residual": 0}, "must not have a residual"),
    ],
)
def test_steps_that_do_not_fit_their_values_are_refused(
    values: list[Any], step: dict[str, Any], message: str
) -> None:
    full = {"inputs": [0], "output": 1, "activation": "none", **step}
    with pytest.raises(ValueError, match=message):
        RawProgram(values, [INPUT, full, OUTPUT])
    with pytest.raises(TypeError, match="a table must be int8"):
        wrong = {**full, "kind": "concat", "tables": [torch.zeros(256)]}
        RawProgram([INT8, INT8], [INPUT, wrong, OUTPUT])


def test_flags_may_change_while_other_threads_run() -> None:
    program = RawProgram([INT8, None], [INPUT, conv(SMALL), OUTPUT])
    x = torch.ones(5, 8, 5, 5)
    wanted = program.run([x])[0]
    until, wrong = time.monotonic() + 0.5, []

    def work() -> None:
        while time.monotonic() < until:
            if not torch.equal(program.run([x])[0], wanted):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    count = 0
    while time.monotonic() < until:
        count += 1
        program.images_together, program.uses_team = count % 4, bool(count % 2)
        assert program.images_together == count % 4 and program.uses_team is bool(count % 2)
    for thread in threads:
        thread.join()
    assert not wrong
