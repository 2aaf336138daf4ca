"""quantize_: the layers that it converts, memory, and failures."""

import copy
import os
import sys
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.ahead import NewFolder, Processes, Run, Selection
from support.float_models import Classifier, LanguageModel
from support.layers import ASYMMETRIC, CONFIGS, expected_output, outcome
from support.scripts import run_python
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import torchquant
from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import QuantizationConfig, quantize_
from torchquant.nn import QuantizedLinear


@pytest.mark.parametrize("config", [None, *CONFIGS.values()], ids=["none", *CONFIGS])
def test_a_nested_model(config: QuantizationConfig | None) -> None:
    model = Classifier().eval()
    tokens = torch.randint(0, 50, (8, 12))
    with torch.no_grad():
        before = model(tokens)
        report = quantize_(model, config)
        after = model(tokens)
    assert outcome(report) == {
        "blocks.0.mlp.up": "quantized",
        "blocks.0.mlp.down": "quantized",
        "blocks.1.mlp.up": "quantized",
        "blocks.1.mlp.down": "quantized",
        "head": "skipped: too small to benefit",
    }
    for name, module in model.named_modules():
        if ".mlp." in name:
            assert isinstance(module, QuantizedLinear)
            assert module.config == (config or Config())
    assert type(model.head) is nn.Linear
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.99


def test_a_converted_layer_equals_the_result_of_from_float() -> None:
    linear = nn.Linear(96, 80)
    model = nn.Sequential(copy.deepcopy(linear))
    quantize_(model, ASYMMETRIC)
    x = floats(5, 96)
    assert_same_bits(model(x), QuantizedLinear.from_float(linear, ASYMMETRIC)(x))
    assert_same_bits(model(x), expected_output(model[0], x))


def test_the_other_modules_stay_the_same_objects() -> None:
    model = Classifier()
    kept = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] not in ("up", "down")
    }
    quantize_(model)
    now = dict(model.named_modules())
    assert all(now[name] is module for name, module in kept.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_low_precision(dtype: torch.dtype) -> None:
    model = Classifier().to(dtype).eval()
    tokens = torch.randint(0, 50, (8, 12))
    with torch.no_grad():
        before = model(tokens)
        quantize_(model)
        after = model(tokens)
    assert after.dtype == dtype
    assert model.blocks[0].mlp["up"].weight_scale.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(before.float(), after.float()).min() > 0.99


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_modes_are_kept(training: bool, requires_grad: bool) -> None:
    model = Classifier().train(training).requires_grad_(requires_grad)
    quantize_(model)
    assert all(module.training is training for module in model.modules())
    assert all(p.requires_grad is requires_grad for p in model.parameters())


def test_a_layer_registered_twice_is_replaced_once_in_both_places() -> None:
    linear = nn.Linear(64, 64)
    model = nn.ModuleDict(
        {"first": linear, "second": linear, "deep": nn.Sequential(nn.ReLU(), linear)}
    )
    report = quantize_(model)
    assert outcome(report) == {"first": "quantized: also at second, deep.1"}
    assert isinstance(model["first"], QuantizedLinear)
    assert model["first"] is model["second"] is model["deep"][1]
    assert report.bytes_after == report.layers[0].bytes_after


def test_a_tied_head_is_untied_and_reported() -> None:
    model = LanguageModel()
    weight = model.embedding.weight
    values = weight.detach().clone()
    report = quantize_(model)
    assert outcome(report) == {
        "body": "quantized",
        "head": "quantized: untied from embedding.weight",
    }
    assert report.notes == (
        "Has its own integer copy of a shared weight, which training does not change: head.",
    )
    assert model.embedding.weight is weight
    assert torch.equal(weight, values)
    assert model(torch.arange(5)).shape == (5, 100)


def test_a_tie_by_memory_alone() -> None:
    model = nn.ModuleDict({"head": nn.Linear(64, 100, bias=False)})
    model["embedding"] = nn.Embedding(100, 64, _weight=model["head"].weight)
    assert model["embedding"].weight is not model["head"].weight
    before = 100 * 64 * 4
    report = quantize_(model)  # an integer copy beside the embedding would only add memory
    assert outcome(report) == {
        "head": "skipped: shares its weight with embedding.weight; an integer copy would make the "
        "model larger than in float"
    }
    assert report.bytes_after == report.bytes_before == before
    report = quantize_(model, filter_fn="head", strict=True)
    assert outcome(report) == {"head": "quantized: untied from embedding.weight"}
    assert report.bytes_before == before
    assert report.summary().endswith("x larger)")


def test_two_linears_that_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    report = quantize_(model)
    assert outcome(report) == {
        "0": "quantized: untied from 1.weight",
        "1": "quantized: untied from 0.weight",
    }
    assert torch.equal(model[0].qweight, model[1].qweight)
    assert not torch.equal(model[0].bias, model[1].bias)
    # Before: one float weight and two biases. After: two of each.
    assert report.bytes_before == (64 * 64 + 2 * 64) * 4
    assert report.bytes_after == sum(layer.bytes_after for layer in report.layers)


def test_hooks_are_kept_and_can_still_be_removed() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    calls: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        model[0].register_forward_hook(
            lambda module, args, kwargs, out: calls.append("after"), with_kwargs=True
        ),
        model[0].register_full_backward_pre_hook(lambda *_: calls.append("backward before")),
        model[0].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    quantize_(model)
    model(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward before", "backward"]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert calls == []


def test_running_out_of_memory_leaves_a_model_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classifier().eval()
    tokens = torch.randint(0, 50, (4, 12))
    from_float = QuantizedLinear.from_float
    calls: list[nn.Linear] = []

    def fail_at_third(linear: nn.Linear, *args: Any) -> QuantizedLinear:
        calls.append(linear)
        if len(calls) == 3:
            raise MemoryError("no more")
        return from_float(linear, *args)

    monkeypatch.setattr(QuantizedLinear, "from_float", fail_at_third)
    with torch.no_grad():
        before = model(tokens)
        with pytest.raises(MemoryError):
            quantize_(model)
        after = model(tokens)
    kinds = [type(m) for name, m in model.named_modules() if ".mlp." in name]
    assert kinds == [QuantizedLinear, QuantizedLinear, nn.Linear, nn.Linear]
    assert model.blocks[1].mlp["up"] is calls[2]
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.99
    monkeypatch.undo()
    assert len(quantize_(model).quantized) == 2, "and a second try finishes"


MEMORY_SCRIPT = """
import os, torch, torchquant
from torch import nn
from torchquant.graph.modules import tensor_bytes

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def measure(dtype, shapes, config):
    torchquant.quantize_(nn.Sequential(nn.Linear(512, 512, dtype=dtype)), config)  # loads the code
    before = status("VmRSS")
    model = nn.Sequential(*(nn.Linear(k, n, dtype=dtype) for n, k in shapes))
    size, largest = tensor_bytes(model), max(tensor_bytes(layer) for layer in model)
    report = torchquant.quantize_(model, config)
    assert len(report.quantized) == len(shapes)
    peak, after = status("VmHWM") - before, status("VmRSS") - before
    print(size, largest, peak, after, report.bytes_after, flush=True)

torch.set_num_threads(1)  # with more threads, a forked process could not use OpenMP
int8 = torchquant.Int8DynamicActivationInt8WeightConfig(weight_symmetric=False)
int4 = torchquant.Int8DynamicActivationIntxWeightConfig(4, 96, symmetric=False)
one, many = [(8192, 4096)], [(2048, 2048)] * 10
both = torch.float32, torch.bfloat16
cases = [(dtype, shapes, int8) for dtype in both for shapes in (one, many)]
for case in (*cases, (torch.float32, many, int4), (torch.bfloat16, one, int4)):
    child = os.fork()  # the peak of a process never decreases
    if child == 0:
        measure(*case)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[str]]:
    environment = dict(os.environ)
    test = test_peak_memory_stays_below_the_float_model_and_its_largest_layer
    return (
        lambda script: run_python(script, environment=environment, fresh=True),
        [MEMORY_SCRIPT] if tests.has(test) else [],
    )


@pytest.mark.cpu_only("starts processes, which do not run on the path")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_stays_below_the_float_model_and_its_largest_layer(
    request: pytest.FixtureRequest, processes: Processes
) -> None:
    done = processes.result(request.module, MEMORY_SCRIPT)
    assert done.returncode == 0, done.stderr
    cases = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(cases) == 6
    for size, largest, peak, after, reported in cases:
        assert size > 60e6
        assert size <= peak < size + largest
        assert after < reported + 20e6, "the float weights must be gone"


def test_the_public_names() -> None:
    assert torchquant.quantize_ is quantize_
    assert {"quantize_", "QuantizationReport", "LayerReport"} <= set(torchquant.__all__)


def test_parametrizations_still_work() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(64, 64)))
    quantize_(model)
    assert parametrize.is_parametrized(model[0])
    assert model(floats(2, 64)).shape == (2, 64)
