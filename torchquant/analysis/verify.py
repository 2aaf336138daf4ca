"""verify: compare the bits of a converted model with the trained model, layer by layer.

If two models differ in one layer, the inputs of all later layers differ, too. Each pair of layers
therefore receives an identical input, the input of the trained layer, so that a difference is
attributed to the layer in which it arises. The outputs of the whole models are also compared. The
two models may be on different devices.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from torchquant.analysis.pairs import left_in_float, pairs_of
from torchquant.nn.base import TrainedModule
from torchquant.training.observed_quantizer import ObservedQuantizer

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """The first difference between two outputs.

    Attributes:
        layer: name of the layer, or "outputs of the models".
        batch: index of the batch.
        call: index of the call of the layer, counted over all batches.
        index: index of the element; empty if shapes or dtypes differ.
        trained: the value of the trained model; its dtype and shape if these differ.
        converted: the value, or dtype and shape, of the converted model.

    Example:
        >>> print(Difference("head", 0, 0, (2, 5), "1.5", "1.25"))
        head: batch 0, call 0, element (2, 5): 1.5 trained, 1.25 converted
    """

    layer: str
    batch: int
    call: int
    index: tuple[int, ...]
    trained: str
    converted: str

    def __str__(self) -> str:
        where = f"{self.layer}: batch {self.batch}, call {self.call}"
        element = f", element {self.index}" if self.index else ""
        return f"{where}{element}: {self.trained} trained, {self.converted} converted"


@dataclass
class Comparison:
    """Counts of compared and differing values, for the outputs of a layer or of the models.

    All NaNs count as equal.

    Attributes:
        name: name of the layer, or "outputs of the models".
        calls: number of calls.
        values: number of compared values.
        differing: number of values that differ in at least one bit.
        bits: number of bits that differ.
        first: the first difference, or None.

    Example:
        >>> one = Comparison("layer")
        >>> one.compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0]), batch=0)
        >>> one.values, one.differing, one.bits
        (2, 1, 1)
    """

    name: str
    calls: int = 0
    values: int = 0
    differing: int = 0
    bits: int = 0
    first: Difference | None = None

    def compare(self, trained: Any, converted: Any, batch: int) -> None:
        """Count the outputs of one call: tensors, or sequences, mappings or dataclasses of them."""
        ours, theirs = list(tensors_in(trained)), list(tensors_in(converted))
        if len(ours) != len(theirs):
            counts = (f"{len(ours)} tensors", f"{len(theirs)} tensors")
            self._differs(batch, (), counts, 1, 1)
        for a, b in zip(ours, theirs, strict=False):
            self._compare(a.detach(), b.detach(), batch)
        self.calls += 1

    def _compare(self, trained: Tensor, converted: Tensor, batch: int) -> None:
        self.values += trained.numel()
        if trained.shape != converted.shape or trained.dtype != converted.dtype:
            size = 8 * trained.element_size()
            kinds = [f"{t.dtype} {list(t.shape)}" for t in (trained, converted)]
            self._differs(batch, (), kinds, trained.numel(), size * trained.numel())
            return
        a, b = _integers(trained), _integers(converted.to(trained.device))
        wrong = a != b
        if bool(wrong.any()):
            # A complex tensor has one more axis, for the real and imaginary parts.
            index = tuple(wrong.nonzero()[0].tolist())[: trained.dim()]
            values = [repr(t[index].item()) for t in (trained, converted)]
            self._differs(batch, index, values, int(wrong.sum()), _popcount(a ^ b))

    def _differs(
        self,
        batch: int,
        index: tuple[int, ...],
        values: Sequence[str],
        differing: int,
        bits: int,
    ) -> None:
        self.differing += differing
        self.bits += bits
        if self.first is None:
            self.first = Difference(self.name, batch, self.calls, index, *values)


@dataclass(frozen=True)
class VerifyReport:
    """Result of :func:`verify`; ``print`` it for a table.

    Attributes:
        layers: one comparison per layer, in the order of first calls; layers that were never called
            come last.
        outputs: the comparison of the outputs of the whole models.
        batches: number of batches.
        devices: the devices of the trained model and of the converted model.
        left_in_float: names of the layers that ``convert_`` left in float, which are not compared.

    Example:
        >>> import copy, torch, torchquant
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> batch = torch.randn(4, 64)
        >>> _ = torchquant.prepare_qat_(model)
        >>> _ = model.train()(batch)
        >>> trained = copy.deepcopy(model.eval())
        >>> _ = torchquant.convert_(model)
        >>> torchquant.verify(trained, model, [(batch,)]).exact
        True
    """

    layers: tuple[Comparison, ...]
    outputs: Comparison
    batches: int
    devices: tuple[str, str] = ("cpu", "cpu")
    left_in_float: tuple[str, ...] = ()

    @property
    def differing_bits(self) -> int:
        """Number of bits that differ in the outputs of the layers, given identical inputs."""
        return sum(layer.bits for layer in self.layers)

    @property
    def first_difference(self) -> Difference | None:
        """The first difference in the earliest batch with one, or None."""
        found = [layer.first for layer in self.layers if layer.first is not None]
        return min(found, key=lambda one: one.batch, default=self.outputs.first)

    @property
    def never_called(self) -> tuple[str, ...]:
        """Names of the layers that were not called for any batch, and so were not compared."""
        return tuple(layer.name for layer in self.layers if not layer.calls)

    @property
    def exact(self) -> bool:
        """True if values were compared and no bits differ, in layers and outputs."""
        compared = any(layer.values for layer in self.layers)
        return compared and not self.differing_bits and not self.outputs.bits

    def summary(self) -> str:
        """A summary of one line, with further lines for differences and uncalled layers."""
        values = sum(layer.values for layer in self.layers)
        called = [layer for layer in self.layers if layer.calls]
        line = (
            f"{self.differing_bits:,} differing bits in {values:,} values of {len(called)} layers; "
            f"outputs of the models: {self.outputs.bits:,} in {self.outputs.values:,}"
        )
        if self.devices[0] != self.devices[1]:
            line += f"\nDevices: {self.devices[0]} (trained) and {self.devices[1]} (converted)"
        if self.first_difference is not None:
            line += f"\nFirst difference: {self.first_difference}"
        if self.left_in_float:
            line += f"\nNot compared, because left in float: {', '.join(self.left_in_float)}"
        if self.never_called:
            line += f"\nNot compared, because never called: {', '.join(self.never_called)}"
        return line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("layer", overflow="fold")
        for heading in ("calls", "values compared", "values differing", "bits differing"):
            table.add_column(heading, justify="right")
        for row in (*self.layers, self.outputs):
            counts = (row.calls, row.values, row.differing, row.bits)
            style = "bold red" if row.bits else "" if row.calls else "dim"
            table.add_row(Text(row.name), *(Text(f"{n:,}") for n in counts), style=style)
        yield table
        yield Text(self.summary(), style="" if self.exact else "bold red")

    def __str__(self) -> str:
        """The table, as wide as the terminal, or 110 columns wide without a terminal."""
        file = io.StringIO()
        width = shutil.get_terminal_size((110, 0)).columns
        Console(file=file, width=width, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def verify(
    qat_model: nn.Module,
    quantized_model: nn.Module,
    batches: Iterable[Any],
    *,
    training: bool = False,
) -> VerifyReport:
    """Count the bits in which a converted model differs from the model that was trained.

    Each pair of layers receives an identical input, the input of the trained layer, so that a
    difference is counted in the layer in which it arises. The outputs of the whole models are also
    compared. Modes, stages, hooks and the states of random generators are restored afterwards.

    The models may be on different devices. In that case they may also be two copies of one model,
    both prepared or both quantized: this compares a GPU with the CPU. The outputs of the whole
    models then usually differ, because torch's own float operators differ between devices.

    Args:
        qat_model: the trained model before ``convert_``; convert a ``copy.deepcopy`` of it.
        quantized_model: the converted model, with layers of the same names.
        batches: an iterable of inputs. Each is a tensor, a tuple or list of positional arguments,
            or a mapping of keyword arguments. Tensors are moved to the device of each model, unless
            the model has several devices.
        training: run the trained layers in training mode with frozen ranges and gradients on. All
            other modules stay in evaluation mode, so dropout is off.

    Returns:
        The counts, layer by layer, and the first difference; ``print`` it for a table.

    Raises:
        TypeError: a model is not a module.
        ValueError: qat_model has no prepared layers or layers in the stage "observe", a layer of
            quantized_model is missing or not quantized, or batches is empty.

    Example:
        >>> import copy, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> _ = torchquant.prepare_qat_(model)
        >>> converted = copy.deepcopy(model)
        >>> _ = torchquant.convert_(converted)
        >>> report = verify(model, converted, [torch.randn(4, 64)])
        >>> report.exact, report.differing_bits
        (True, 0)
    """
    pairs = pairs_of(qat_model, quantized_model)
    layers = {name: Comparison(name) for name in pairs}
    left = left_in_float(qat_model, quantized_model)
    outputs = Comparison("outputs of the models")
    called: dict[str, None] = {}
    places = tuple(_devices(model) for model in (qat_model, quantized_model))
    generators = _cuda_generators(set().union(*places))
    current = 0

    def compare(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        called[name] = None
        input: Tensor = args[0] if args else kwargs["input"]
        with torch.no_grad():
            # Only the forward: hooks run when the whole quantized model runs.
            layer: Any = pairs[name][1]
            converted = type(layer).forward(layer, input.detach().to(layer.device))
        layers[name].compare(output, converted, current)

    with ExitStack() as stack:
        stack.enter_context(_as_it_was(qat_model))
        stack.enter_context(_as_it_was(quantized_model))
        stack.enter_context(torch.random.fork_rng(devices=generators))
        stack.enter_context(torch.set_grad_enabled(training))
        qat_model.eval()
        quantized_model.eval()
        for name, (trained, _) in pairs.items():
            if training:
                trained.train()
            hook = trained.register_forward_hook(
                lambda _, args, kwargs, output, name=name: compare(name, args, kwargs, output),
                prepend=True,  # before hooks that change the output
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        _freeze_ranges(qat_model)
        for name in left:  # both models compute these layers in float
            layer: Any = qat_model.get_submodule(name)
            stack.callback(layer.enable_quantization, bool(layer.quantize_enabled))
            layer.enable_quantization(False)
        count = 0
        for current, batch in enumerate(batches):
            seed = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in generators]
            trained_output = _call(qat_model, _moved(batch, places[0]))
            torch.set_rng_state(seed[0])
            for index, state in zip(generators, seed[1], strict=True):
                torch.cuda.set_rng_state(state, index)
            outputs.compare(
                trained_output, _call(quantized_model, _moved(batch, places[1])), current
            )
            count += 1
    if not count:
        raise ValueError("verify: batches must hold at least one batch, got none")
    order = [*called, *(name for name in layers if name not in called)]
    devices = tuple(", ".join(sorted(map(str, place))) for place in places)
    return VerifyReport(tuple(layers[name] for name in order), outputs, count, devices, left)  # type: ignore[arg-type]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a model's output: a tensor, or sequences, mappings and dataclasses of tensors.

    Example:
        >>> output = {"a": torch.ones(()), "b": (torch.zeros(()), 3)}
        >>> [tensor.item() for tensor in tensors_in(output)]
        [1.0, 0.0]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def _devices(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


def _cuda_generators(devices: Iterable[torch.device]) -> list[int]:
    """The indices of the GPUs whose random generators the models may use."""
    return sorted(device.index for device in devices if device.type == "cuda")


def _moved(batch: Any, devices: set[torch.device]) -> Any:
    """The batch on the model's device; unchanged if the model has several devices."""
    if len(devices) != 1 or all(tensor.device in devices for tensor in tensors_in(batch)):
        return batch
    (device,) = devices
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, devices) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [_moved(value, devices) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore every module's training mode, and the switches of quantizers and statistics."""
    modes = [(module, module.training) for module in model.modules()]
    observing = [
        (module, bool(module.observer_enabled.item()))
        for module in model.modules()
        if isinstance(module, ObservedQuantizer)
    ]
    updating = [
        module
        for module in model.modules()
        if isinstance(module, TrainedModule) and not module.keeps_statistics
    ]
    try:
        yield
    finally:
        for layer in updating:
            layer.freeze_statistics(False)
        for module, mode in modes:
            module.training = mode
        for quantizer, enabled in observing:
            quantizer.enable_observer(enabled)


def _freeze_ranges(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, ObservedQuantizer):
            module.enable_observer(False)
        elif isinstance(module, TrainedModule):
            module.freeze_statistics()


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def _integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, with one value for all NaNs."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _popcount(bits: Tensor) -> int:
    ones = torch.tensor([byte.bit_count() for byte in range(256)], device=bits.device)
    return int(ones[bits.flatten().view(torch.uint8).long()].sum())


__all__ = ["Comparison", "Difference", "VerifyReport", "tensors_in", "verify"]
