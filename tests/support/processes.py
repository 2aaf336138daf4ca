"""Two processes that train together (gloo), for tests of what they must agree on.

The functions that run in the processes stand here and not in the tests: a new process imports this
file by name.
"""

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import torchquant
from support.scripts import run_python
from torchquant import PerAxis

PROCESSES = 2
WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a device: values read back, sizes that depend on any."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def in_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``function(rank, *arguments)`` in two processes; return the results by rank."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PROCESSES) as pool:
        (Path(folder) / "call").write_bytes(pickle.dumps((function, arguments)))
        runs = [
            pool.submit(run_python, ENTER, str(rank), folder, environment=environment)
            for rank in range(PROCESSES)
        ]
        for run in runs:
            assert run.result().returncode == 0, run.result().stderr
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(PROCESSES)]


ENTER = """
import sys
from support.processes import enter
enter(int(sys.argv[1]), sys.argv[2])
"""


def enter(rank: int, folder: str) -> None:
    """Run the function of a folder as process number `rank`."""
    function, arguments = pickle.loads((Path(folder) / "call").read_bytes())
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=120),
    )
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def share(rank: int, batch: Tensor) -> Tensor:
    """A process's part of a batch."""
    return batch.chunk(PROCESSES)[rank]


# ---------------------------------------------------------------- observers


OBSERVERS: dict[str, Callable[[], torchquant.Observer]] = {
    "min_max": torchquant.MinMaxObserver,
    "moving_average": torchquant.MovingAverageMinMaxObserver,
    "per_channel": lambda: torchquant.MovingAverageMinMaxObserver(
        0.3, symmetric=True, granularity=PerAxis(1)
    ),
}


def observe(batches: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """State and scales of every kind of observer after some batches."""
    results = {}
    for name, make in OBSERVERS.items():
        observer = make()
        for batch in batches:
            observer(batch)
        scale, zero_point = observer.calculate_qparams()
        results[name] = {**observer.state_dict(), "scale": scale, "zero_point": zero_point}
    return results


def observe_in_process(rank: int, batches: list[Tensor]) -> Any:
    whole_group = dist.new_group([0, 1])
    alone = dist.new_group([0]), dist.new_group([1])
    grouped = []
    for group in (whole_group, alone[rank]):
        observer = torchquant.MinMaxObserver(process_group=group)
        observer(share(rank, batches[0]))
        grouped.append(torch.cat([observer.min_val, observer.max_val]))
    return observe([share(rank, batch) for batch in batches]), grouped


# ---------------------------------------------------------------- learned quantizers


class LSQNet(nn.Module):
    """Two linear layers whose inputs and weights are quantized with learned steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 4)])
        self.inputs = nn.ModuleList(
            [torchquant.LSQPlusQuantizer(4), torchquant.LSQQuantizer(4, signed=False)]
        )
        self.weights = nn.ModuleList(
            [torchquant.LSQQuantizer(4, True, True, 16), torchquant.LSQQuantizer(4)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer, input, weight in zip(self.layers, self.inputs, self.weights, strict=True):
            assert isinstance(layer, nn.Linear)
            x = nn.functional.linear(input(x), weight(layer.weight), layer.bias).relu()
        return x


def lsq_net() -> LSQNet:
    torch.manual_seed(0)
    return LSQNet()


def train(model: nn.Module, batches: list[Tensor], step: float = 0.05) -> None:
    """A few steps of plain gradient descent towards the batches' own first columns."""
    optimizer = torch.optim.SGD(torchquant.parameter_groups(model, 0.01), lr=step)
    for batch in batches:
        optimizer.zero_grad()
        (model(batch) - batch[:, :4].abs()).square().mean().backward()
        optimizer.step()


def initial_steps(net: LSQNet, batch: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        net(batch)
    return {name: value.clone() for name, value in net.state_dict().items()}


def lsq_in_process(rank: int, batches: list[Tensor]) -> Any:
    mine = [share(rank, batch) for batch in batches]
    first = initial_steps(lsq_net(), mine[0])
    net = lsq_net()
    train(DistributedDataParallel(net), mine)
    return first, net.state_dict(), sharded(rank, mine)


def sharded(rank: int, mine: list[Tensor]) -> Any:
    """FSDP2: the state after training, and what using it uninitialised says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    net = lsq_net()
    fully_shard(net, mesh=mesh)
    message = ""
    try:
        net(mine[0])
    except RuntimeError as error:
        message = str(error)
    net = lsq_net()
    initial_steps(net, mine[0])
    fully_shard(net, mesh=mesh)
    train(net, mine)
    full = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in net.state_dict().items()
    }
    return message, full
