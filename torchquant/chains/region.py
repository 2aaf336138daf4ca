"""The forward of a region: a module whose values stay int8 from layer to layer.

It replaces the forward on the instance, so the module keeps its class, its submodules, its hooks
and the names of its state. A region is in one of two states. While it *observes*, it runs the calls
of the module's forward in float and shows the values that will be int8 to their observers. Once it
is *quantized*, it rounds these values to their integers.

If something that the record of the forward relies on was changed (a module was replaced, an
attribute was set, training mode), the forward of the module's class runs instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant import ops
from torchquant.chains.averages import average
from torchquant.chains.first_batch import FirstBatch
from torchquant.chains.guard import expectations
from torchquant.chains.interpreter import Interpreter, Substitute
from torchquant.chains.operations import Activate, AdaptiveAvgPool, AvgPool
from torchquant.chains.plan import Plan
from torchquant.chains.programs import REFUSED, Programs, may_use_kernels
from torchquant.configs import Static
from torchquant.graph.trace import Trace
from torchquant.training.observers import Observer

SCALE, ZERO_POINT = "chain_scale", "chain_zero_point"  # the buffers of a region's root

Qparams = tuple[Tensor, Tensor]


class RegionForward:
    """The forward of one region.

    Args:
        root: the module.
        name: its name in the model, for messages.
        trace: the calls of its forward.
        activations: the quantization of the activations that enter each layer, by path.
        make_observer: makes the observer of an int8 value.
        dropped: is called with the root and the layers (path -> activations) that the region does
            not observe after all.

    Example:
        >>> from torchquant.graph.trace import trace
        >>> from torchquant.observers import MinMaxObserver
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
        >>> static = {"0": Static(), "2": Static()}
        >>> record = trace(net, lambda module: True)
        >>> region = RegionForward(net, "", record, static, lambda part: MinMaxObserver())
        >>> net.forward = region
        >>> _ = net(torch.randn(8, 4))
        >>> region.plan.layers
        {'0': 0, '2': 1}
    """

    def __init__(
        self,
        root: nn.Module,
        name: str,
        trace: Trace,
        activations: Mapping[str, Static],
        make_observer: Callable[[Static], Observer],
        dropped: Callable[[nn.Module, Mapping[str, Static]], None] | None = None,
    ) -> None:
        self.root = root
        self.name = name
        self.trace = trace
        self.activations = dict(activations)
        self.make_observer = make_observer
        self.dropped = dropped
        self.plan: Plan | None = None
        self.facts: FirstBatch | None = None
        self.observers: list[Observer] = []
        self.quantized = False
        self.failure = ""  # why the region does not run its calls; found by the first batch
        self.expected = expectations(root, trace)
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        """Drop what follows from the rest and does not belong in copies."""
        self._interpreter: Interpreter | None = None
        self._programs: Programs | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_interpreter": None, "_programs": None}

    # ------------------------------------------------------------ calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module."""
        inputs = None if self.failure else self._inputs(args, kwargs)
        if inputs is None or not self._is_intact():
            return self.original(*args, **kwargs)
        if not self.quantized:
            return self._observed(inputs)
        if may_use_kernels(inputs):
            programs = self._programs
            if programs is None or not programs.holds():
                programs = self._programs = Programs(self)
            result = programs.run(inputs)
            if result is not REFUSED:
                return result
        return self._interpreted(inputs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class, on float values between the layers."""
        return type(self.root).forward(self.root, *args, **kwargs)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The tensor arguments in their order; None if the record does not hold for the call."""
        names = self.trace.inputs
        if len(args) == len(names) and not kwargs:
            inputs = list(args)
        else:
            every = (*names, *self.trace.defaults)
            given = {**dict(zip(every, args, strict=False)), **kwargs}
            if len(args) > len(every) or not given.keys() <= set(every):
                return None
            for name, default in self.trace.defaults.items():
                if given.get(name, default) is not default:
                    return None
            if not all(name in given for name in names):
                return None
            inputs = [given[name] for name in names]
        return inputs if all(isinstance(item, Tensor) for item in inputs) else None

    def _is_intact(self) -> bool:
        """True if what the record relies on is as it was; warns once if it is not."""
        changed = next((one for one in self.expected if not one.holds()), None)
        if changed is None:
            return True
        if not self._warned:
            self._warned = True
            where = "the model" if not self.name else self.name
            reason = (
                "training mode is on"
                if changed.name == "training" and not changed.child
                else f"{type(changed.module).__name__}.{changed.name} was changed"
            )
            warnings.warn(
                f"{where}: {reason}, so the values between its layers are float instead of int8; "
                "call eval(), or prepare_, calibrate and convert_ a float model with the change",
                RuntimeWarning,
                stacklevel=5,
            )
        return False

    # ------------------------------------------------------------ observing

    def _observed(self, inputs: Sequence[Any]) -> Any:
        if self.plan is None:
            self._take_first_batch(inputs)
            if self.failure:
                return self.original(*inputs)
        if self._interpreter is None:
            assert self.plan is not None
            points = {index: self.observers[self.plan.edge_of[index]] for index in self.plan.points}
            self._interpreter = Interpreter(self.trace, self.root, points=points)
        return self._interpreter(inputs)

    def _take_first_batch(self, inputs: Sequence[Any]) -> None:
        """Compare the record with the forward, learn the sizes, and decide what is int8."""
        facts = FirstBatch(self.root, self.trace, self.activations)
        self.failure = facts.compare(self.original, inputs)
        plan = None if self.failure else facts.plan()
        if plan is not None and not plan.layers:
            self.failure = "no layer reads a value of the region"
        if self.failure or plan is None:
            if self.dropped is not None:
                self.dropped(self.root, self.activations)
            return
        self.facts, self.plan = facts, plan
        self.observers = [self.make_observer(activations) for activations in plan.edges]
        device = next((item.device for item in inputs), None)
        for observer, names in zip(self.observers, self._edge_names(), strict=True):
            observer.to(device)
            observer.layer_name = names
        if plan.dropped and self.dropped is not None:
            self.dropped(self.root, {path: self.activations[path] for path in plan.dropped})

    def _edge_names(self) -> list[str]:
        """For messages: the layers that read each edge, or the call that makes it."""
        assert self.plan is not None
        prefix = f"{self.name}." if self.name else ""
        names: list[str] = []
        for edge in range(len(self.plan.edges)):
            layers = [path for path, read in self.plan.layers.items() if read == edge]
            made = next(index for index, own in self.plan.edge_of.items() if own == edge)
            target = self.trace.calls[made].target
            names.append(", ".join(prefix + path for path in layers) or f"{prefix}{target}")
        return names

    # ------------------------------------------------------------ quantized

    def quantize(self, qparams: Sequence[Qparams]) -> None:
        """Round the int8 values from now on; the layers have been replaced by quantized ones.

        Args:
            qparams: scale float32 ``[1]`` and zero point int32 ``[1]`` of each edge.
        """
        scale = torch.cat([one.detach().to(torch.float32).cpu() for one, _ in qparams])
        zero_point = torch.cat([one.detach().to(torch.int32).cpu() for _, one in qparams])
        device = next((t.device for t in self.root.buffers()), torch.device("cpu"))
        self.root.register_buffer(SCALE, scale.to(device))
        self.root.register_buffer(ZERO_POINT, zero_point.to(device))
        self.quantized = True
        self.observers = []
        self.expected = expectations(self.root, self.trace)
        self._forget()

    def edge_qparams(self, edge: int) -> Qparams:
        """Scale and zero point of an edge, one number each, as they are now."""
        scale, zero_point = self.root._buffers[SCALE], self.root._buffers[ZERO_POINT]
        assert scale is not None and zero_point is not None
        return scale[edge : edge + 1], zero_point[edge : edge + 1]

    def _interpreted(self, inputs: Sequence[Any]) -> Any:
        if self._interpreter is None:
            self._interpreter = Interpreter(
                self.trace, self.root, self.substitutes(), self.rounding_points()
            )
        return self._interpreter(inputs)

    def rounding_points(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """The functions that round the int8 values, by the index of their call."""
        assert self.plan is not None
        return {index: self._rounding(self.plan.edge_of[index]) for index in self.plan.points}

    def _rounding(self, edge: int) -> Callable[[Tensor], Tensor]:
        assert self.plan is not None
        qmin, qmax = self.plan.edges[edge].range

        def rounded(value: Tensor) -> Tensor:
            scale, zero_point = self.edge_qparams(edge)
            return ops.fake_quantize(value, scale, zero_point, qmin=qmin, qmax=qmax)

        return rounded

    def substitutes(self) -> dict[int, Substitute]:
        """The functions with the bits of the kernels, by the index of the call they replace."""
        assert self.plan is not None
        found: dict[int, Substitute] = {}
        for index, operation in enumerate(self.plan.operations):
            if isinstance(operation, Activate):
                found[index] = _activation(operation.function)
            elif isinstance(operation, (AvgPool, AdaptiveAvgPool)) and index in self.plan.groups:
                found[index] = self._average(index, operation)
        return found

    def _average(self, index: int, operation: AvgPool | AdaptiveAvgPool) -> Substitute:
        assert self.plan is not None
        edge = self.plan.edge_of[self.plan.groups[index].operands[0]]
        return lambda value, *rest: average(value, *self.edge_qparams(edge), operation)


def _activation(function: str) -> Substitute:
    return lambda value, *rest: ops.activation(value, function)


def region_of(module: nn.Module) -> RegionForward | None:
    """The region of which a module is the root, or None.

    Example:
        >>> print(region_of(nn.ReLU()))
        None
    """
    found = module.__dict__.get("forward")
    return found if isinstance(found, RegionForward) else None
