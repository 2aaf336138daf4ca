"""The fastest configuration of a kernel for a shape: measured once, kept in a file.

A *problem* has all that the choice depends on: the kind of operation, sizes (the number of rows
rounded up to a power of two) and types. At a problem's first call, all candidates run on tensors of
that shape. A candidate that does not compile (for example, for lack of shared memory) is left out.
**A candidate whose result differs from the ATen fallback's in a single bit is left out, with a
warning.** The fastest of the others is used from then on and written to a file, so that later
processes do not measure again.

Nothing is measured during the capture of a CUDA graph, while torch.compile traces, or with
``TORCHQUANT_AUTOTUNE=0``; then the default configuration runs. It also runs when memory is short.
All configurations give the same bits and differ in speed only.

:mod:`torchquant.triton.tuning.file` describes the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchquant.triton.tuning.file import TuningFile, cache_folder, one_line

AUTOTUNE_VARIABLE = "TORCHQUANT_AUTOTUNE"

Config = TypeVar("Config", bound=Hashable)  # a frozen dataclass of numbers, strings and flags
Result = Tensor | Sequence[Tensor]
Timer = Callable[[Callable[[], object]], float]
"""Returns the seconds that a call takes on the device."""

_log = logging.getLogger("torchquant")
_pause = threading.local()
_FLUSH_BYTES = 256 << 20


def rounded_rows(rows: int) -> int:
    """The number of rows under which a choice is kept: the next power of two.

    >>> [rounded_rows(rows) for rows in (1, 2, 3, 64, 65)]
    [1, 2, 4, 64, 128]
    """
    return 1 << (rows - 1).bit_length() if rows > 1 else 1


# ---------------------------------------------------------------- when to measure


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """A block in which this thread takes default configurations and measures nothing."""
    before = getattr(_pause, "on", False)
    _pause.on = True
    try:
        yield
    finally:
        _pause.on = before


def autotune_enabled() -> bool:
    """True unless the environment has ``TORCHQUANT_AUTOTUNE=0``."""
    return os.environ.get(AUTOTUNE_VARIABLE) != "0"


def recording() -> bool:
    """True if launches are recorded instead of run: by a CUDA graph or a trace."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """A block on that GPU which may wait for it, in any synchronization debug mode."""
    mode = torch.cuda.get_sync_debug_mode()
    if mode:  # even setting the default mode makes torch warn that the feature is a prototype
        torch.cuda.set_sync_debug_mode(0)
    try:
        with torch.cuda.device(device):
            yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


# ---------------------------------------------------------------- the choice


class Tuner:
    """Chooses configurations for one environment, and remembers them.

    Args:
        file: where choices are kept; None for this process only.
        timer: how long a call takes; :func:`cuda_seconds` but for tests.
        around: a block to measure in, :func:`aside` of the GPU.
    """

    def __init__(
        self,
        file: TuningFile | None,
        timer: Timer,
        around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.file = file
        self.timer = timer
        self.around = around
        self.chosen: dict[Hashable, Any] = {}
        self._lock = threading.RLock()
        self._short_of_memory = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def choose(
        self,
        problem: Hashable,
        *,
        candidates: Callable[[], Sequence[Config]],
        default: Callable[[], Config],
        run: Callable[[Config], Result],
        reference: Callable[[], Result],
        prepare: Callable[[], object] = lambda: None,
    ) -> Config | None:
        """The configuration for ``problem``.

        Args:
            problem: all that the choice depends on; its text is its name in the file.
            candidates: configurations to try, as frozen dataclasses; they need not include the
                default.
            default: the configuration to use if nothing can be measured.
            run: runs the operation with a configuration, on tensors of the problem's shape.
            reference: computes the result that ``run`` must give, to the bit; called first.
            prepare: called before the run that is compared; poisons outputs.

        Returns:
            None if no candidate gives the reference's bits; then use the reference's path.

        Raises:
            Exception: no candidate runs; the error of the last one.
            RuntimeError: an error of the device, which no candidate causes.
        """
        try:
            return self.chosen[problem]  # type: ignore[no-any-return]
        except KeyError:
            pass
        if getattr(_pause, "on", False) or recording():
            return default()
        if not autotune_enabled():
            return self._remember(problem, default())
        with self._lock:  # one at a time: measurements must not disturb each other
            if problem in self.chosen:  # another thread was faster
                return self.chosen[problem]  # type: ignore[no-any-return]
            options = list(dict.fromkeys(candidates()))
            known = self._from_file(problem, options)
            if known is not None:
                return self._remember(problem, known)
            try:
                with self.around():
                    best = self._fastest(problem, options, run, reference, prepare)
            except torch.OutOfMemoryError as error:
                self._say_short_of_memory(problem, error)
                return self._remember(problem, default())
            return self._remember(problem, best)

    def _remember(self, problem: Hashable, config: Config | None) -> Config | None:
        self.chosen[problem] = config
        return config

    def _from_file(self, problem: Hashable, options: Sequence[Config]) -> Config | None:
        """The choice in the file, if this version of torchquant would try it, too."""
        if self.file is None:
            return None
        wanted = self.file.read().get(str(problem), {}).get("config")
        return next((config for config in options if as_json(config) == wanted), None)

    def _fastest(
        self,
        problem: Hashable,
        options: Sequence[Config],
        run: Callable[[Config], Result],
        reference: Callable[[], Result],
        prepare: Callable[[], object],
    ) -> Config | None:
        _log.info("torchquant measures %d configurations for %s", len(options), problem)
        started = time.perf_counter()
        expected = reference()
        seconds: dict[Config, float] = {}
        failed: Exception | None = None
        for config in options:
            try:
                prepare()
                wrong = difference(run(config), expected)
                if wrong is None:
                    seconds[config] = self.timer(lambda config=config: run(config))  # type: ignore[misc]
                else:
                    self._say_wrong(problem, config, wrong)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:
                _log.debug("torchquant: %s does not run for %s: %s", config, problem, error)
                failed = error
        if not seconds:
            if failed is not None:
                raise failed
            return None
        best = min(seconds, key=lambda config: seconds[config])
        took = time.perf_counter() - started
        _log.info("torchquant took %.1f s to choose %s for %s", took, best, problem)
        if self.file is not None:
            choice = {"config": as_json(best), "microseconds": round(1e6 * seconds[best], 3)}
            self.file.write(str(problem), choice)
        return best

    def _say_wrong(self, problem: Hashable, config: object, wrong: str) -> None:
        warnings.warn(
            f"torchquant does not use a configuration that computes wrong numbers on this GPU: "
            f"{config} for {problem}: {wrong}. Please report it with the output of "
            "'torchquant info'.",
            RuntimeWarning,
            stacklevel=4,
        )

    def _say_short_of_memory(self, problem: Hashable, error: BaseException) -> None:
        if not self._short_of_memory:
            self._short_of_memory = True
            warnings.warn(
                f"torchquant ran out of GPU memory while measuring configurations for {problem} "
                f"and takes the default one: {one_line(error)}",
                RuntimeWarning,
                stacklevel=4,
            )


def as_json(config: Any) -> Any:
    """A configuration as it is read back from a JSON file."""
    return json.loads(json.dumps(asdict(config)))


def difference(result: Any, expected: Any) -> str | None:
    """None if two operators' results have equal types, shapes and bits; NaN equals NaN."""
    if isinstance(expected, Tensor):
        return _tensor_difference(result, expected)
    if len(result) != len(expected):
        return f"{len(result)} results instead of {len(expected)}"
    for got, want in zip(result, expected, strict=True):
        wrong = _tensor_difference(got, want)
        if wrong is not None:
            return wrong
    return None


def _tensor_difference(got: Any, want: Tensor) -> str | None:
    if not isinstance(got, Tensor):
        return f"{type(got).__name__} instead of a tensor"
    if got.dtype != want.dtype:
        return f"{got.dtype} instead of {want.dtype}"
    if got.shape != want.shape:
        return f"{list(got.shape)} instead of {list(want.shape)}"
    wrong = int((_bits(got) != _bits(want)).sum())
    return f"{wrong} of {want.numel()} elements differ" if wrong else None


def _bits(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    canonical = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return canonical.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


# ---------------------------------------------------------------- on a GPU


def source_digest() -> str:
    """The digest of this package's sources: changed kernels must be measured and verified again."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(
            path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()[:32]


def cuda_environment(device: torch.device) -> dict[str, str]:
    """What times and the compiler's output depend on, in addition to the problem."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "triton": str(triton.__version__),
        "sources": source_digest(),
    }


def cuda_seconds(call: Callable[[], object], *, budget: float = 0.02, most: int = 50) -> float:
    """Median time of a call on the current device, with none of its input in the L2 cache.

    In a model, other layers run between two calls of a layer, so its weight is read from memory.
    Overwriting the cache also keeps the device busy while the host prepares the next launch.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def measure(count: int) -> list[float]:
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        for begin, end in events:
            flush.zero_()
            begin.record()
            call()
            end.record()
        events[-1][1].synchronize()
        return sorted(begin.elapsed_time(end) / 1e3 for begin, end in events)

    estimate = measure(3)[1]
    times = measure(max(5, min(most, int(budget / max(estimate, 1e-7)))))
    return times[len(times) // 2]


_tuners: dict[int, Tuner] = {}
_tuners_lock = threading.Lock()


def tuner(device: torch.device) -> Tuner:
    """The tuner for a GPU in this process; GPUs of one model share a file."""
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _tuners.get(index)
    if found is not None:
        return found
    with _tuners_lock:
        if index not in _tuners:
            own, folder = torch.device("cuda", index), cache_folder()
            file = None if folder is None else TuningFile(folder, cuda_environment(own))
            _tuners[index] = Tuner(file, cuda_seconds, lambda: aside(own))
        return _tuners[index]
