"""Calls on a GPU: graphs, torch.compile, autocast, streams, threads, devices, waiting."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import (
    assert_same_bits,
    floats,
    integers,
    positive,
)
from support.aten import KERNELS
from support.gpu import (
    CASES,
    layer,
    no_tuning,  # noqa: F401  (a fixture)
    on_gpu,
)
from torch import Tensor

from torchquant import cuda

# A kernel that fails leaves its operator to ATen with a message: here that is a failure.
pytestmark = pytest.mark.filterwarnings("error:torchquant:RuntimeWarning")


# ---------------------------------------------------------------- one layer's call

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
