"""The machine's own limits, measured beside the benchmark: see `peak.cpp`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION_SETS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2")


@dataclass(frozen=True)
class Peaks:
    """What a number of threads can do together at most.

    `gops` by instruction set; `read` in GB/s, by the MiB that are read again and again.
    """

    gops: dict[str, float]
    read: dict[float, float]

    def best_of(self, other: Peaks | None) -> Peaks:
        """The larger figure of each: neighbours and clocks only ever lower a peak."""
        if other is None:
            return self
        return Peaks(
            gops={name: max(value, other.gops[name]) for name, value in self.gops.items()},
            read={size: max(value, other.read[size]) for size, value in self.read.items()},
        )

    def seconds(self, operations: int, weight_bytes: int, isa: str) -> float | None:
        """No int8 product can be faster: the multipliers' time or the weights' way from the cache,
        whichever is longer.

        None where the instruction set was not measured.
        """
        if isa not in self.gops or not self.read:
            return None
        mebibytes = min(self.read, key=lambda size: abs(size - weight_bytes / 2**20))
        return max(operations / self.gops[isa], weight_bytes / self.read[mebibytes]) / 1e9


def supported_instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that the CPU and the system offer, best first."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return [name for name in INSTRUCTION_SETS if name in flags]


def measure_peaks(threads: int, weight_bytes: list[int], seconds: float) -> Peaks:
    """Build `peak.cpp` in a temporary directory and run it, `seconds` for each figure.

    Raises:
        RuntimeError: no compiler, or it refused the source (another architecture, an old
        assembler).
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no g++ or clang++ found; install one, or set CXX")
    sizes = sorted({round(size / 2**20, 3) for size in weight_bytes})
    names = [*supported_instruction_sets(), *(f"read_{size}" for size in sizes)]
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        try:
            command = [compiler, "-O2", "-pthread", "-std=c++17", str(source), "-o", str(program)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            command = [str(program), str(threads), str(seconds), *names]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"{Path(compiler).name}: {getattr(error, 'stderr', '') or error}"
            ) from error
    values = {name: float(value) for name, value in map(str.split, output.splitlines())}
    return Peaks(
        gops={name: values[name] for name in supported_instruction_sets() if values[name] > 0},
        read={size: values[f"read_{size}"] for size in sizes},
    )
