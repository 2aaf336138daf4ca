"""torchquant.cuda: which path runs, what is checked before, and what a failure leads to.

No GPU is needed: devices are made up, and operators are called as the dispatcher would.
"""

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from torchquant.cuda import paths as cuda
from torchquant.cuda.dispatch import PROBE, Dispatcher, failure, tensor_positions
from torchquant.cuda.host import (
    FAMILIES,
    FAMILY_OF,
    CudaHost,
    Device,
    is_device_error,
    triton_version,
)

NAMES = ("linear_dynamic", "positive", PROBE)


def run_python(code, *flags, **environment):
    """In a fresh process."""
    names = {k: v for k, v in os.environ.items() if not k.startswith("TORCHQUANT_")}
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        env={**names, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )


class OnDevice:
    """Stands for a tensor: all that the dispatch asks of one."""

    def __init__(self, index):
        self.index = index

    def get_device(self):
        return self.index


class Aten:
    """Stands for a fallback operator; counts its calls."""

    def __init__(self, name):
        self._schema = getattr(torch.ops.torchquant, name).default._schema
        self.calls, self.error = 0, None

    def __call__(self, *arguments):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return "aten"


class Host:
    """Made-up devices, kernels and faults."""

    def __init__(self, capability=(9, 0), count=2):
        self.capabilities = [capability] * count
        self.no_triton, self.is_capturing, self.import_error = None, False, None
        self.wrong, self.check_error = {}, {}
        self.checks, self.error, self.result = [], None, "triton"

    def device(self, index):
        return Device(index, f"Made-up {index}", self.capabilities[index], 80 << 30)

    def missing(self):
        return self.no_triton

    def kernel(self, name):
        if self.import_error is not None:
            raise self.import_error
        return self.run

    def run(self, *arguments):
        if self.error is not None:
            raise self.error
        return self.result

    def capturing(self):
        return self.is_capturing

    def aside(self, index):
        return contextlib.nullcontext()

    def check(self, name, kernel, aten, index):
        self.checks.append((name, index))
        if name in self.check_error:
            raise self.check_error[name]
        return self.wrong.get(name)


class FakeDispatcher(Dispatcher):
    """Over :class:`Host` and :class:`Aten`; never registered."""

    def __init__(self, host, **settings):
        super().__init__(host, operators=NAMES, **settings)
        self.fallbacks = {name: Aten(name) for name in NAMES}
        self.entries = {name: self._entry(name) for name in NAMES}

    def _aten(self, name):
        return self.fallbacks[name]

    def call(self, name="positive", index=0, *rest):
        return self.entries[name](OnDevice(index), *rest)


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def dispatcher(host):
    return FakeDispatcher(host)


@pytest.fixture(autouse=True)
def every_warning_is_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---------------------------------------------------------------- the choice


def test_triton_runs_after_one_check(dispatcher, host):
    assert [dispatcher.call() for _ in range(3)] == ["triton"] * 3
    assert host.checks == [("positive", 0)]
    assert dispatcher.fallbacks["positive"].calls == 0


def test_every_operator_and_device_is_checked(dispatcher, host):
    for index in (0, 1):
        for name in ("positive", "linear_dynamic"):
            dispatcher.call(name, index)
    assert sorted(host.checks) == [
        *(("linear_dynamic", 0), ("linear_dynamic", 1), ("positive", 0), ("positive", 1))
    ]


def test_not_covered_goes_to_aten_call_by_call(dispatcher, host):
    host.result = NotImplemented
    assert dispatcher.call() == "aten"
    host.result = "triton"
    assert dispatcher.call() == "triton"


def test_the_path_aten_runs_nothing_else(dispatcher, host):
    dispatcher.set_path("aten")
    assert dispatcher.call() == "aten"
    assert host.checks == []


def test_switching_back_checks_nothing_twice(dispatcher, host):
    dispatcher.call()
    dispatcher.set_path("aten")
    assert dispatcher.call() == "aten"
    dispatcher.set_path("auto")
    assert dispatcher.call() == "triton"
    assert len(host.checks) == 1


def test_a_cpu_tensor_in_front_is_atens_to_refuse(dispatcher, host):
    dispatcher.fallbacks["positive"].error = ValueError("positive: input must be on")
    with pytest.raises(ValueError, match="input must be on"):
        dispatcher.call("positive", -1)
    assert host.checks == []


@pytest.mark.parametrize("position", [1, 2, 3, 4])
def test_a_tensor_on_another_device_is_atens_to_refuse(position, dispatcher):
    """Triton would launch on one device with another's memory."""
    tensors = [OnDevice(0), OnDevice(0), None, OnDevice(0)]
    dispatcher.call("linear_dynamic", 0, *tensors, 16)
    tensors[position - 1] = OnDevice(1)
    dispatcher.fallbacks["linear_dynamic"].error = ValueError("linear_dynamic: move it")
    with pytest.raises(ValueError, match="move it"):
        dispatcher.call("linear_dynamic", 0, *tensors, 16)


def test_arguments_that_the_dispatcher_leaves_out(dispatcher):
    """It passes no trailing arguments that equal their defaults."""
    assert dispatcher.call("linear_dynamic", 0, OnDevice(0), OnDevice(0)) == "triton"


def test_tensor_positions():
    def positions(name):
        return tensor_positions(getattr(torch.ops.torchquant, name).default)

    assert positions("positive") == ()
    assert positions("linear_dynamic") == (1, 2, 3, 4)
    assert positions("linear_static") == (1, 2, 3, 4, 5, 6, 10)
    for name in FAMILY_OF:
        first = getattr(torch.ops.torchquant, name).default._schema.arguments[0]
        assert str(first.type) == "Tensor", f"{name}: its device is the call's"


# ---------------------------------------------------------------- where Triton cannot run


def test_old_device(dispatcher, host):
    host.capabilities[0] = (7, 5)
    with pytest.warns(RuntimeWarning) as caught:
        assert dispatcher.call() == "aten"
        assert dispatcher.call("linear_dynamic") == "aten"
    (message,) = [str(warning.message) for warning in caught]
    assert "ATen's kernels on cuda:0 (Made-up 0, compute capability 7.5)" in message
    assert "need compute capability 8.0 or higher" in message
    assert "TORCHQUANT_CUDA_PATH=aten" in message
    assert dispatcher.call("positive", 1) == "triton", "the other device has its own choice"


def test_triton_missing(dispatcher, host):
    host.no_triton = "triton is not installed (pip install triton)"
    with pytest.warns(RuntimeWarning, match=r"triton is not installed") as caught:
        assert [dispatcher.call(name) for name in NAMES] == ["aten"] * 3
    assert len(caught) == 1


def test_triton_does_not_import(dispatcher, host):
    host.import_error = ImportError("libcuda.so.1: cannot open shared object file")
    with pytest.warns(RuntimeWarning, match=r"^torchquant runs .*ImportError: libcuda") as caught:
        assert [dispatcher.call(name) for name in NAMES] == ["aten"] * 3
    assert len(caught) == 1
    assert "libcuda" in dispatcher.reason(0)


def test_the_first_kernel_does_not_compile(dispatcher, host):
    """No C compiler, say: then no other kernel would, and each would cost a wait and a message."""
    host.check_error = dict.fromkeys(NAMES, RuntimeError("Failed to find C compiler.\nSee above"))
    with pytest.warns(RuntimeWarning, match=r"Failed to find C compiler\. The numbers") as caught:
        assert [dispatcher.call(name) for name in NAMES] == ["aten"] * 3
    assert len(caught) == 1
    assert host.checks == [("linear_dynamic", 0), (PROBE, 0)]  # the simplest would not either


def test_the_first_kernel_alone_does_not_compile(dispatcher, host):
    host.check_error = {"linear_dynamic": RuntimeError("PassManager::run failed")}
    with pytest.warns(RuntimeWarning, match=r"torchquant.linear_dynamic runs .*PassManager"):
        assert [dispatcher.call(name) for name in NAMES] == ["aten", "triton", "triton"]
    assert dispatcher.failures(0) == {"linear_dynamic": "RuntimeError: PassManager::run failed"}
    assert dispatcher.reason(0) is None


def test_one_kernel_does_not_compile(dispatcher, host):
    dispatcher.call("positive")
    host.check_error = {"linear_dynamic": RuntimeError("PassManager::run failed")}
    with pytest.warns(RuntimeWarning, match=r"torchquant.linear_dynamic runs .*PassManager"):
        assert dispatcher.call("linear_dynamic") == "aten"
    assert dispatcher.call("linear_dynamic") == "aten"
    assert dispatcher.call("positive") == "triton"
    assert dispatcher.failures(0) == {"linear_dynamic": "RuntimeError: PassManager::run failed"}
    assert dispatcher.reason(0) is None


def test_wrong_bits_end_triton_on_that_device(dispatcher, host):
    assert dispatcher.call("positive") == "triton"
    host.wrong = {"linear_dynamic": "3 of 96 elements differ"}
    with pytest.warns(RuntimeWarning, match=r"linear_dynamic gave other bits \(3 of 96 elements"):
        assert dispatcher.call("linear_dynamic") == "aten"
    assert dispatcher.call("positive") == "aten", "its other kernels are not trusted either"
    assert dispatcher.call("positive", 1) == "triton"


def test_a_launch_fails_later(dispatcher, host):
    dispatcher.call()
    host.error = RuntimeError("Triton Error [CUDA]: invalid argument")
    with pytest.warns(RuntimeWarning, match=r"torchquant.positive runs .*invalid argument"):
        assert dispatcher.call() == "aten", "this very call has its result"
    host.error = None
    assert dispatcher.call() == "aten", "for good"
    assert dispatcher.call("linear_dynamic") == "triton"
    assert "positive" in dispatcher.failures(0)


def test_wrong_arguments_are_no_failure_of_triton(dispatcher, host):
    dispatcher.call()
    host.error = IndexError("somewhere inside")
    dispatcher.fallbacks["positive"].error = TypeError("positive: input must be float32")
    with pytest.raises(TypeError, match="input must be float32") as caught:
        dispatcher.call()
    assert caught.value.__cause__ is None
    host.error = None
    assert dispatcher.call() == "triton"


DEVICE_ERRORS = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "CUDA error": torch.AcceleratorError("CUDA error: unspecified launch failure"),
    "lost to Triton": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
}


@pytest.mark.parametrize("error", DEVICE_ERRORS.values(), ids=DEVICE_ERRORS)
def test_errors_of_the_device_are_not_swallowed(error, dispatcher, host):
    dispatcher.call()
    host.error = error
    with pytest.raises(type(error)) as caught:
        dispatcher.call()
    assert caught.value is error
    assert dispatcher.fallbacks["positive"].calls == 0
    host.error = None
    assert dispatcher.call() == "triton", "and they change nothing"


@pytest.mark.parametrize("error", DEVICE_ERRORS.values(), ids=DEVICE_ERRORS)
def test_errors_of_the_device_during_the_check_are_not_swallowed(error, dispatcher, host):
    host.check_error = {"positive": error}
    with pytest.raises(type(error)):
        dispatcher.call()
    host.check_error = {}
    assert dispatcher.call() == "triton", "memory may be there the next time"


def test_no_memory_for_the_kernels_code(dispatcher, host):
    """Triton loads it outside of torch's allocator, which may hold all memory, free as it is."""
    dispatcher.call()
    host.error = RuntimeError("Triton Error [CUDA]: out of memory")
    assert dispatcher.call() == "aten"
    host.error = None
    assert dispatcher.call() == "triton"


@pytest.mark.parametrize(
    "message", ["PTX JIT compilation failed", "Triton Error [CUDA]: no kernel"]
)
def test_faults_of_a_kernel_are_no_device_errors(message):
    assert not is_device_error(RuntimeError(message))


def test_interrupts_pass(dispatcher, host):
    dispatcher.call()
    host.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        dispatcher.call()


# ---------------------------------------------------------------- the path "triton"


@pytest.fixture
def strict(dispatcher):
    dispatcher.set_path("triton")
    return dispatcher


def test_strict_runs_triton(strict):
    assert strict.call() == "triton"


def test_strict_raises_where_the_device_is_too_old(strict, host):
    host.capabilities[0] = (7, 0)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"positive cannot run with Triton .*capability 8\.0"
        ):
            strict.call()


def test_strict_raises_for_wrong_bits_and_says_so_each_time(strict, host):
    host.wrong = {"positive": "1 of 2 elements differ"}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gave other bits"):
            strict.call()
    host.wrong = {}
    assert strict.call() == "triton"


def test_strict_raises_where_a_kernel_fails(strict, host):
    strict.call()
    host.error = ValueError("inside Triton")
    with pytest.raises(
        RuntimeError, match="positive: Triton's kernel failed: ValueError"
    ) as caught:
        strict.call()
    assert caught.value.__cause__ is host.error


def test_strict_raises_for_a_first_call_in_a_capture(strict, host):
    host.is_capturing = True
    with pytest.raises(RuntimeError, match="Call the model once before capturing"):
        strict.call()
    host.is_capturing = False
    assert strict.call() == "triton"


def test_strict_leaves_wrong_arguments_to_aten(strict, host):
    strict.call()
    host.error = ValueError("inside Triton")
    strict.fallbacks["positive"].error = TypeError("positive: input must be float32")
    with pytest.raises(TypeError, match="input must be float32"):
        strict.call()


# ---------------------------------------------------------------- CUDA graphs, threads, fork


def test_the_first_call_in_a_capture_records_aten(dispatcher, host):
    host.is_capturing = True
    with pytest.warns(RuntimeWarning, match="Call the model once before capturing") as caught:
        assert [dispatcher.call() for _ in range(3)] == ["aten"] * 3
    assert len(caught) == 1
    assert host.checks == [], "nothing that waits for the device"
    host.is_capturing = False
    assert dispatcher.call() == "triton"
    host.is_capturing = True
    assert dispatcher.call() == "triton", "prepared: nothing stands in the way"


def test_a_compilation_that_breaks_a_capture_says_what_to_do(dispatcher, host):
    dispatcher.call()
    host.is_capturing = True
    host.error = RuntimeError(
        "Triton Error [CUDA]: operation not permitted when stream is capturing"
    )
    dispatcher.fallbacks["positive"].error = torch.AcceleratorError(
        "CUDA error: capture invalidated"
    )
    with pytest.raises(RuntimeError, match="with the same shapes before capturing"):
        dispatcher.call()


def test_threads_check_once(dispatcher, host):
    barrier, results = threading.Barrier(8), []

    def work():
        barrier.wait()
        results.append(dispatcher.call())

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == ["triton"] * 8
    assert host.checks == [("positive", 0)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_during_a_check_leaves_the_child_a_free_lock(dispatcher):
    warnings.simplefilter("ignore")  # Python 3.12 and later: this process has threads
    with dispatcher._lock:
        child = os.fork()
        if child == 0:
            results = []
            thread = threading.Thread(target=lambda: results.append(dispatcher.call()))
            thread.start()
            thread.join(10)
            os._exit(0 if results == ["triton"] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_probe_finds_out_without_a_message(dispatcher, host):
    host.check_error = {PROBE: RuntimeError("no compiler")}
    dispatcher.probe(0)
    assert "no compiler" in dispatcher.reason(0)
    dispatcher.set_path("triton")
    host.check_error = {PROBE: torch.AcceleratorError("CUDA error: device is lost")}
    dispatcher.probe(1)
    assert "device is lost" in dispatcher.failures(1)[PROBE]


def test_failure_in_one_line():
    assert failure(RuntimeError("a\nb")) == "RuntimeError: a"
    assert failure(RuntimeError()) == "RuntimeError"


# ---------------------------------------------------------------- in front of real operators

ON_THE_CPU_KEY = """
    import torch, torchquant
    from torchquant.cuda.host import Device
    from torchquant.cuda.dispatch import Dispatcher
    from contextlib import nullcontext

    seen = []

    def positive(input):
        seen.append(torch.compiler.is_compiling())
        return torch.zeros((input.numel() + 7) // 8, dtype=torch.uint8)

    def linear_dynamic(input, packed, weight_scale, weight_zero_point, bias, out_features,
                       symmetric=True, activation="none", output_dtype=None, activation_bits=8):
        seen.append((out_features, activation, output_dtype))
        return NotImplemented

    class Host:
        def device(self, index): return Device(index, "CPU", (9, 0), 1)
        def missing(self): return None
        def kernel(self, name): return globals()[name]
        def capturing(self): return False
        def aside(self, index): return nullcontext()
        def check(self, *arguments): return None

    dispatcher = Dispatcher(Host(), "CPU", {"positive": "", "linear_dynamic": ""})
    dispatcher.register()
    dispatcher.register()
"""


def test_registered_functions_replace_the_kernels():
    """Over the CPU's key: what the dispatcher hands over, and what the fallback takes."""
    code = """
    x = torch.ones(2, 64)
    assert torch.ops.torchquant.positive(x).tolist() == [0] * 16
    packed = torch.ops.torchquant_aten.pack_weight(torch.ones(16, 64, dtype=torch.int8))
    scale = torch.ones(16)
    got = torch.ops.torchquant.linear_dynamic(x, packed, scale, None, None, 16, True, "gelu")
    want = torch.ops.torchquant_aten.linear_dynamic(x, packed, scale, None, None, 16, True, "gelu")
    assert torch.equal(got, want)
    assert seen[1:] == [(16, "gelu", None)], seen
    dispatcher.set_path("aten")
    assert torch.ops.torchquant.positive(x).tolist() == [255] * 16
    print("done")
    """
    done = run_python(ON_THE_CPU_KEY + code, "-W", "error")
    assert done.stdout.strip() == "done", done.stderr


def test_dynamo_does_not_look_inside():
    """In a frame that Dynamo gave up it would trace our Python functions, too."""
    code = """
    import torch._dynamo
    graphs = []

    def backend(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    def function(x):
        with open("/dev/null"):
            torch._dynamo.graph_break()  # not possible here: the whole frame runs eagerly
            y = torch.ops.torchquant.positive(x)
        return y

    compiled = torch.compile(function, backend=backend)
    compiled(torch.ones(16))
    compiled(torch.ones(17))
    assert len(seen) == 2 and not any(seen), seen
    assert graphs == [], graphs
    print("done")
    """
    done = run_python(ON_THE_CPU_KEY + code)
    assert done.stdout.strip() == "done", done.stderr


# ---------------------------------------------------------------- import and environment


def test_import_takes_neither_triton_nor_cuda():
    code = """
    import sys, torch, torchquant
    assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
    assert not [name for name in sys.modules if name.startswith("torchquant.triton")]
    assert "torch._dynamo" not in sys.modules
    assert not torch.cuda.is_initialized()
    print("done")
    """
    done = run_python(code, "-W", "error")
    assert done.stdout.strip() == "done", done.stderr


PRETEND_CUDA = """
    import torch
    torch.version.cuda = "13.0"
    import torchquant
    from torchquant.cuda import paths as cuda
"""


@pytest.mark.parametrize(
    ("path", "registered"), [("auto", True), ("triton", True), ("aten", False)]
)
def test_registration_in_a_torch_with_cuda(path, registered):
    """As it is on a machine with such a torch and without a GPU; with "aten" C++ is called."""
    code = """
    print(cuda.chosen_path(), cuda._dispatcher._library is not None, cuda.gpus())
    """
    done = run_python(PRETEND_CUDA + code, "-W", "error", TORCHQUANT_CUDA_PATH=path)
    assert done.stdout.strip() == f"{path} {registered} ()", done.stderr


def test_no_registration_without_cuda():
    code = """
    import torch
    torch.version.cuda = None
    from torchquant.cuda import paths as cuda
    with cuda.use_path("aten"), cuda.use_path("auto"):
        pass
    print(cuda._dispatcher._library)
    """
    assert run_python(code).stdout.strip() == "None"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TORCHQUANT_CUDA_PATH", "cutlass", "must be one of auto, triton, aten, got 'cutlass'"),
        ("TORCHQUANT_AUTOTUNE", "no", "must be 0 or 1, got 'no'"),
    ],
)
def test_wrong_environment_variable_is_named(name, value, message):
    done = run_python("import torchquant", **{name: value})
    assert done.returncode != 0
    assert f"the environment variable {name} {message}" in done.stderr


# ---------------------------------------------------------------- the public functions


@pytest.fixture
def gpus(monkeypatch, host):
    """Two made-up GPUs, the second one too old."""
    host.capabilities = [(9, 0), (7, 5)]
    dispatcher = FakeDispatcher(host)
    monkeypatch.setattr(cuda, "_dispatcher", dispatcher)
    monkeypatch.setattr(dispatcher, "register", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return dispatcher


def test_gpus(gpus):
    first, second = cuda.gpus()
    assert (first.name, first.capability, first.path, first.reason) == (
        *("Made-up 0", "9.0", "triton", None),
    )
    assert (second.capability, second.path) == ("7.5", "aten")
    assert "capability 8.0" in second.reason


def test_paths_of_gpus(gpus, host):
    assert cuda.available_paths() == ("triton", "aten")
    assert cuda.active_path(0) == cuda.active_path("cuda:0") == "triton"
    assert cuda.active_path(torch.device("cuda", 1)) == "aten"
    assert cuda.active_path() == cuda.active_path("cuda") == "aten", "the current device's"
    with cuda.use_path("aten"):
        assert cuda.chosen_path() == cuda.active_path(0) == "aten"
        assert cuda.available_paths() == ("triton", "aten")
        with cuda.use_path("triton"):
            assert cuda.active_path(0) == "triton"
        assert cuda.chosen_path() == "aten"
    assert cuda.chosen_path() == "auto"
    host.capabilities = [(7, 5), (7, 5)]
    assert cuda.available_paths() == ("aten",)


def test_use_path_goes_back_after_an_exception(gpus):
    with pytest.raises(KeyError), cuda.use_path("aten"):
        raise KeyError
    assert cuda.chosen_path() == "auto"


@pytest.mark.parametrize("device", [2, -1, "cpu", "cuda:7"])
def test_active_path_of_no_gpu(gpus, device):
    with pytest.raises(ValueError, match=r"from cuda:0 to cuda:1, got "):
        cuda.active_path(device)


def test_use_path_refuses_what_cannot_run(gpus, host):
    with pytest.raises(ValueError, match=r"must be one of auto, triton, aten, got 'cuda'"):
        cuda.use_path("cuda")
    host.no_triton = "triton is not installed"
    with pytest.raises(ValueError, match="'triton' cannot run here: triton is not installed"):
        cuda.use_path("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    assert cuda.gpus() == cuda.available_paths() == ()
    assert cuda.active_path() is None
    assert cuda.no_gpu_reason()
    with pytest.raises(ValueError, match=r"'triton' cannot run here: torch "):
        cuda.use_path("triton")


# ---------------------------------------------------------------- what is registered is there

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def test_triton_version():
    assert (triton_version() is None) == (find_spec("triton") is None)
    assert triton_version() != "unknown"


@needs_triton
def test_families_lists_every_operator_of_torchquant_triton():
    import importlib
    import inspect
    import pkgutil

    from torchquant.triton import ops

    found = {}
    for info in pkgutil.iter_modules(ops.__path__):
        if info.name == "arguments":  # what the families share
            continue
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        functions = inspect.getmembers(module, inspect.isfunction)
        own = {name for name, f in functions if f.__module__ == module.__name__}
        found[info.name] = {name for name in own if not name.startswith("_")}
    assert found == {family: set(operators) for family, operators in FAMILIES.items()}


@needs_triton
@pytest.mark.parametrize("name", FAMILY_OF)
def test_signatures_are_the_operators(name):
    """The dispatcher passes arguments by position and leaves trailing defaults out."""
    import inspect

    parameters = inspect.signature(CudaHost().kernel(name)).parameters.values()
    arguments = getattr(torch.ops.torchquant, name).default._schema.arguments
    assert [p.name for p in parameters] == [argument.name for argument in arguments]
    for parameter, argument in zip(parameters, arguments, strict=True):
        has_default = parameter.default is not inspect.Parameter.empty
        assert has_default == argument.has_default_value(), parameter.name
        if has_default:
            wanted = argument.default_value
            given = parameter.default
            if isinstance(given, torch.dtype):  # the schema has torch's number for it
                given = {torch.int8: 1, torch.float32: 6}[given]
            assert given == wanted, parameter.name
