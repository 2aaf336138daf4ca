"""The proof that an int8 model's bits are exact, on the real inputs of its layers.

It has two levels, because the promise has. Each int8 layer gives the same bits for the same input
on every instruction set, with any number of threads, for a row alone or in a batch; and they are
the bits of the specification in plain torch. A whole model also runs torch's own float operators,
whose bits may depend on threads and batch; so the model's logits are compared only between
instruction sets, and before and after saving, where everything else stays the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import torchquant
from torchquant import cpu, functional
from torchquant.demo.steps import Steps
from torchquant.models import DigitsTransformer
from torchquant.nn import QuantizedLinear, QuantizedModule

ORACLE = "scalar"  # available everywhere
SAMPLED_ROWS = 128  # per layer, in checks that go row by row or through plain torch

CHECKS = {
    "logits": f"the logits of all test images, against those of {ORACLE}",
    "layers": f"all outputs of the int8 layers, against those of {ORACLE}",
    "threads": "all outputs of the int8 layers, with one thread and with several",
    "rows": "rows of the int8 layers, alone and within the batch",
    "specification": "rows of the int8 layers, against the specification in plain torch",
    "file": "the logits of all test images, before saving to a file and after loading it",
    "training": "outputs of the trained model and its layers, before and after conversion",
    "networks": (
        f"convolutional networks: the trained one, before and after conversion; the logits of the "
        f"calibrated one, against those of {ORACLE}"
    ),
}


@dataclass
class Check:
    """How many values one of `CHECKS` compared on one instruction set, and how many differed."""

    name: str
    isa: str
    values: int = 0
    differing: int = 0

    @property
    def passed(self) -> bool:
        """True if values were compared and no bit differed."""
        return self.values > 0 and self.differing == 0

    def compare(self, actual: Tensor, expected: Tensor) -> None:
        """Count the values of ``expected``, and those of ``actual`` that differ from them."""
        self.values += expected.numel()
        self.differing += count_differing(actual, expected)


def count_differing(actual: Tensor, expected: Tensor) -> int:
    """The number of fp32 values that differ in any bit; all if shapes or types differ.

    Example:
        >>> import torch
        >>> from torchquant.demo.exactness import count_differing
        >>> count_differing(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
        1
    """
    if actual.shape != expected.shape or not actual.dtype == expected.dtype == torch.float32:
        return expected.numel()
    same = actual.contiguous().view(torch.int32) == expected.contiguous().view(torch.int32)
    return int(same.logical_not().sum())


def check_logits(model: nn.Module, images: Tensor, steps: Steps) -> list[Check]:
    """The whole model on every instruction set, compared with the scalar kernels."""
    logits = {}
    for isa in cpu.available_isas():
        steps.begin(f"exactness of the model, {isa}")
        with forced_isa(isa):
            logits[isa] = model(images)
    expected = logits.pop(ORACLE)
    checks = []
    for isa, actual in logits.items():
        checks.append(Check("logits", isa))
        checks[-1].compare(actual, expected)
    return checks


def check_layers(model: nn.Module, images: Tensor, threads: int, steps: Steps) -> list[Check]:
    """Every int8 layer, on every instruction set, on its inputs for ``images``."""
    isas = cpu.available_isas()
    layers = [Check("layers", isa) for isa in isas if isa != ORACLE]
    one_thread = [Check("threads", isa) for isa in isas]
    alone = [Check("rows", isa) for isa in isas]
    specified = [Check("specification", isa) for isa in isas]
    for name, layer, rows in layers_with_inputs(model, images):
        steps.begin(f"exactness of {name}")
        sample = torch.linspace(0, len(rows) - 1, SAMPLED_ROWS).long()
        specification = specified_output(layer, rows[sample])
        outputs = {isa: output_on(isa, threads, layer, rows) for isa in isas}
        for check in layers:
            check.compare(outputs[check.isa], outputs[ORACLE])
        for check in one_thread:
            check.compare(output_on(check.isa, 1, layer, rows), outputs[check.isa])
        for check in alone:
            with forced_isa(check.isa), torch_threads(threads):
                single = [layer(row) for row in rows[sample].chunk(len(sample))]
            check.compare(torch.cat(single), outputs[check.isa][sample])
        for check in specified:
            check.compare(outputs[check.isa][sample], specification)
    return layers + one_thread + alone + specified


def check_file(model: nn.Module, images: Tensor, steps: Steps) -> list[Check]:
    """Save the int8 model, load the file into a new, untrained model and compare the logits."""
    steps.begin("saving and loading")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits_int8.safetensors"
        torchquant.save(model, path)
        loaded = torchquant.load(path, DigitsTransformer().eval())
    check = Check("file", cpu.active_isa())
    check.compare(loaded(images), model(images))
    return [check]


def layers_with_inputs(
    model: nn.Module, images: Tensor
) -> list[tuple[str, QuantizedLinear, Tensor]]:
    """Name, layer and input rows ``[M, K]`` of every int8 layer, in a pass over ``images``."""
    found: list[tuple[str, QuantizedLinear, Tensor]] = []

    def record(name: str, layer: QuantizedLinear, input: Tensor) -> None:
        found.append((name, layer, input.flatten(0, -2)))

    hooks = [
        module.register_forward_pre_hook(
            lambda layer, inputs, name=name: record(name, layer, inputs[0])
        )
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def specified_output(layer: QuantizedLinear, rows: Tensor) -> Tensor:
    """The layer's output by the specification: sums in int64, exact fused multiply-add."""
    return functional.linear_dynamic(
        rows,
        layer.qweight,
        layer.weight_scale,
        layer.weight_zero_point,
        layer.bias,
        symmetric=layer.config.activations.symmetric,
        activation=layer.activation,
    )


def output_on(isa: str, threads: int, layer: QuantizedLinear, rows: Tensor) -> Tensor:
    """The layer's output ``[M, N]`` on one instruction set, with that number of threads."""
    with forced_isa(isa), torch_threads(threads):
        output: Tensor = layer(rows)
    return output


@contextmanager
def forced_isa(isa: str) -> Iterator[None]:
    """``cpu.use_isa``, with an error if another instruction set is active nevertheless."""
    with cpu.use_isa(isa):
        if cpu.active_isa() != isa:
            raise RuntimeError(
                f"torchquant.cpu.use_isa({isa!r}) had no effect: {cpu.active_isa()!r} is active"
            )
        yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` threads, then restore the previous number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
