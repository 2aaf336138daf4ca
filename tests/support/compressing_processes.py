"""gptq_ in two processes, and in a process that is interrupted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import torchquant
from support.compressed_models import Experts, decoder, tokens
from torchquant.algorithms.resume import Results

CONFIG = torchquant.IntxWeightOnlyConfig(4, group_size=32)


def experts() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Experts() for _ in range(2)))


def expert_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(64, 64, generator=generator) for _ in range(3)]


def compressed(resume: str | None = None) -> list[Any]:
    """State and report of two models: a decoder, and experts that one batch may not reach."""
    results: list[Any] = []
    for model, batches, filter_fn in (
        (decoder(), tokens(), None),
        (experts(), expert_batches(), "*.experts.*"),
    ):
        folder = None if resume is None else f"{resume}/{len(results)}"
        report = torchquant.gptq_(
            model, CONFIG, batches, filter_fn=filter_fn, progress=False, resume=folder
        )
        results += [dict(model.state_dict()), report.to_dict()]
    return results


def compressed_in_process(rank: int, resume: str | None) -> list[Any]:
    return [*compressed(resume), *failures(rank, resume)]


def failures(rank: int, resume: str | None) -> list[str]:
    """What a process says if something of the other one is bad.

    It is a batch, the folder, the data as a whole, or the disk.
    """
    bad = tokens(2)
    bad[1] = bad[1] + 1000  # a batch of process 1
    messages = []
    for data, folder in ((bad, None), (tokens(2), f"{resume}/0")):
        model = decoder(1)
        try:
            torchquant.gptq_(model, CONFIG, data, progress=False, resume=folder)
        except (RuntimeError, ValueError, IndexError) as error:
            messages.append(f"{type(error).__name__} {error}")
        assert type(model.head) is nn.Linear
    for folder in (None, f"{resume}/full"):
        model = decoder(1)
        save = Results.save
        Results.save = _full  # type: ignore[method-assign]
        try:
            data = tokens(2) if folder else tokens(2)[:: 1 - 2 * rank]
            torchquant.gptq_(model, CONFIG, data, progress=False, resume=folder)
        except (RuntimeError, ValueError, OSError) as error:
            messages.append(f"{type(error).__name__} {error}")
        finally:
            Results.save = save  # type: ignore[method-assign]
        assert type(model.head) is nn.Linear
    return messages


def _full(results: Results, found: Any) -> None:
    raise OSError("no space left on the disk")
