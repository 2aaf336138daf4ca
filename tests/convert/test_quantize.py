"""quantize_: layers that are converted, layers that stay and the reasons, failures."""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import ASYMMETRIC, CONFIGS, expected_output, outcome, unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchquant
from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import QuantizationConfig, quantize_
from torchquant.nn import QuantizedLinear
from torchquant.nn.float_linear import too_small

# ---------------------------------------------------------------- converted layers


class Block(nn.Module):
    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(features, 4 * features), "down": nn.Linear(4 * features, features)}
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.mlp["up"](self.norm(x)))
        down: Tensor = self.mlp["down"](hidden)
        return x + down


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


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


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(tokens)))
        return logits


def test_a_tied_head_is_untied_and_reported() -> None:
    model = LanguageModel()
    weight = model.embedding.weight
    values = weight.detach().clone()
    report = quantize_(model)
    assert outcome(report) == {"body": "quantized", "head": "quantized: untied"}
    assert report.notes == ("No longer shares its weight; has its own integer copy: head.",)
    assert model.embedding.weight is weight
    assert torch.equal(weight, values)
    assert model(torch.arange(5)).shape == (5, 100)


def test_a_tie_by_memory_alone() -> None:
    model = nn.ModuleDict({"head": nn.Linear(64, 100, bias=False)})
    model["embedding"] = nn.Embedding(100, 64, _weight=model["head"].weight)
    assert model["embedding"].weight is not model["head"].weight
    report = quantize_(model)
    assert outcome(report) == {"head": "quantized: untied"}
    assert report.bytes_before == 100 * 64 * 4


def test_two_linears_that_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    report = quantize_(model)
    assert outcome(report) == {"0": "quantized: untied", "1": "quantized: untied"}
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


# ---------------------------------------------------------------- layers that stay in float


class Subclass(nn.Linear):
    pass


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is transposed."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(64, 64))


def with_forward() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


def with_nan() -> nn.Module:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    return linear


COMPUTED = "weight computed from other tensors (weight_norm, spectral_norm, pruning)"
UNQUANTIZABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Subclass(64, 64), "Subclass (subclass of nn.Linear)"),
    "lazy": (lambda: nn.LazyLinear(64), "LazyLinear (subclass of nn.Linear)"),
    "conv1d": (lambda: Conv1D(128, 64), "Conv1D (not an nn.Linear)"),
    "float64": (lambda: nn.Linear(64, 64).double(), "weight of dtype float64"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(64, 64)),
        "ParametrizedLinear (parametrized)",
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(64, 64)),
        "ParametrizedLinear (parametrized)",
    ),
    "old_weight_norm": (old_weight_norm, COMPUTED),
    "old_spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(64, 64)), COMPUTED),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5), COMPUTED),
    "forward": (with_forward, "forward replaced on the instance"),
    "nan": (
        with_nan,
        "its weight holds NaN or infinity; check the checkpoint",
    ),
    "meta": (
        lambda: nn.Linear(64, 64, device="meta"),
        "on the meta device, without values; load its weights first",
    ),
    "empty": (lambda: nn.Linear(64, 0), "weight of shape [0, 64]"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("make", "reason"), UNQUANTIZABLE.values(), ids=UNQUANTIZABLE)
def test_what_cannot_be_quantized_is_reported(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"good": nn.Linear(64, 64), "bad": make()})
    kept = model["bad"]
    report = quantize_(model)
    assert outcome(report) == {"good": "quantized", "bad": f"skipped: {reason}"}
    assert model["bad"] is kept
    (bad,) = report.skipped
    assert bad.bytes_before == bad.bytes_after


def test_another_device_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    monkeypatch.setattr(Tensor, "is_cpu", False)  # simulates another device
    report = quantize_(model)
    monkeypatch.undo()
    assert outcome(report) == {"0": "skipped: on cpu; move it to the CPU or to a CUDA device first"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("make", "reason"), UNQUANTIZABLE.values(), ids=UNQUANTIZABLE)
def test_strict_raises_before_any_change(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"good": nn.Linear(64, 64), "bad": make(), "last": nn.Linear(64, 64)})
    modules = dict(model.named_modules())
    with pytest.raises(ValueError) as raised:
        quantize_(model, strict=True)
    assert str(raised.value) == (
        "quantize_: with strict=True every selected layer must be quantizable, got 1 that cannot "
        f"be quantized (bad: {reason}); exclude them with filter_fn, or pass strict=False to leave "
        "them in float"
    )
    assert dict(model.named_modules()) == modules
    report = quantize_(model, filter_fn=lambda _, name: name != "bad", strict=True)
    assert [layer.name for layer in report.quantized] == ["good", "last"]


def test_strict_does_not_change_results() -> None:
    model = nn.Sequential(Classifier(), LanguageModel(), Subclass(64, 64))
    with unchanged(model), pytest.raises(ValueError, match=r"2: Subclass \(subclass"):
        quantize_(model, strict=True)


def test_strict_accepts_layers_that_are_too_small() -> None:
    report = quantize_(Classifier(), strict=True)
    assert outcome(report)["head"] == "skipped: too small to benefit"


@pytest.mark.parametrize(
    ("out_features", "in_features", "small"),
    [
        (16, 256, False),
        (15, 4096, True),
        (128, 32, False),
        (4096, 31, True),
        (64, 64, False),
        (64, 63, True),
        (1, 1, True),
    ],
)
def test_too_small_depends_on_the_shape(out_features: int, in_features: int, small: bool) -> None:
    assert too_small(nn.Linear(in_features, out_features, device="meta")) is small
    model = nn.Sequential(nn.Linear(in_features, out_features))
    expected = "skipped: too small to benefit" if small else "quantized"
    assert outcome(quantize_(model)) == {"0": expected}


# ---------------------------------------------------------------- filter_fn


def test_filter_fn_is_called_with_every_linear_like_layer() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Linear(64, 64),
            "b": Subclass(64, 64),
            "c": Conv1D(64, 64),
            "d": nn.ReLU(),
            "e": nn.Linear(2, 2),
        }
    )
    seen: dict[str, nn.Module] = {}
    report = quantize_(model, filter_fn=lambda module, name: bool(seen.update({name: module})))
    assert seen == {name: model[name] for name in "abce"}
    assert set(outcome(report).values()) == {"skipped: filter_fn"}


def test_filter_fn_overrides_too_small() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1, bias=False))
    report = quantize_(model, filter_fn=lambda module, name: True)
    assert set(outcome(report).values()) == {"quantized"}
    x = floats(5, 4)
    assert_same_bits(model(x), expected_output(model[1], expected_output(model[0], x)))


def test_filter_fn_does_not_override_refusals() -> None:
    model = nn.Sequential(Subclass(64, 64))
    report = quantize_(model, filter_fn=lambda module, name: True)
    assert outcome(report) == {"0": "skipped: Subclass (subclass of nn.Linear)"}


@pytest.mark.parametrize(
    ("answer", "quantized"),
    [(1, True), ("yes", True), (None, False), (0, False), (torch.tensor(True), True)],
    ids=["one", "text", "none", "zero", "tensor"],
)
def test_filter_fn_may_return_any_truth_value(answer: Any, quantized: bool) -> None:
    report = quantize_(nn.Sequential(nn.Linear(64, 64)), filter_fn=lambda module, name: answer)
    assert bool(report.quantized) is quantized


def test_filter_fn_is_called_with_each_name_of_a_shared_layer() -> None:
    linear = nn.Linear(64, 64)
    for wanted in ("first", "second"):
        model = nn.ModuleDict({"first": linear, "second": linear})
        report = quantize_(model, filter_fn=lambda module, name, wanted=wanted: name == wanted)
        assert outcome(report) == {"first": "quantized: also at second"}


def test_a_filter_fn_that_raises_does_not_change_the_model() -> None:
    def raise_at_last(module: nn.Module, name: str) -> bool:
        if name == "head":
            raise RuntimeError("mine")
        return True

    model = Classifier()
    with unchanged(model), pytest.raises(RuntimeError, match="mine"):
        quantize_(model, filter_fn=raise_at_last)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (nn.Linear(64, 64),),
            ValueError,
            "quantize_: model must contain layers, got a bare Linear, which cannot be replaced in "
            "place; use torchquant.nn.QuantizedLinear.from_float(linear, config)",
        ),
        (
            (QuantizedLinear(64, 64),),
            ValueError,
            "quantize_: model must contain layers, got a bare QuantizedLinear, which is quantized "
            "already; use it as it is",
        ),
        (({},), TypeError, "quantize_: model must be an nn.Module, got dict"),
        (
            (nn.Sequential(), "int8"),
            TypeError,
            "quantize_: config must be a torchquant configuration such as "
            "Int8DynamicActivationInt8WeightConfig(), got 'int8'",
        ),
        (
            (nn.Sequential(), Config),
            TypeError,
            "quantize_: config must be a torchquant configuration such as "
            f"Int8DynamicActivationInt8WeightConfig(), got {Config.__name__} without parentheses; "
            f"call it: {Config.__name__}()",
        ),
        (
            (nn.Sequential(), None, ["head"]),
            TypeError,
            "quantize_: filter_fn must be a function of (module, name), got ['head']",
        ),
    ],
    ids=["linear", "quantized", "dict", "text", "class", "list"],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        quantize_(*arguments)
    assert str(raised.value) == text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_model_is_refused() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(TypeError, match="quantize the model from which it was made"):
        quantize_(model)
    report = quantize_(nn.Sequential(model, nn.Linear(64, 64)))
    assert outcome(report) == {"1": "quantized"}


def test_a_model_without_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with unchanged(model):
        report = quantize_(model, strict=True)
    assert report.layers == ()
    assert report.bytes_before == report.bytes_after == (8 * 3 * 9 + 8) * 4
    assert report.notes == ("The model has no linear layers; there was nothing to quantize.",)


def test_quantizing_twice_changes_nothing_and_is_reported() -> None:
    model = Classifier()
    first = quantize_(model)
    with unchanged(model):
        second = quantize_(model, strict=True)
        other = quantize_(model, ASYMMETRIC, filter_fn=lambda module, name: name != "head")
    assert outcome(second) == {
        name: "skipped: too small to benefit" if name == "head" else "skipped: already quantized"
        for name in outcome(first)
    }
    assert second.bytes_before == second.bytes_after == first.bytes_after
    assert outcome(other)["blocks.0.mlp.up"] == (
        "skipped: already quantized, with another configuration"
    )


# ---------------------------------------------------------------- torch's own transformers


@contextmanager
def counted(name: str) -> Iterator[list[int]]:
    """Count the calls of torch.<name>, one of torch's fused paths."""
    calls: list[int] = []
    original = getattr(torch, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, name, count)
        yield calls


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)


@pytest.mark.parametrize("nested", [False, True], ids=["layer", "encoder"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_encoder_keeps_its_fast_path(nested: bool) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2) if nested else encoder_layer()
    model = nn.Sequential(encoder, nn.Linear(64, 64)).eval()
    x = floats(3, 7, 64)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 4:] = True
    expected = [encoder(x), encoder(x, src_key_padding_mask=mask)]
    with torch.inference_mode():
        expected += [encoder(x), encoder(x, src_key_padding_mask=mask)]
    report = quantize_(model)
    assert outcome(report)["1"] == "quantized"
    assert len(report.quantized) == 1
    got = [encoder(x), encoder(x, src_key_padding_mask=mask)]
    with torch.inference_mode(), counted("_transformer_encoder_layer_fwd") as calls:
        got += [encoder(x), encoder(x, src_key_padding_mask=mask)]
    assert len(calls) == (4 if nested else 2), "the fused path must run"
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    model.train()(x).sum().backward()


def test_the_reasons_name_the_fast_path() -> None:
    report = quantize_(nn.Sequential(encoder_layer(), nn.MultiheadAttention(64, 4)))
    fused = "skipped: nn.TransformerEncoderLayer's fast path reads its weight"
    assert outcome(report) == {
        "0.self_attn.out_proj": "skipped: nn.MultiheadAttention reads its weight",
        "0.linear1": fused,
        "0.linear2": fused,
        "1.out_proj": "skipped: nn.MultiheadAttention reads its weight",
    }
    with pytest.raises(ValueError, match="reads its weight"):
        quantize_(nn.Sequential(encoder_layer()), strict=True)


@pytest.mark.parametrize("kdim", [None, 32], ids=["self", "cross"])
def test_multihead_attention_keeps_its_fast_path(kdim: int | None) -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True, kdim=kdim, vdim=kdim).eval()
    model = nn.ModuleList([attention, nn.Linear(64, 64)])
    query = floats(3, 7, 64)
    keys = query if kdim is None else floats(3, 5, kdim)
    with torch.inference_mode():
        expected = attention(query, keys, keys, need_weights=False)[0]
        quantize_(model)
        with counted("_native_multi_head_attention") as calls:
            got = attention(query, keys, keys, need_weights=False)[0]
    assert torch.equal(got, expected)
    assert len(calls) == (1 if kdim is None else 0)


def test_a_decoder_layer_is_quantized_where_torch_calls_its_layers() -> None:
    layer = nn.TransformerDecoderLayer(64, 4, 256, batch_first=True).eval()
    model = nn.Sequential(layer)
    target, memory = floats(2, 5, 64), floats(2, 6, 64)
    with torch.inference_mode():
        before = layer(target, memory)
        report = quantize_(model)
        after = layer(target, memory)
    assert [entry.name for entry in report.quantized] == ["0.linear1", "0.linear2"]
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    assert cosine.min() > 0.99


def test_a_whole_transformer() -> None:
    model = nn.Transformer(64, 4, 1, 1, 256, batch_first=True).eval()
    report = quantize_(model)
    assert [entry.name for entry in report.quantized] == [
        "decoder.layers.0.linear1",
        "decoder.layers.0.linear2",
    ]
    with torch.inference_mode():
        assert model(floats(2, 5, 64), floats(2, 6, 64)).isfinite().all()


# ---------------------------------------------------------------- failures, memory


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
config = torchquant.Int8DynamicActivationInt8WeightConfig(weight_symmetric=False)
for dtype in (torch.float32, torch.bfloat16):
    for shapes in ([(8192, 4096)], [(2048, 2048)] * 10):
        child = os.fork()  # the peak of a process never decreases
        if child == 0:
            measure(dtype, shapes, config)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_stays_below_the_float_model_and_its_largest_layer() -> None:
    command = [sys.executable, "-c", MEMORY_SCRIPT]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cases = [[int(number) for number in line.split()] for line in output.splitlines()]
    assert len(cases) == 4
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
