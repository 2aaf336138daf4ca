"""The machine, the versions and the command of a measurement, and how busy the machine was."""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

from torchquant.cpu import cpu_name

PACKAGES = (
    "torchquant",
    "torch",
    "transformers",
    "torchvision",
    "timm",
    "torchao",
    "onnxruntime",
    "onnx",
    "openvino",
    "llama-cpp-python",
    "numpy",
)
BUSY_PERCENT = 10  # of all CPUs


def cpu_slug() -> str:
    """The CPU's name for a file name: `"intel-xeon"`."""
    name = re.sub(r"\((r|tm)\)|processor|cpu|@.*|\d+-core", " ", cpu_name().lower())
    return "-".join(re.findall(r"[a-z0-9.]+", name)) or "cpu"


def installed_versions() -> dict[str, str]:
    """Versions of the packages that benchmarks measure, from their metadata."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def command_line() -> str:
    """The command as typed; absolute paths are cut to their last part, which is all others need."""
    program, *arguments = [re.sub(r"(^|=)/\S*/", r"\1", argument) for argument in sys.argv]
    return " ".join(["python", program] if program.endswith(".py") else [program]) + "".join(
        f" {argument}" for argument in arguments
    )


def load_average() -> float | None:
    """Processes that wanted a CPU over the last minute; None if the system does not report it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def today() -> str:
    """Today's date in ISO format."""
    return datetime.date.today().isoformat()


class CpuUse:
    """How busy all CPUs were from creation until `percent`, over all processes (Linux only)."""

    def __init__(self) -> None:
        self._start = _cpu_ticks()

    def percent(self, own_seconds: float = 0.0) -> dict[str, float]:
        """`others`: processor time except `own_seconds`; `steal`: taken away by the hypervisor.

        Both are percentages of all CPUs. Empty if the system does not report them.
        """
        ticks = [now - then for now, then in zip(_cpu_ticks(), self._start, strict=True)]
        total = sum(ticks)
        if not total:
            return {}
        idle, steal = ticks[3] + ticks[4], ticks[7]
        others = total - idle - own_seconds * os.sysconf("SC_CLK_TCK")
        return {
            "others": round(100 * max(others, 0) / total, 1),
            "steal": round(100 * steal / total, 1),
        }


def _cpu_ticks() -> list[int]:
    stat = Path("/proc/stat")
    return (
        [int(ticks) for ticks in stat.read_text().splitlines()[0].split()[1:9]]
        if stat.exists()
        else [0] * 8
    )


def busy_neighbours(seconds: float = 0.5) -> float | None:
    """Percentage of all CPUs that other processes use, measured while this process sleeps.

    None if the system does not report it.
    """
    use = CpuUse()
    time.sleep(seconds)
    return use.percent().get("others")


def warn_if_busy(console: Console, percent: float | None) -> None:
    """Warn if other processes use much of the machine: waiting threads then lose most of all."""
    if percent is not None and percent > BUSY_PERCENT:
        console.print(
            f"[red]warning: other processes use {percent:.0f} % of the CPUs; results are "
            "unreliable[/red]"
        )


def describe() -> dict[str, object]:
    """Date, CPU, versions, command line: for the first line of every results file."""
    return {
        "date": today(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": installed_versions(),
        "command": command_line(),
        "load": load_average(),
    }
