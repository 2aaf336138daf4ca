"""The benchmarks' worker processes (torchquant/bench/workers.py), without importing torch.

The file is loaded by its path: importing it from torchquant would import torch, whose memory would
then count for an engine that runs without torch.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchquant.bench.workers import (
        Answer,
        Worker,
        WorkerError,
        call_seconds,
        measure_blocks,
        peak_megabytes,
        release_freed_memory,
        serve,
    )
else:
    _package = importlib.util.find_spec("torchquant")  # finds the package, does not import it
    _path = Path(_package.submodule_search_locations[0], "bench", "workers.py")
    _spec = importlib.util.spec_from_file_location(f"{__name__}.loaded", _path)
    _workers = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_workers)
    Answer, Worker, WorkerError = _workers.Answer, _workers.Worker, _workers.WorkerError
    call_seconds, measure_blocks = _workers.call_seconds, _workers.measure_blocks
    peak_megabytes, release_freed_memory = _workers.peak_megabytes, _workers.release_freed_memory
    serve = _workers.serve

__all__ = [
    "Answer",
    "Worker",
    "WorkerError",
    "call_seconds",
    "engine_worker",
    "measure_blocks",
    "peak_megabytes",
    "release_freed_memory",
    "serve",
]

LOAD_SECONDS = 3600.0  # large models take long to load and to export


def engine_worker(
    script: str, engine: str, threads: int, *arguments: str, keep_freed_memory: bool = True
) -> Worker:
    """A process of one engine.

    Args:
        script: serves the engine if called with `--worker` and its name.
        engine: the name.
        threads: number of threads for its computation.
        arguments: further arguments of the script.
        keep_freed_memory: see `torchquant.bench.workers.KEEP_FREED_MEMORY`.
    """
    return Worker(
        [script, "--worker", engine, "--threads", str(threads), *arguments],
        {"OMP_NUM_THREADS": str(threads)},
        keep_freed_memory=keep_freed_memory,
        answer_seconds=LOAD_SECONDS,
    )
