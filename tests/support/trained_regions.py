"""Networks that are prepared for training, with regions, and a few steps of their training."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchquant
from support.chain_models import Functional, with_statistics
from support.chains import input_of, plain
from torchquant.chains.region import RegionForward
from torchquant.chains.training import TrainingForward
from torchquant.convert.regions import regions_in

STATIC = torchquant.QATConfig(activations="static")


def trained(
    cls: Callable[[], nn.Module], config: Any = STATIC, steps: int = 2, filter_fn: Any = "*"
) -> tuple[nn.Module, Tensor]:
    """A model after some steps, in evaluation mode, and an input."""
    torch.manual_seed(0)
    model, x = with_statistics(cls()), input_of(cls)
    torchquant.prepare_qat_(model, config, filter_fn=filter_fn)
    train(model, x, steps)
    return model, x


def train(model: nn.Module, x: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        plain(model(x * (1 + step))).square().mean().backward()
        optimizer.step()
    model.eval()


def region_in_training(model: nn.Module) -> TrainingForward:
    (region,) = regions_in(model)
    assert isinstance(region, TrainingForward)
    return region


def converted_copy(model: nn.Module) -> tuple[nn.Module, RegionForward]:
    """The converted copy of a model with one region, and that region; nothing may warn."""
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchquant.convert_(other)
    (region,) = regions_in(other)
    assert region.quantized
    return other, region


def assert_converts(model: nn.Module, x: Tensor) -> RegionForward:
    """The converted copy has the bits of the model, by programs; returns its region."""
    with torch.no_grad():
        wanted = plain(model.eval()(x))
        other, region = converted_copy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batch in (x, x[:1]):
                wanted, got = plain(model(batch)), plain(other(batch))
                assert torch.equal(got, wanted)
    programs = region._programs
    assert programs is not None and programs.ready
    assert any(program is not None for _, program in programs.items)
    return region


def trained_alone(batches: list[Tensor], config: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The state of a trained network after its conversion, and its outputs for the first batch."""
    torch.manual_seed(0)
    model = with_statistics(Functional())
    torchquant.prepare_qat_(model, config, filter_fn="*", example_inputs=batches[0][:1])
    torchquant.qat.freeze_statistics_(model)
    alone = not torch.distributed.is_initialized()
    replicated = model if alone else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    torchquant.qat.freeze_statistics_(model)
    for batch in batches:
        optimizer.zero_grad()
        part = batch if alone else batch.chunk(2)[torch.distributed.get_rank()]
        replicated(part).square().mean().backward()
        optimizer.step()
    region = assert_converts(model, batches[0])
    return region.root.state_dict(), model(batches[0]).detach()


def trained_in_process(
    rank: int, batches: list[Tensor], config: Any
) -> tuple[dict[str, Tensor], Tensor]:
    return trained_alone(batches, config)
