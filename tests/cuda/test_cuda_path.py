"""Registration, environment variables and the public functions of torchquant.cuda."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.dispatch import (
    FakeDispatcher,
    every_warning_is_expected,  # noqa: F401  (a fixture)
)
from support.scripts import run_python as in_process

from torchquant.cuda import paths as cuda
from torchquant.cuda.host import (
    FAMILIES,
    FAMILY_OF,
    CudaHost,
    triton_version,
)


def run_python(code, warnings="", **environment):
    """In a process of its own, without the caller's choices."""
    names = {k: v for k, v in os.environ.items() if not k.startswith("TORCHQUANT_")}
    environment = {**names, **environment}
    folder = Path(__file__).parent
    return in_process(code, environment=environment, folder=folder, warnings=warnings, timeout=300)


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
    done = run_python(ON_THE_CPU_KEY + code, "error")
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
    done = run_python(code, "error")
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
    done = run_python(PRETEND_CUDA + code, "error", TORCHQUANT_CUDA_PATH=path)
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
