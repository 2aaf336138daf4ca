"""The dispatcher's choice between Triton and ATen, with a host that pretends to have GPUs."""

import os
import threading
import warnings

import pytest
import torch
from support.dispatch import (
    NAMES,
    OnDevice,
    every_warning_is_expected,  # noqa: F401  (a fixture)
)

from torchquant.cuda.dispatch import PROBE, failure, tensor_positions
from torchquant.cuda.host import (
    FAMILY_OF,
    is_device_error,
)

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
