"""Programs at their limits: memory of groups of images, different counts, large windows."""

import pytest
import torch
from torch import Tensor

from torchquant.chains.program import Program
from torchquant.chains.steps import AdaptiveAvgPool, AvgPool, Input, Output, Qparams, Step, Value

Q = Qparams(1.0, 0)


@pytest.mark.parametrize("together", [0, 64])
def test_fewer_images_may_need_more_memory(together: int) -> None:
    # (channels, first step, last step) of values, whose blocks fit gaps with 64 images, not with 62
    lives = [(9000, 0, 3), (5400, 1, 2), (5832, 2, 5), (1800, 3, 4)]
    lives += [(7200, 4, 5), (7200, 5, 6), (5832, 6, 9), (9000, 7, 9)]
    events = sorted(
        [(first, 0, place) for place, (_, first, _) in enumerate(lives)]
        + [(last, 1, place) for place, (_, _, last) in enumerate(lives)]
    )
    values = [Value(place, Q) for place in range(len(lives))]
    steps: list[Step] = [
        Output(values[place], place) if ends else Input(values[place], place)
        for _, ends, place in events
    ]
    program = Program(steps)
    program._program.images_together = together
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randint(-128, 128, (126, channels), generator=generator).float()
        for channels, _, _ in lives
    ]
    for _ in range(3):  # a write beyond the block would damage the heap
        for got, wanted in zip(program.run(inputs), inputs, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("counts", [(0, 4), (4, 0), (3, 4)], ids=str)
def test_arguments_of_different_counts(counts: tuple[int, int]) -> None:
    values = [Value(0, Q), Value(1, Q)]
    program = Program(
        [*(Input(value, value.index) for value in values), *(Output(v, v.index) for v in values)]
    )
    inputs: list[Tensor] = [torch.full((count, 1000), 5.0) for count in counts]
    for got, wanted in zip(program.run(inputs), inputs, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["average", "adaptive"])
def test_windows_whose_sums_could_overflow_are_refused(kind: str) -> None:
    value, result = Value(0, Qparams(1.0, -128)), Value(1, None)
    for side in (2901, 2903):  # 2901 * 2901 * 255 is below 2^31, 2903 * 2903 * 255 is not
        step: Step = AdaptiveAvgPool(value, result, (1, 1))
        if kind == "average":
            step = AvgPool(value, result, (side, side), (1, 1), (0, 0))
        program = Program([Input(value, 0), step, Output(result, 0)])
        x = torch.full((1, 1, side, side), 255.0)
        if side == 2901:
            assert float(program.run([x])[0]) == pytest.approx(255.0, rel=1e-6)
        else:
            with pytest.raises(ValueError, match="a window must have at most 8421504 elements"):
                program.run([x])
