"""The interface of a peer of the network benchmark, and the plain graph that peers start from."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchquant.bench.peers.base import Call


class NetworkPeer(ABC):
    """One library's way of running a network. Each instance lives alone in its own process.

    fp32 images in, fp32 results out. Quantizing, packing and compiling is not part of a call.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def load(self, model: nn.Module, calibration: Tensor) -> None:
        """Take a float network and images for calibration, and convert it.

        The network may be changed; nothing of it is kept that calls do not need.
        """

    @abstractmethod
    def calls(self, x: Tensor) -> dict[str, Call]:
        """Ways of applying the network to images `[N, 3, H, W]`, by name; the fastest counts."""

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Version, engine and instruction set, for readers of the results."""


def folded_graph(model: nn.Module) -> fx.GraphModule:
    """The network as a graph of plain modules, with batch norms folded into convolutions.

    timm's batch norms have their activation inside of them; here they are two modules, which is
    what tools for graphs know. What does nothing in evaluation mode is removed.
    """
    from torch.fx.experimental.optimization import fuse

    model = copy.deepcopy(model).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and type(module) is not nn.BatchNorm2d:
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], _plain_norm(module))
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(
            modules[str(node.target)], (nn.Identity, nn.Dropout)
        ):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
    folded = fuse(traced, no_trace=True)
    assert isinstance(folded, fx.GraphModule)
    graph = fx.GraphModule(folded, folded.graph)
    graph.delete_all_unused_submodules()
    return graph


def _plain_norm(norm: nn.BatchNorm2d) -> nn.Module:
    plain = nn.BatchNorm2d(norm.num_features, norm.eps)
    plain.load_state_dict({name: norm.state_dict()[name] for name in plain.state_dict()})
    activation: Any = getattr(norm, "act", None)
    parts = OrderedDict(norm=plain, **({"act": activation} if activation is not None else {}))
    return nn.Sequential(parts).eval()


def channels_last(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same network in another type, its weights with channels innermost."""
    return model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
