"""Facts about the machine and the build, for ``torchquant info`` and for bug reports."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import torchquant
from torchquant import _build_info, cpu, cuda
from torchquant.cuda.host import triton_version

# They change which code runs or how fast, so a report must have them.
ENVIRONMENT = (
    cpu.ENVIRONMENT_VARIABLE,
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
)
# The same for a GPU; without one they are shown only if they are set.
CUDA_ENVIRONMENT = (
    cuda.ENVIRONMENT_VARIABLE,
    cuda.AUTOTUNE_VARIABLE,
    "TORCHQUANT_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
)
OPENMP_LIBRARIES = ("libgomp", "libomp", "libiomp")


@dataclass(frozen=True)
class Info:
    """The facts that ``torchquant info`` shows."""

    torchquant: str
    built_for_torch: str
    compiler: str
    torch: str
    python: str
    platform: str
    cpu: str
    cpus: int
    threads: int
    openmp: list[str]
    environment: dict[str, str | None]
    isas_built: tuple[str, ...]
    isas_supported: tuple[str, ...]
    isa_active: str
    cuda_version: str | None
    triton_version: str | None
    gpus: tuple[cuda.GPU, ...]

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON-ready data."""
        return asdict(self)


def collect() -> Info:
    """Collect the facts about the machine, the process and the build.

    Example:
        >>> from torchquant.cli.info import collect
        >>> info = collect()
        >>> info.isa_active in info.isas_supported
        True
    """
    gpus = cuda.gpus(probe=True)
    environment = {name: os.environ.get(name) for name in ENVIRONMENT + CUDA_ENVIRONMENT}
    return Info(
        torchquant=torchquant.__version__,
        built_for_torch=_build_info.TORCH_VERSION,
        compiler=_build_info.COMPILER,
        torch=torch.__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        platform=platform.platform(),
        cpu=cpu.cpu_name(),
        cpus=usable_cpus(),
        threads=torch.get_num_threads(),
        openmp=openmp_runtimes(),
        environment={
            name: value
            for name, value in environment.items()
            if gpus or value is not None or name in ENVIRONMENT
        },
        isas_built=cpu.built_isas(),
        isas_supported=cpu.available_isas(),
        isa_active=cpu.active_isa(),
        cuda_version=torch.version.cuda,
        triton_version=triton_version(),
        gpus=gpus,
    )


def usable_cpus() -> int:
    """The number of processors that this process may use, for example under ``taskset``."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP libraries in this process; several can disturb each other.

    Linux tells through ``/proc/self/maps``; elsewhere the list is empty.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    # address, permissions, offset, device, inode, and for mapped files the path
    fields = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    # By path, because two copies of one library are two runtimes.
    files = {Path(line[5]) for line in fields if len(line) == 6}
    return sorted(file.name for file in files if file.name.startswith(OPENMP_LIBRARIES))


def render(info: Info) -> RenderableType:
    """The facts as two tables, and a third one (or one line) about GPUs."""
    gpus = gpu_table(info) if info.gpus else Text(f"GPU: none ({cuda.no_gpu_reason()})")
    return Group(facts_table(info), Text(), instruction_set_table(info), Text(), gpus)


def facts_table(info: Info) -> Table:
    """The table of names and values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    facts = {
        "torchquant": f"{info.torchquant}, built for torch {info.built_for_torch}",
        "compiler": info.compiler,
        "torch": info.torch,
        "Python": info.python,
        "platform": info.platform,
        "CPU": info.cpu,
        "CPUs usable": str(info.cpus),
        "threads": str(info.threads),
        "OpenMP": describe_openmp(info.openmp),
        **{name: value or "not set" for name, value in info.environment.items()},
    }
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def describe_openmp(runtimes: list[str]) -> str:
    """The OpenMP runtimes as text."""
    if not runtimes:
        return "unknown"
    several = " (several in one process: expect slow or wrong threading)"
    return ", ".join(runtimes) + (several if len(runtimes) > 1 else "")


def instruction_set_table(info: Info) -> Table:
    """One row per instruction set with kernels in the library, best first."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Instruction sets built")
    table.add_column("supported here")
    table.add_column("active")
    for isa in info.isas_built:
        supported = "yes" if isa in info.isas_supported else "no"
        active = isa == info.isa_active
        table.add_row(isa, supported, "yes" if active else "", style="bold" if active else None)
    return table


def gpu_table(info: Info) -> RenderableType:
    """One row per GPU, and notes on what ATen's kernels compute instead of Triton's, and why."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(
        f"GPUs (CUDA {info.cuda_version}, triton {info.triton_version or 'not installed'})"
    )
    table.add_column("capability")
    table.add_column("memory")
    table.add_column("path")
    for gpu in info.gpus:
        memory = f"{gpu.memory / 2**30:.1f} GiB"
        table.add_row(f"cuda:{gpu.index} {gpu.name}", gpu.capability, memory, gpu.path)
    notes = []
    for gpu in info.gpus:
        if gpu.reason is not None:
            notes.append(f"cuda:{gpu.index} runs with ATen's kernels: {gpu.reason}")
        for name, reason in gpu.left_to_aten.items():
            notes.append(f"cuda:{gpu.index} runs {name} with ATen's kernels: {reason}")
    return Group(table, *(Text(note) for note in notes))
