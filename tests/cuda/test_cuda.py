"""Operators on a real GPU: the CPU's bits on both paths, and what surrounds a call there.

Modules and verbs are in test_cuda_modules.py, what needs no GPU of the paths in test_cuda_path.py.
Tests without the mark `cuda` run the same cases on the CPU, over the fallback.
"""

import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    FLOATS,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    floats,
    integers,
    positive,
    sprinkle,
)
from support.aten import ATEN, KERNELS, arguments, flat, packed
from torch import Tensor, nn

import torchquant
from torchquant import cuda
from torchquant.cuda.host import FAMILY_OF

CUDA = "cuda"
# A kernel that fails leaves its operator to ATen with a message: here that is a failure.
pytestmark = pytest.mark.filterwarnings("error:torchquant:RuntimeWarning")


def on_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    return pytest.mark.cuda(needed(test))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measuring would compile every configuration for every shape here; files go elsewhere."""
    monkeypatch.setenv("TORCHQUANT_AUTOTUNE", "0")
    monkeypatch.setenv("TORCHQUANT_CACHE_DIR", str(tmp_path))


@pytest.fixture
def tuners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Fresh tuners that measure, and the folder of their files."""
    from torchquant.triton.tuning import choose as tuning

    monkeypatch.setenv("TORCHQUANT_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_tuners", {})
    return tmp_path


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has called nothing yet: no device or operator has been judged."""
    dispatcher = cuda.paths._dispatcher
    for name in ("_sound", "_device_reasons", "_operator_reasons", "_said"):
        monkeypatch.setattr(dispatcher, name, type(getattr(dispatcher, name))())
    dispatcher.set_path(dispatcher.path)
    yield
    monkeypatch.undo()
    dispatcher.set_path(dispatcher.path)


# ---------------------------------------------------------------- every operator

SIZES = st.one_of(
    st.just(1),
    st.integers(1, 40),
    st.sampled_from([63, 64, 65, 100, 127, 128, 129, 255, 257, 333, 1000]),
)
DRAWS = st.data()


class Case:
    """Draws the arguments of a call."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.m, self.n, self.k = (data.draw(SIZES, label=name) for name in "MNK")
        self.seed = data.draw(st.integers(0, 10**6), label="seed")

    def pick(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    def x(self, *shape: int, dtype: torch.dtype | None = None, finite: bool = False) -> Tensor:
        values = floats(*shape, seed=self.seed)
        if not finite:
            spice = self.pick((), SPECIAL, NOT_FINITE)
            values = sprinkle(values, spice, self.seed)
        return values.to(dtype or self.pick(*FLOATS))

    def input(self, **how: Any) -> Tensor:
        lead = self.pick((self.m,), (1, self.m), (2, 3)) if self.m == 6 else (self.m,)
        return self.x(*lead, self.k, **how)

    def zero_points(self, *shape: int, low: int = -128, high: int = 127) -> Tensor | None:
        values = integers(*shape, seed=self.seed).to(torch.int32)
        return self.pick(None, values.add(128 + low).clamp(low, high))

    def granularity(self) -> tuple[tuple[int, ...], int | None, int | None]:
        """Scale's shape, axis, group_size."""
        group = self.pick(1, 8, 32, 100)
        return self.pick(
            ((1,), None, None),
            ((self.m,), 0, None),
            ((self.k,), 1, None),
            ((self.m, -(-self.k // group)), None, group),
            ((self.m, 1), None, self.k),
        )

    def bits(self, real: bool = True) -> tuple[Tensor, Tensor | None, int, int]:
        """Scale, zero point, qmin, qmax; and the layout's arguments follow."""
        shape, axis, group = self.granularity()
        zero = self.pick("none", "integer", "real") if real else self.pick("none", "integer")
        zeros = {
            "none": None,
            "integer": integers(*shape, seed=self.seed).to(torch.int32),
            "real": floats(*shape, seed=self.seed),
        }[zero]
        qmin, qmax = self.pick((-128, 127), (-8, 7), (0, 255), (-127, 127))
        return positive(*shape, seed=self.seed), zeros, qmin, qmax, axis, group

    def weight(self) -> tuple[Any, Tensor, Tensor | None]:
        scales = self.pick(1, self.n)
        weight = packed(integers(self.n, self.k, seed=self.seed))
        return weight, positive(scales, seed=self.seed), self.zero_points(scales)

    def bias(self) -> Tensor | None:
        return self.pick(None, floats(self.n, seed=self.seed + 1))


def _quantize(c: Case) -> tuple[Any, ...]:
    scale, zero, qmin, qmax, axis, group = c.bits()
    dtype = torch.uint8 if qmax == 255 else torch.int8
    return (c.x(c.m, c.k), scale, zero, qmin, qmax, axis, group, dtype)


def _dequantize(c: Case) -> tuple[Any, ...]:
    scale, zero, _, _, axis, group = c.bits()
    q = integers(c.m, c.k, seed=c.seed, dtype=c.pick(torch.int8, torch.uint8))
    return (q, scale, zero, axis, group, c.pick(*FLOATS))


def _rows(c: Case) -> tuple[Any, ...]:
    given = c.pick(True, False)
    qmin, qmax = c.pick((-128, 127), (-8, 7))
    scale = positive(1, seed=c.seed) if given else None
    zero = c.zero_points(1, low=qmin, high=qmax) if given else None
    return (c.input(), scale, zero, qmin, qmax, c.pick(True, False))


def _pack(c: Case) -> tuple[Any, ...]:
    scale = c.pick(None, positive(1, seed=c.seed), positive(c.n, seed=c.seed))
    return (c.x(c.n, c.k), scale, *c.pick((-127, 127), (-8, 7)), c.pick(True, False))


def _int8_mm(c: Case) -> tuple[Any, ...]:
    dtype = c.pick(torch.int8, torch.uint8)
    weight = packed(integers(c.n, c.k, seed=c.seed))
    return (integers(c.m, c.k, seed=c.seed, dtype=dtype), weight, c.n)


def _dynamic(c: Case) -> tuple[Any, ...]:
    rest = (c.pick(True, False), c.pick(*ACTIVATIONS), c.pick(None, *FLOATS), c.pick(8, 8, 4))
    return (c.input(), *c.weight(), c.bias(), c.n, *rest)


def _split(c: Case) -> tuple[Any, ...]:
    sizes = [c.n, 7, 16]
    weights = packed(*(integers(n, c.k, seed=c.seed + n) for n in sizes))
    scale = positive(sum(sizes), seed=c.seed)
    names = c.pick([], ["gelu", "none", "relu"])
    zero = c.zero_points(sum(sizes))
    bias = c.pick(None, floats(sum(sizes), seed=c.seed))
    return (c.input(), weights, scale, zero, bias, sizes, c.pick(True, False), names)


def _static(c: Case) -> tuple[Any, ...]:
    kind = c.pick("float", "int8", "uint8")
    if kind == "float":
        x = c.input()
    else:
        x = integers(c.m, c.k, seed=c.seed, dtype=getattr(torch, kind))
    rows = 1 if kind == "float" else c.pick(1, c.m)
    shape = (1,) if rows == 1 else (rows, 1)
    weight, scale, zero = c.weight()
    bias = c.bias() if kind == "float" else c.pick(c.bias(), integers(c.n).to(torch.int32))
    zero_x = c.zero_points(*shape, low=0, high=255) if kind == "uint8" else c.zero_points(*shape)
    given = (x, positive(*shape, seed=c.seed), zero_x, weight, scale, zero, bias)
    if c.pick(True, False):
        return (*given, c.n, c.pick(*ACTIVATIONS), c.pick(*FLOATS))
    return (*given, c.n, c.pick(*ACTIVATIONS), torch.int8, positive(1, seed=c.seed), 3)


def _norm_of(c: Case) -> tuple[Tensor, Tensor | None]:
    x = c.input()
    return x, c.pick(None, floats(c.k, seed=c.seed).to(c.pick(torch.float32, x.dtype)))


def _rms_norm(c: Case) -> tuple[Any, ...]:
    return (*_norm_of(c), 1e-6, c.pick(True, False))


def _layer_norm(c: Case) -> tuple[Any, ...]:
    x, weight = _norm_of(c)
    bias = None if weight is None else c.pick(None, weight.flip(0))
    return (x, weight, bias, 1e-5, c.pick(None, x.flip(0)))


def _attention(c: Case) -> tuple[Any, ...]:
    heads, depth = c.pick((2, 2), (4, 1)), c.pick(8, 32, 33)
    queries, keys = min(c.m, 70), min(c.n, 70)
    dtype = c.pick(*FLOATS)
    q = c.x(2, heads[0], queries, depth, dtype=dtype, finite=True)
    k, v = (c.x(2, heads[1], keys, d, dtype=dtype, finite=True) for d in (depth, 16))
    return (q, k, v, None, None, c.pick(True, False))


def _fake(c: Case) -> tuple[Any, ...]:
    return (c.x(c.m, c.k), *c.bits())


def _learned(c: Case) -> tuple[Any, ...]:
    scale, _, qmin, qmax, axis, group = c.bits()
    offset = c.pick(None, floats(*scale.shape, seed=c.seed))
    return (c.x(c.m, c.k), scale, offset, qmin, qmax, 0.25, axis, group)


def _minmax(c: Case) -> tuple[Any, ...]:
    _, axis, group = c.granularity()
    return (c.x(c.m, c.k), axis, group)


def _gated(c: Case) -> tuple[Any, ...]:
    dtype = c.pick(*FLOATS)
    return (c.input(dtype=dtype), c.input(dtype=dtype), c.pick(*ACTIVATIONS))


def _mask_gradient(c: Case) -> tuple[Any, ...]:
    grad = c.x(c.m, c.k)
    return (grad, integers(-(-grad.numel() // 8), seed=c.seed, dtype=torch.uint8))


CASES: dict[str, Callable[[Case], tuple[Any, ...]]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "quantize_per_token": lambda c: (c.input(), c.pick(True, False)),
    "pack_weight": lambda c: (integers(c.n, c.k, seed=c.seed),),
    "unpack_weight": lambda c: (packed(integers(c.n, c.k, seed=c.seed)), c.n, c.k),
    "int8_mm": _int8_mm,
    "linear_dynamic": _dynamic,
    "linear_dynamic_split": _split,
    "linear_static": _static,
    "activation": lambda c: (c.input(), c.pick(*ACTIVATIONS), c.pick(None, *FLOATS)),
    "gated_activation": _gated,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "attention": _attention,
    "fake_quantize": _fake,
    "fake_quantize_mask": _fake,
    "in_range": _fake,
    "positive": lambda c: (c.x(c.m, c.k),),
    "mask_gradient": _mask_gradient,
    "fake_quantize_learned": _learned,
    "minmax": _minmax,
    "quantize_rows": _rows,
    "quantize_pack": _pack,
}
# Results whose sums have no promised order, and a composition of others: tests of their own below.
OTHERS = {"fake_quantize_learned_backward", "mm_fake_quantized", "qat_linear"}
PACKS = {"pack_weight", "quantize_pack"}  # whose first result is in the device's own layout


def compare(name: str, args: tuple[Any, ...], namespace: Any, device: str) -> None:
    """``namespace``'s operator on ``device`` gives the bits of the CPU's kernel."""
    positional, _ = arguments(KERNELS, "cpu", *args)
    expected = list(flat(getattr(KERNELS, name)(*positional)))
    positional, _ = arguments(namespace, device, *args)
    got = list(flat(getattr(namespace, name)(*positional)))
    if name in PACKS:
        n, k = args[0].shape
        expected[0] = KERNELS.unpack_weight(expected[0], n, k)
        got[0] = namespace.unpack_weight(got[0], n, k)
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.device.type == device
        assert_same_bits(a.cpu(), b, f"{name}, result {i}")


@pytest.mark.parametrize("name", CASES)
@given(data=DRAWS)
@settings(max_examples=5, suppress_health_check=list(HealthCheck))
def test_cases_of_operators_on_the_cpu(name: str, data: Any) -> None:
    """That the cases below are right; test_aten_*.py have more of them."""
    compare(name, CASES[name](Case(data)), ATEN, "cpu")


@on_gpu
@pytest.mark.parametrize("path", ["triton", "aten"])
@pytest.mark.parametrize("name", CASES)
@given(data=DRAWS)
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
def test_the_cpus_bits(name: str, path: str, data: Any) -> None:
    if path not in cuda.available_paths():
        pytest.skip(f"path {path}: not on this GPU")
    with cuda.use_path(path):
        compare(name, CASES[name](Case(data)), KERNELS, CUDA)
        if path == "triton" and name in FAMILY_OF:
            assert (name, 0) in cuda.paths._dispatcher._sound, "Triton's kernel ran"


def test_every_operator_has_cases() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if "torchquant::" in name}
    assert {name.removeprefix("torchquant::") for name in names} == CASES.keys() | OTHERS


@on_gpu
@pytest.mark.parametrize("granularity", ["tensor", "axis", "group"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_a_learned_step(granularity: str, dtype: torch.dtype) -> None:
    """Input's to the bit; the step's and the offset's up to the order of sums, but each time so."""
    shape, layout = {
        "tensor": ((1,), (None, None)),
        "axis": ((65,), (0, None)),
        "group": ((65, 4), (None, 100)),
    }[granularity]
    x, grad = floats(65, 333).to(dtype), floats(65, 333, seed=1).to(dtype)
    zero = integers(*shape).to(torch.int32)
    call = (grad, x, positive(*shape), zero, -8, 7, *layout)
    expected = KERNELS.fake_quantize_learned_backward(*call)
    moved = [a.cuda() if isinstance(a, Tensor) else a for a in call]
    got = KERNELS.fake_quantize_learned_backward(*moved)
    assert_same_bits(got[0].cpu(), expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4 * float(b.abs().max()))
    for _ in range(3):
        again = KERNELS.fake_quantize_learned_backward(*moved)
        assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


@on_gpu
def test_the_product_of_a_gradient_and_a_fake_quantized_weight() -> None:
    call = (floats(33, 65), floats(65, 129, seed=1), positive(65), None, -8, 7)
    got = KERNELS.mm_fake_quantized(*(a.cuda() if isinstance(a, Tensor) else a for a in call))
    expected = KERNELS.mm_fake_quantized(*call)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


@on_gpu
def test_a_training_forward() -> None:
    call = (floats(33, 65), floats(37, 65, seed=1), floats(37), None, None, None, -128, 127, True)
    rest = (None, -8, 7, True, "relu")
    got = KERNELS.qat_linear(*(a.cuda() if isinstance(a, Tensor) else a for a in call), *rest)
    assert_same_bits(got.cpu(), KERNELS.qat_linear(*call, *rest))


# ---------------------------------------------------------------- one layer's call


def layer(
    rows: int = 5, outputs: int = 96, inputs: int = 160, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A linear operator on the GPU, an input there, and the CPU's result."""
    weight, scale, bias = integers(outputs, inputs), positive(outputs), floats(outputs)
    x = floats(rows, inputs, dtype=dtype)
    rest = (None, bias, outputs, True, "gelu")
    expected = KERNELS.linear_dynamic(x, KERNELS.pack_weight(weight), scale, *rest)
    there = KERNELS.pack_weight(weight.cuda())
    s, b = scale.cuda(), bias.cuda()

    def call(x: Tensor) -> Tensor:
        return KERNELS.linear_dynamic(x, there, s, None, b, outputs, True, "gelu")

    return call, x.cuda(), expected


PATHS = pytest.mark.parametrize("path", ["auto", "aten"])


@on_gpu
@PATHS
def test_a_cuda_graph(path: str) -> None:
    with cuda.use_path(path):
        call, x, expected = layer()
        rows = torch.zeros_like(x)
        call(rows)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(rows)
        for factor in (1.0, 0.0, 1.0):
            rows.copy_(x * factor)
            result.fill_(torch.nan)
            graph.replay()
        assert_same_bits(result.cpu(), expected)


@on_gpu
def test_a_cuda_graph_without_a_call_before(fresh: None) -> None:
    call, x, expected = layer()
    with cuda.use_path("aten"):  # cuBLAS wants to be there before a capture
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.warns(RuntimeWarning, match="Call the model once before capturing it"),
        torch.cuda.graph(graph),
    ):
        result = call(x)
    graph.replay()
    assert_same_bits(result.cpu(), expected)
    assert_same_bits(call(x).cpu(), expected)
    assert ("linear_dynamic", 0) in cuda.paths._dispatcher._sound


@on_gpu
@PATHS
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_torch_compile(path: str, mode: str | None) -> None:
    """The operator stays opaque, so its bits stay; also in the graphs that Inductor captures."""
    torch._dynamo.reset()
    with cuda.use_path(path), torch.inference_mode():
        call, x, expected = layer()
        compiled = torch.compile(lambda x: call(x * 2.0) * 2.0, fullgraph=True, mode=mode)
        expected = (call(x * 2.0) * 2.0).cpu()
        for _ in range(4):
            assert_same_bits(compiled(x.clone()).cpu(), expected)


@on_gpu
def test_torch_compile_sees_no_kernel_in_eager_frames() -> None:
    """Dynamo leaves a frame with a graph break in a `with` alone, and looks at the ones below."""
    torch._dynamo.reset()
    call, x, expected = layer()
    graphs = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    def function(x: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.current_stream()), open(os.devnull):
            torch._dynamo.graph_break()
            return call(x)

    assert_same_bits(torch.compile(function, backend=backend)(x).cpu(), expected)


@on_gpu
@PATHS
def test_autocast_changes_no_operator(path: str) -> None:
    with cuda.use_path(path):
        call, x, expected = layer()
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cuda", dtype):
                assert_same_bits(call(x).cpu(), expected)


@on_gpu
@PATHS
def test_streams(path: str) -> None:
    """Each call runs on the stream that is current, after what that stream has to do first."""
    with cuda.use_path(path):
        call, x, expected = layer(rows=64, outputs=512, inputs=1024)
        call(x)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(3)]
        results = []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                rows = torch.full_like(x, torch.nan)
                torch.cuda._sleep(20_000_000)
                rows.copy_(x)
                results.append(call(rows))
        torch.cuda.synchronize()
        for result in results:
            assert_same_bits(result.cpu(), expected)


@on_gpu
def test_threads() -> None:
    call, x, expected = layer()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    assert_same_bits(call(x).cpu(), expected)
        except BaseException as error:
            failures.append(error)

    torch.cuda.synchronize()
    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


@on_gpu
@PATHS
def test_tensors_on_different_devices_are_refused(path: str) -> None:
    weight = KERNELS.pack_weight(integers(16, 32).cuda())
    x, scale = floats(2, 32), positive(16)
    calls = [
        (x.cuda(), weight, scale, None, None, 16),
        (x.cuda(), weight.cpu(), scale.cuda(), None, None, 16),
        (x.cuda(), weight, scale.cuda(), None, floats(16), 16),
        (x.cuda(), weight, scale.cuda(), None, floats(16).pin_memory(), 16),
        (x, weight, scale.cuda(), None, None, 16),
    ]
    with cuda.use_path(path):
        for call in calls:
            with pytest.raises(ValueError, match=r"linear_dynamic: .*(cpu|cuda:0)"):
                KERNELS.linear_dynamic(*call)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@PATHS
def test_several_devices(path: str) -> None:
    with cuda.use_path(path):
        call, x, expected = layer()
        assert_same_bits(call(x).cpu(), expected)
        with torch.cuda.device(1):  # another device is current than the tensors'
            assert_same_bits(call(x).cpu(), expected)
        with pytest.raises(ValueError, match="cuda:1"):
            call(x.to("cuda:1"))
        q = KERNELS.quantize_per_token(x.to("cuda:1"))
        for a, b in zip(q, KERNELS.quantize_per_token(x.cpu()), strict=True):
            assert a.device == torch.device("cuda", 1)
            assert_same_bits(a.cpu(), b)


# ---------------------------------------------------------------- no waiting


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    def start() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


@on_gpu
@PATHS
@pytest.mark.parametrize("name", sorted(CASES))
def test_no_operator_waits_for_the_device(
    name: str, path: str, waiting_is_an_error: Callable[[], None]
) -> None:
    from torchquant.triton import selftest

    with cuda.use_path(path):
        calls = list(selftest.samples(name, torch.device("cuda")))
        operator = getattr(KERNELS, name)
        for call in calls:
            operator(*call)
        waiting_is_an_error()
        for call in calls:
            operator(*call)


@on_gpu
def test_a_first_call_may_wait_whatever_the_mode_says(
    fresh: None, waiting_is_an_error: Callable[[], None]
) -> None:
    call, x, expected = layer()
    waiting_is_an_error()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = call(x)
    assert torch.cuda.get_sync_debug_mode() == 2
    torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(result.cpu(), expected)


# ---------------------------------------------------------------- errors


@on_gpu
@pytest.mark.filterwarnings("error")
def test_no_memory_for_the_result(fresh: None) -> None:
    """torch's error as it is, no message, and the path stays."""
    x = torch.zeros(1, 1, device=CUDA)
    KERNELS.activation(x, "relu")
    huge = x.expand(1 << 22, 1 << 22)
    with pytest.raises(torch.OutOfMemoryError):
        KERNELS.activation(huge, "relu")
    assert cuda.gpus()[0].left_to_aten == {}
    KERNELS.activation(x, "relu")


@on_gpu
def test_a_gpu_that_triton_does_not_serve(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    call, x, expected = layer()
    monkeypatch.setattr("torchquant.cuda.dispatch.LEAST_CAPABILITY", (99, 0))
    cuda.paths._dispatcher.set_path("auto")
    with pytest.warns(RuntimeWarning, match=r"ATen's kernels .* need compute capability 99\.0"):
        assert_same_bits(call(x).cpu(), expected)
    assert cuda.active_path() == "aten"
    assert cuda.available_paths() == ("aten",)


@on_gpu
def test_a_kernel_that_computes_wrong_numbers(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchquant.triton.ops import affine

    def wrong(input: Tensor, *rest: Any) -> Any:
        return ATEN.quantize_per_token(input * 1.01, *rest)

    monkeypatch.setattr(affine, "quantize_per_token", wrong)
    x = floats(5, 64)
    with pytest.warns(RuntimeWarning, match="quantize_per_token gave other bits"):
        q = KERNELS.quantize_per_token(x.cuda())
    for a, b in zip(q, KERNELS.quantize_per_token(x), strict=True):
        assert_same_bits(a.cpu(), b)


# ---------------------------------------------------------------- tuning


@on_gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 200, 1024])
def test_tuned(rows: int, tuners: Path) -> None:
    """Every candidate computes the right numbers (else a warning), and the choice is kept."""
    from torchquant.triton.tuning import choose as tuning

    with warnings.catch_warnings(), cuda.use_path("auto"):
        warnings.simplefilter("error")
        call, x, expected = layer(rows, 512, 1024, torch.bfloat16)
        assert_same_bits(call(x).cpu(), expected)
    (path,) = tuners.glob("*.json")
    choices = json.loads(path.read_text())["choices"]
    ((problem, choice),) = choices.items()
    assert problem.startswith(f"gemm {tuning.rounded_rows(rows)}x512x1024 int8 bfloat16")
    assert 0 < choice["microseconds"] < 1e5

    tuning._tuners.clear()  # as in a later process
    measured = []
    tuner = tuning.tuner(torch.device("cuda", 0))
    tuner.timer = measured.append  # type: ignore[assignment]
    assert_same_bits(call(x).cpu(), expected)
    assert measured == []


@on_gpu
def test_no_memory_for_measuring(tuners: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchquant.triton.gemm import tuning as gemm_tuning

    call, x, expected = layer(48, 256, 512)
    with monkeypatch.context() as patch:
        patch.setattr(gemm_tuning, "trial_of", lambda problem: torch.empty(1 << 50, device=CUDA))
        with pytest.warns(RuntimeWarning, match="out of GPU memory while measuring") as caught:
            assert_same_bits(call(x).cpu(), expected)
            assert_same_bits(call(x).cpu(), expected)
        assert len(caught) == 1
    assert not list(tuners.glob("*.json"))


@on_gpu
def test_measuring_leaves_no_memory_behind_and_no_random_numbers(tuners: Path) -> None:
    call, x, expected = layer(64, 1024, 1024)
    with cuda.use_path("aten"):  # cuBLAS keeps a workspace from its first call on
        call(x)
    torch.cuda.synchronize()
    torch.cuda.manual_seed(3)
    state, before = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    result = call(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 2 * max(512, result.nbytes)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_same_bits(result.cpu(), expected)


# ---------------------------------------------------------------- info, a fresh process


@on_gpu
@pytest.mark.parametrize("path", ["auto", "aten"])
def test_info_names_the_gpu_and_the_path(path: str) -> None:
    code = "from torchquant.cli.main import app; app(prog_name='torchquant')"
    done = subprocess.run(
        [sys.executable, "-c", code, "info", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHQUANT_CUDA_PATH": path},
        timeout=300,
        check=True,
    )
    data = json.loads(done.stdout)
    gpu = data["gpus"][0]
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert re.fullmatch(r"\d+\.\d+", gpu["capability"])
    assert gpu["path"] == ("aten" if path == "aten" else cuda.active_path(0))
    assert data["cuda_version"] == torch.version.cuda


@on_gpu
def test_a_model_from_end_to_end() -> None:
    """quantize_, .to("cuda") and back, in one piece; test_cuda_modules.py takes it apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    torchquant.quantize_(model)
    x = floats(7, 128)
    with torch.inference_mode():
        expected = model(x)
        assert_same_bits(model.cuda()(x.cuda()).cpu(), expected)
        assert_same_bits(model.cpu()(x), expected)
