"""The forward of a region: a module whose values stay int8 from layer to layer.

It replaces the forward on the instance, so the module keeps its class, its submodules, its hooks
and the names of its state. A region is in one of two states. While it *observes*, it runs the calls
of the module's forward in float and shows the values that will be int8 to their observers. Once it
is *quantized*, it rounds these values to their integers.

If something that the record of the forward relies on was changed (a module was replaced, an
attribute was set, training mode), the forward of the module's class runs instead.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchquant.chains.averages import average
from torchquant.chains.call import bound, misfit
from torchquant.chains.first_batch import FirstBatch
from torchquant.chains.gradients import recomputed, trained
from torchquant.chains.guard import Expected
from torchquant.chains.interpreter import Interpreter, Substitute
from torchquant.chains.normalize import normalizing
from torchquant.chains.operations import Activate, AdaptiveAvgPool, AvgPool
from torchquant.chains.plan import Plan
from torchquant.chains.programs import REFUSED, Programs, may_use_kernels
from torchquant.chains.root import SCALE, ZERO_POINT
from torchquant.chains.rounding import activated, round_to
from torchquant.configs import Float, Static
from torchquant.functional._checks import dtype_name
from torchquant.graph.trace import Trace
from torchquant.training.observers import Observer

Qparams = tuple[Tensor, Tensor]
_LOW = (torch.bfloat16, torch.float16)
_ROUNDED = (torch.float32, *_LOW)
_OF_FUNCTIONS = ("__signature__", "__code__", "__name__", "__qualname__", "__defaults__")


def _asking(region: RegionForward) -> Callable[[], bool]:
    """A function that says whether a region is intact; torch.compile asks it while it compiles."""
    known = weakref.ref(region)

    def is_intact() -> bool:
        found = known()
        return found is not None and found.is_intact()

    asked: Callable[[], bool] = torch.compiler.assume_constant_result(is_intact)
    return asked


class RegionForward:
    """The forward of one region.

    The observers of the layers' inputs are hooks of the layers. The region itself has observers for
    int8 values that no layer sees, such as the summands of an addition.

    Args:
        root: the module.
        name: its name in the model, for messages.
        trace: the calls of its forward.
        activations: the quantization of the activations that enter each layer, by path.
        make_observer: makes the observer of an int8 value that no layer reads.
        pausing: takes the root; a context in which its layers do not observe.
        outputs: what configurations say about the values that leave layers, by path.

    Attributes:
        observing: True during calibration.
        known_as: the word in reports for a region that has a plan and is not quantized.

    Example:
        >>> from torchquant.graph.trace import trace
        >>> from torchquant.observers import MinMaxObserver
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
        >>> static = {"0": Static(), "2": Static()}
        >>> record = trace(net, lambda module: True)
        >>> region = RegionForward(net, "", record, static, lambda part: MinMaxObserver())
        >>> net.forward, region.observing = region, True
        >>> _ = net(torch.randn(8, 4))
        >>> region.plan.layers
        {'0': 0, '2': 1}
    """

    known_as: Literal["observed", "trained"] = "observed"

    def __init__(
        self,
        root: nn.Module,
        name: str,
        trace: Trace,
        activations: Mapping[str, Static],
        make_observer: Callable[[Static], Observer],
        pausing: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
        outputs: Mapping[str, Static | Float] = MappingProxyType({}),
    ) -> None:
        self._asked = _asking(self)
        self.root = root
        self.name = name
        self.trace = trace
        self.activations = dict(activations)
        self.outputs = dict(outputs)
        self.make_observer = make_observer
        self.pausing = pausing
        self.plan: Plan | None = None
        self.facts: FirstBatch | None = None
        self.observers: dict[int, Observer] = {}  # by the edge
        self.observing = False
        self.quantized = False
        self.failure = ""  # why the region does not run its calls; found by the first batch
        self.missed = ""  # why a batch could not be the first one
        self.expected: Expected | None = Expected(root, trace)
        self._warned = self._warned_of_dtype = False
        self._forget()

    def _forget(self) -> None:
        """Drop what follows from the rest and does not belong in copies."""
        self._interpreter: Interpreter | None = None
        self._programs: Programs | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_interpreter": None, "_programs": None, "_asked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._asked = _asking(self)

    def __getattr__(self, name: str) -> Any:
        """What tools read of a forward: that of the module's class."""
        root = self.__dict__.get("root")
        if root is None or name not in _OF_FUNCTIONS:
            raise AttributeError(f"'RegionForward' object has no attribute {name!r}")
        forward = type(root).forward
        if name == "__signature__":
            return inspect.signature(forward.__get__(root))
        return getattr(forward, name)

    def copied_to(self, root: nn.Module) -> RegionForward:
        """A region for a replica of the root, which expects what it finds in its first call."""
        copied = copy.copy(self)
        copied.root, copied.expected = root, None
        copied._interpreter = None
        return copied

    # ------------------------------------------------------------ calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module."""
        if self.failure or not (self.quantized or self.observing):
            return self.original(*args, **kwargs)
        inputs = bound(self.trace, args, kwargs)
        if inputs is None:
            tracer = next((item.tracer for item in args if isinstance(item, torch.fx.Proxy)), None)
            if isinstance(tracer, torch.fx.Tracer) and self.quantized:  # the module is one call
                path = tracer.path_of_module(self.root)
                return tracer.create_proxy("call_module", path, args, kwargs)
            if self.observing:
                self.missed = self.missed or misfit(self.trace, args, kwargs)
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling():
            if self.quantized and self._asked():
                return self._interpreted(inputs)
            return self.original(*args, **kwargs)
        kernels = self.quantized and may_use_kernels(inputs)
        if kernels and self._programs is not None and self._programs.holds():
            return self._programmed(inputs)
        if not self.is_intact():
            return self.original(*args, **kwargs)
        if not self.quantized:
            return self._observed(inputs)
        if kernels:
            self._programs = Programs(self)
            return self._programmed(inputs)
        return self._interpreted(inputs)

    def _programmed(self, inputs: Sequence[Any]) -> Any:
        """The result by programs, with gradients if they are asked for."""
        assert self._programs is not None
        if not self._programs.ready:
            return self._interpreted(inputs)
        if torch.is_grad_enabled():
            parameters = trained([self.root])
            if parameters or any(item.requires_grad for item in inputs):
                if self._programs.random:  # other numbers would be drawn in the backward pass
                    return self._interpreted(inputs)
                runs = self._without_gradients, self._interpreted
                return recomputed(*runs, inputs, parameters, self._programs.learned)
            with torch.no_grad():
                return self._without_gradients(inputs)
        return self._without_gradients(inputs)

    def _without_gradients(self, inputs: Sequence[Any]) -> Any:
        assert self._programs is not None
        result = self._programs.run(inputs)
        if result is not REFUSED:
            return result
        self._warn_of_dtype(inputs)
        return self._interpreted(inputs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class, on float values between the layers."""
        return type(self.root).forward(self.root, *args, **kwargs)

    def _original_on(self, *inputs: Any) -> Any:
        """The forward of the module's class on the tensor arguments in their order."""
        names, order = self.trace.inputs, self.trace.order
        count = sum(name in order for name in names)
        by_name = dict(zip(names[count:], inputs[count:], strict=True))
        return self.original(*inputs[:count], **by_name)

    def is_intact(self) -> bool:
        """True if what the record relies on is as it was; warns once if it is not."""
        if self.expected is None:
            self.expected = Expected(self.root, self.trace)
        changed = self.expected.change()
        if changed is None:
            return True
        if not self._warned:
            self._warned = True
            where = "the model" if not self.name else self.name
            reason = "training mode is on" if changed.is_mode else f"{changed.label} was changed"
            warnings.warn(
                f"{where}: {reason}, so the values between its layers are float instead of int8; "
                "call eval(), or prepare_, calibrate and convert_ a float model with the change",
                RuntimeWarning,
                stacklevel=6,
            )
        return False

    def _warn_of_dtype(self, inputs: Sequence[Any]) -> None:
        """Say once that bfloat16 and float16 inputs are slower than float32 ones."""
        dtype = next((item.dtype for item in inputs if item.dtype in _LOW), None)
        if dtype is None or self._warned_of_dtype or not self.quantized:
            return
        self._warned_of_dtype = True
        where = "the model" if not self.name else self.name
        warnings.warn(
            f"{where}: the input is {dtype_name(dtype)}, so the calls of its forward run one by "
            "one, which is slower; give it float32, which is computed on integers in one call",
            RuntimeWarning,
            stacklevel=5,
        )

    # ------------------------------------------------------------ observing

    def _observed(self, inputs: Sequence[Any]) -> Any:
        if self.plan is None:
            self.take_first_batch(inputs)
            if self.failure:
                return self._original_on(*inputs)
        if self._interpreter is None:
            self._interpreter = Interpreter(self.trace, self.root, points=self._observing_points())
        return self._interpreter(inputs)

    def _observing_points(self) -> dict[int, Callable[[Tensor], Tensor]]:
        assert self.plan is not None
        edges = {index: self.plan.edge_of[index] for index in self.plan.observed}
        return {index: _observing(self.observers[edge]) for index, edge in edges.items()}

    def take_first_batch(self, inputs: Sequence[Any]) -> None:
        """Compare the record with the forward, learn the sizes, and decide what is int8."""
        facts = FirstBatch(self.root, self.trace)
        with self.pausing(self.root):
            self.failure = facts.compare(self._original_on, inputs)
        if not self.failure:
            self.facts = facts
            self.set_plan(facts.plan(self.activations, self.outputs))

    def set_plan(self, plan: Plan) -> None:
        """Take a plan; observers of edges that it has in common with the last one stay."""
        if not plan.layers:
            self.failure = "no layer with static activations is called"
            return
        firsts = _firsts(plan)
        known = {} if self.plan is None else _firsts(self.plan)
        kept = {known[edge]: observer for edge, observer in self.observers.items()}
        self.plan, self.observers = plan, {}
        watched = {plan.edge_of[index] for index in plan.observed}
        unread = {*range(len(plan.edges))} - {*plan.layers.values()}
        for edge in sorted(watched | unread):
            activations = plan.edges[edge]
            with torch.inference_mode(False):
                observer = kept.get(firsts[edge]) or self.make_observer(activations)
            target = self.trace.calls[firsts[edge]].target
            observer.set_layer_name(f"{self.name}.{target}" if self.name else target)
            self.observers[edge] = observer
        self._forget()

    def restore(
        self,
        plan: Plan | None,
        facts: FirstBatch | None,
        failure: str,
        observers: Mapping[int, Observer],
    ) -> None:
        """Go back to an earlier state of the calibration."""
        self.plan, self.facts, self.failure = plan, facts, failure
        self.observers = dict(observers)
        self._forget()

    def restart(self) -> None:
        """Forget what the observers of the region have seen."""
        if self.plan is not None:
            self.observers = {}
            self.set_plan(self.plan)

    # ------------------------------------------------------------ quantized

    def quantize(self, qparams: Sequence[Qparams]) -> None:
        """Round the int8 values from now on; the layers have been replaced by quantized ones.

        Args:
            qparams: scale float32 ``[1]`` and zero point int32 ``[1]`` of each edge.
        """
        with torch.inference_mode(False):  # tensors of inference mode have no gradients later
            scale = torch.cat([one.detach().to(torch.float32).cpu() for one, _ in qparams])
            zero_point = torch.cat([one.detach().to(torch.int32).cpu() for _, one in qparams])
            device = next((t.device for t in self.root.buffers()), torch.device("cpu"))
            self.root.register_buffer(SCALE, scale.to(device))
            self.root.register_buffer(ZERO_POINT, zero_point.to(device))
        self.settle()

    def settle(self) -> None:
        """Be quantized from now on, with the layers and the scales that are there."""
        self.quantized, self.observing = True, False
        self.observers = {}
        self.expected = Expected(self.root, self.trace)
        self._forget()
        self._interpreter = self._quantized_interpreter()  # torch.compile cannot make it

    def edge_qparams(self, edge: int) -> Qparams:
        """Scale and zero point of an edge, one number each, as they are now."""
        scale, zero_point = self.root._buffers[SCALE], self.root._buffers[ZERO_POINT]
        assert scale is not None and zero_point is not None
        if scale.dtype is not torch.float32:  # load_state_dict(assign=True) of such a state
            scale = self.root._buffers[SCALE] = scale.to(torch.float32)
        return scale[edge : edge + 1], zero_point[edge : edge + 1]

    def _interpreted(self, inputs: Sequence[Any]) -> Any:
        if self._interpreter is None:
            self._interpreter = self._quantized_interpreter()
        return self._interpreter(inputs)

    def _quantized_interpreter(self) -> Interpreter:
        return Interpreter(self.trace, self.root, self.substitutes(), self.rounding_points())

    def rounding_points(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """The functions that round the int8 values, by the index of their call."""
        assert self.plan is not None
        return {index: self._rounding(self.plan.edge_of[index]) for index in self.plan.points}

    def _rounding(self, edge: int) -> Callable[[Tensor], Tensor]:
        assert self.plan is not None
        qmin, qmax = self.plan.edges[edge].range

        def rounded(value: Tensor) -> Tensor:
            if value.dtype not in _ROUNDED:
                return value  # the layer that reads it says what it needs
            return round_to(value, *self.edge_qparams(edge), qmin, qmax)

        return rounded

    def substitutes(self) -> dict[int, Substitute]:
        """The functions with the bits of the kernels, by the index of the call they replace."""
        assert self.plan is not None
        found: dict[int, Substitute] = {}
        for index, operation in enumerate(self.plan.operations):
            if isinstance(operation, Activate):
                found[index] = activated(operation.function)
            elif isinstance(operation, (AvgPool, AdaptiveAvgPool)) and index in self.plan.groups:
                found[index] = self._average(index, operation)
        for group in self.plan.groups.values():
            index = group.calls[0]
            substitute = normalizing(self.trace, self.root, index, self.plan.operations[index])
            if substitute is not None:
                found[index] = substitute
        return found

    def _average(self, index: int, operation: AvgPool | AdaptiveAvgPool) -> Substitute:
        assert self.plan is not None and self.facts is not None
        operand = self.plan.groups[index].operands[0]
        edge, shape = self.plan.edge_of.get(operand), self.facts.shapes[operand]
        rank = 0 if shape is None else len(shape)

        def averaged(value: Tensor, *rest: Any) -> Any:
            if value.dim() != rank:
                return NotImplemented
            if edge is None:
                return average(value, None, None, operation)
            return average(value, *self.edge_qparams(edge), operation)

        return averaged


def _observing(observer: Observer) -> Callable[[Tensor], Tensor]:
    def seen(value: Tensor) -> Tensor:
        if observer.num_batches.device != value.device:
            observer.to(value.device)
        observer(value)
        return value

    return seen


def _firsts(plan: Plan) -> dict[int, int]:
    """The first value of each edge."""
    firsts: dict[int, int] = {}
    for index, edge in plan.edge_of.items():
        firsts.setdefault(edge, index)
    return firsts


def region_of(module: nn.Module) -> RegionForward | None:
    """The region of which a module is the root, or None.

    Example:
        >>> print(region_of(nn.ReLU()))
        None
    """
    found = module.__dict__.get("forward")
    return found if isinstance(found, RegionForward) else None
