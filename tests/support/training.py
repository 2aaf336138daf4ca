"""A model, its data and its training loop, in one process and in two."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchquant
from support.processes import PROCESSES, share
from torchquant import QATConfig, QATSchedule, TrainingConfig, prepare_qat_
from torchquant.training.observers import Observer

CONFIGS = {
    "dynamic": QATConfig(weight_bits=4),
    "static": QATConfig(activations="static", averaging_constant=0.1),
    "learned": QATConfig(
        weight_bits=4,
        activation_bits=4,
        activations="static",
        learned_weights=True,
        learned_activations=True,
    ),
}
FEATURES, CLASSES = 64, 32


class MLP(nn.Module):
    """Three layers, two of them with a ReLU that moves into them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x)))
        return logits


def prepared(config: TrainingConfig) -> MLP:
    torch.manual_seed(0)
    model = MLP()
    prepare_qat_(model, config, filter_fn=lambda module, name: True)
    return model


def batches(count: int, rows: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels that a linear function of them decides."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(FEATURES, CLASSES, generator=generator)
    inputs = [torch.randn(rows, FEATURES, generator=generator) for _ in range(count)]
    return [(x, (x @ teacher).argmax(1)) for x in inputs]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    return nn.functional.cross_entropy(model(x), labels)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(torchquant.parameter_groups(model, 1e-4), lr=0.1)


def train(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
    schedule: QATSchedule | None = None,
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor] = loss_of,
) -> list[float]:
    """A plain training loop; the losses."""
    optimizer = sgd(model) if optimizer is None else optimizer
    losses = []
    for batch in data:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(value.item())
    return losses


def ranges(model: nn.Module) -> dict[str, Tensor]:
    """State of all observers, by their layers."""
    return {
        module.layer_name: torch.stack([module.min_val, module.max_val]).clone()
        for module in model.modules()
        if isinstance(module, Observer)
    }


def counts(model: nn.Module) -> set[int]:
    """How many batches the observers counted."""
    return {int(m.num_batches) for m in model.modules() if isinstance(m, Observer)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- two processes


def half(rank: int, data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(share(rank, x), share(rank, labels)) for x, labels in data]


def first_step_and_rest(model: nn.Module, plain: nn.Module, data: Any) -> Any:
    """Ranges after the first batch, and after all; the schedule freezes before the last.

    Observing goes first where something is observed: in float, learned steps would have no
    gradient, which DistributedDataParallel refuses.
    """
    observe_steps = 1 if ranges(plain) else 0
    schedule = QATSchedule(model, observe_steps, freeze_step=len(data) - 1)
    optimizer = sgd(model)
    train(model, data[:1], optimizer, schedule)
    first = ranges(plain)
    train(model, data[1:], optimizer, schedule)
    return first, ranges(plain)


def distributed(rank: int, name: str, data: list[tuple[Tensor, Tensor]]) -> Any:
    """DistributedDataParallel with half of each batch."""
    model = prepared(CONFIGS[name])
    seen = first_step_and_rest(DistributedDataParallel(model), model, half(rank, data))
    return seen, model.state_dict()


def sharded(rank: int, name: str, data: list[tuple[Tensor, Tensor]]) -> Any:
    """FSDP2 with half of each batch; learned steps start before the parameters are sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mine = half(rank, data)
    model = prepared(CONFIGS[name])
    if name == "learned":
        with torch.no_grad():
            model(mine[0][0])
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for part in (model.first, model.second):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    seen = first_step_and_rest(model, model, mine)
    state = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for key, value in model.state_dict().items()
    }
    dist.barrier()
    return seen, state


def every_training(rank: int, names: list[str], data: list[tuple[Tensor, Tensor]]) -> Any:
    """The results of both by way and name of the configuration."""
    return {
        way.__name__: {name: way(rank, name, data) for name in names}
        for way in (distributed, sharded)
    }


def alone(name: str, data: list[tuple[Tensor, Tensor]]) -> Any:
    """One process with the whole batches."""
    model = prepared(CONFIGS[name])
    seen = first_step_and_rest(model, model, data)
    return seen, copy.deepcopy(model.state_dict())
