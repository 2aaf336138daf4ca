"""From the dispatcher's CUDA key to a kernel: Triton if it can run here, otherwise ATen.

The dispatcher calls one short Python function per operator, which looks up the function prepared
for the tensor's device. An operator's first call on a device prepares it: is the device supported,
does Triton load, does the kernel give the fallback's bits on a small case? If one of these fails,
or later compiling or launching, the operator is left to ATen, whose bits are the same, with one
message. Errors of the device itself (a CUDA error, no memory) are raised: another path would only
hide or repeat them.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from torchquant.cuda.host import FAMILY_OF, LEAST_CAPABILITY, Host, Kernel, is_device_error

PATHS = ("auto", "triton", "aten")
PROBE = "quantize_per_token"


class Dispatcher:
    """Chooses the function that runs an operator on a device; one per process.

    Args:
        host: see :class:`Host`.
        key: the dispatch key whose kernels to replace.
        operators: names of the operators to replace.
    """

    def __init__(self, host: Host, key: str = "CUDA", operators: Iterable[str] = FAMILY_OF) -> None:
        self.host = host
        self.key = key
        self.operators = tuple(operators)
        self.path = "auto"
        # Operator -> device index -> the function to call. Every call reads it without the lock.
        self._prepared: dict[str, dict[int, Kernel]] = {name: {} for name in self.operators}
        self._sound: set[tuple[str, int]] = set()  # operators whose kernel gave the fallback's bits
        self._device_reasons: dict[int, str] = {}
        self._operator_reasons: dict[tuple[str, int], str] = {}
        self._said: set[str] = set()
        self._lock = threading.RLock()
        self._library: torch.library.Library | None = None
        if hasattr(os, "register_at_fork"):  # in the child, a lock of another thread stays locked
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    # ---------------------------------------------------------------- registration

    def register(self) -> None:
        """Register Python functions instead of the C++ kernels of this key; once."""
        with self._lock:
            if self._library is not None:
                return
            self._library = torch.library.Library("torchquant", "IMPL")
            with warnings.catch_warnings():
                # torch warns once per process about a replaced kernel; here it is intended.
                warnings.filterwarnings("ignore", "Warning only once for all operators")
                for name in self.operators:
                    self._library.impl(name, self._entry(name), self.key, allow_override=True)

    def _entry(self, name: str) -> Kernel:
        """The function that the dispatcher calls; as short as possible."""
        get, prepare = self._prepared[name].get, self._prepare

        def call(*arguments: Any) -> Any:
            index = arguments[0].get_device()
            kernel = get(index)
            if kernel is None:
                kernel = prepare(name, index)
            return kernel(*arguments)

        _hide_from_dynamo(call)
        return call

    # ---------------------------------------------------------------- the choice

    def set_path(self, path: str) -> None:
        """Choose the path of all later calls."""
        with self._lock:
            self.path = path
            for prepared in self._prepared.values():
                prepared.clear()

    def reason(self, index: int) -> str | None:
        """Why this device uses ATen; None if it uses Triton, which has not failed yet."""
        missing = self.host.missing()
        if missing is not None:
            return missing
        device = self.host.device(index)
        if device.capability < LEAST_CAPABILITY:
            major, minor = LEAST_CAPABILITY
            return f"Triton's kernels need compute capability {major}.{minor} or higher"
        return self._device_reasons.get(index)

    def failures(self, index: int) -> dict[str, str]:
        """The operators that are left to ATen on this device, with the reasons."""
        found = self._operator_reasons.items()
        return {name: reason for (name, device), reason in found if device == index}

    def probe(self, index: int) -> None:
        """Prepare the simplest operator, so that :meth:`reason` is as complete as after a call."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = set(self._said)
            try:
                self._prepare(PROBE, index)
            except Exception as error:  # the device cannot be used, which is a result, too
                self._operator_reasons.setdefault((PROBE, index), failure(error))
            self._said = said

    def _aten(self, name: str) -> Kernel:
        kernel: Kernel = getattr(torch.ops.torchquant_aten, name).default
        return kernel

    def _prepare(self, name: str, index: int) -> Kernel:
        """An operator's first call on a device: choose the function, check it, keep it."""
        aten = self._aten(name)
        prepared = self._prepared[name]
        if self.key == "CUDA" and index < 0:  # the first tensor is on the CPU: ATen raises
            return prepared.setdefault(index, aten)
        with self._lock:
            if index in prepared:  # another thread was faster
                return prepared[index]
            if self.path == "aten":
                return prepared.setdefault(index, aten)
            reason = self.reason(index)
            if reason is None and self.host.capturing():
                return self._unprepared_in_a_capture(name, index, aten)
            if reason is None:
                kernel = self._checked_kernel(name, index)
                if kernel is not None:
                    return prepared.setdefault(index, self._guarded(name, index, kernel, aten))
                reason = self._operator_reasons.get((name, index)) or self.reason(index)
            if self.path == "triton":
                raise RuntimeError(
                    f"torchquant.{name} cannot run with Triton on {self.host.device(index)}: "
                    f"{reason}. The path 'auto' would leave it to ATen's kernels"
                )
            prepared[index] = aten
            self._say_left_to_aten(name, index)
            return aten

    def _unprepared_in_a_capture(self, name: str, index: int, aten: Kernel) -> Kernel:
        """The function for an operator's first call during the capture of a CUDA graph."""
        first = f"torchquant.{name}: the first call on {self.host.device(index)} came during the "
        first += "capture of a CUDA graph, which cannot wait for Triton's compiler"
        remedy = "Call the model once before capturing it."
        if self.path == "triton":
            raise RuntimeError(f"{first}. {remedy}")
        self._say(f"{first}; the graph holds ATen's kernels. {remedy}")
        return aten

    def _checked_kernel(self, name: str, index: int) -> Kernel | None:
        """The operator's function; None if it does not work, with the reason recorded."""
        if (name, index) in self._operator_reasons and self.path != "triton":
            return None
        broken = all(device != index for _, device in self._sound)  # nothing has worked here yet
        try:
            kernel = self.host.kernel(name)
            if (name, index) in self._sound:
                return kernel
            with self.host.aside(index):
                wrong = self.host.check(name, kernel, self._aten(name), index)
        except Exception as error:
            if is_device_error(error):
                raise
            self._record(name, index, failure(error), broken and not self._works(name, index))
            return None
        if wrong is not None:
            # If one kernel computes wrong numbers, no other can be trusted.
            self._record(name, index, f"torchquant.{name} gave other bits ({wrong})", True)
            return None
        self._sound.add((name, index))
        self._operator_reasons.pop((name, index), None)
        return kernel

    def _works(self, failed: str, index: int) -> bool:
        """True if the simplest operator runs, after another one failed as the device's first."""
        if failed == PROBE or PROBE not in self.operators:
            return False
        try:
            kernel = self.host.kernel(PROBE)
            with self.host.aside(index):
                wrong = self.host.check(PROBE, kernel, self._aten(PROBE), index)
        except Exception as error:
            if is_device_error(error):
                raise
            return False
        if wrong is None:
            self._sound.add((PROBE, index))
        return wrong is None

    def _record(self, name: str, index: int, reason: str, whole_device: bool) -> None:
        if not whole_device:
            self._operator_reasons[name, index] = reason
        elif self.path != "triton":  # the path "triton" raises, and can succeed the next time
            self._device_reasons[index] = reason
            for prepared in self._prepared.values():
                prepared.pop(index, None)
        else:
            self._operator_reasons[name, index] = reason

    def _guarded(self, name: str, index: int, kernel: Kernel, aten: Kernel) -> Kernel:
        """A Triton function with checks of devices, and with ATen for refusals and failures."""
        positions = tensor_positions(aten)

        def call(*arguments: Any) -> Any:
            count = len(arguments)  # the dispatcher omits trailing defaults
            for i in positions:
                if i >= count:
                    break
                tensor = arguments[i]
                if tensor is not None and tensor.get_device() != index:
                    return aten(*arguments)  # raises, and names the argument
            try:
                result = kernel(*arguments)
            except Exception as error:
                return self._after_failure(name, index, error, arguments)
            return aten(*arguments) if result is NotImplemented else result

        return call

    def _after_failure(
        self, name: str, index: int, error: Exception, arguments: tuple[Any, ...]
    ) -> Any:
        """A Triton function raised: because of the arguments, the device, or the kernel?"""
        if is_device_error(error):
            raise error
        aten = self._aten(name)
        result = self._judged(name, error, aten, arguments)
        if "out of memory" in str(error):  # for the kernel's code: the next call can succeed
            return result
        if self.path == "triton":
            raise RuntimeError(
                f"torchquant.{name}: Triton's kernel failed: {failure(error)}"
            ) from error
        with self._lock:
            self._operator_reasons[name, index] = failure(error)
            self._prepared[name][index] = aten
        self._say_left_to_aten(name, index)
        return result

    def _judged(self, name: str, error: Exception, aten: Kernel, arguments: tuple[Any, ...]) -> Any:
        """ATen's result, or ATen's error if the arguments are wrong."""
        try:
            return aten(*arguments)
        except Exception as own:
            if is_device_error(own) and self.host.capturing():
                raise RuntimeError(
                    f"torchquant.{name}: a kernel had to be compiled or loaded during the capture "
                    "of a CUDA graph. Call the model once with the same shapes before capturing it"
                ) from error
            raise own from None

    # ---------------------------------------------------------------- messages

    def _say_left_to_aten(self, name: str, index: int) -> None:
        device = self.host.device(index)
        whole = self.reason(index)
        reason = whole or self._operator_reasons[name, index]
        what = "torchquant" if whole else f"torchquant.{name}"
        where = device.name if whole else f"{device.name}, {name}"
        self._say(
            f"{what} runs with ATen's kernels on {device}: {reason}. The numbers are the same, "
            "only slower. TORCHQUANT_CUDA_PATH=aten chooses this without a message.",
            key=where,
        )

    def _say(self, message: str, key: str | None = None) -> None:
        """Warn once per process and key."""
        key = message if key is None else key
        if key not in self._said:
            self._said.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def failure(error: BaseException) -> str:
    """An exception as one line of text.

    >>> failure(ValueError("first\\nsecond"))
    'ValueError: first'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(".: ")


def tensor_positions(operator: Kernel) -> tuple[int, ...]:
    """Positions of an operator's tensor arguments after the first, optional ones included."""
    arguments = operator._schema.arguments  # type: ignore[attr-defined]
    names = ("Tensor", "Optional[Tensor]")
    return tuple(i for i, argument in enumerate(arguments) if i and str(argument.type) in names)


def _hide_from_dynamo(function: Kernel) -> None:
    """Keep Dynamo from tracing ``function`` and the functions that it calls.

    Under torch.compile, a frame that Dynamo cannot trace runs eagerly, and Dynamo examines every
    Python frame below it, including those of operators. torch.compiler.disable has the same effect,
    but imports Dynamo (a second) and costs a few microseconds per call.
    """
    try:
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    except (ImportError, AttributeError):  # another torch: traced, which is slower and correct
        pass
