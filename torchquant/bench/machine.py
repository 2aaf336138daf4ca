"""What a result must say about where it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torchquant", "torch", "torchao", "onnxruntime", "onnx", "openvino", "numpy")


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def cpu_slug() -> str:
    """The CPU's name for a file name: `"intel-xeon"`."""
    name = re.sub(r"\((r|tm)\)|processor|cpu|@.*|\d+-core", " ", cpu_name().lower())
    return "-".join(re.findall(r"[a-z0-9.]+", name)) or "cpu"


def installed_versions() -> dict[str, str]:
    """Versions of the packages that take part, without importing them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def command_line() -> str:
    """The command as typed, absolute paths cut to their last part: they say nothing to others."""
    program, *arguments = [re.sub(r"(^|=)/\S*/", r"\1", argument) for argument in sys.argv]
    return " ".join(["python", program] if program.endswith(".py") else [program]) + "".join(
        f" {argument}" for argument in arguments
    )


def load_average() -> float | None:
    """Processes that wanted a CPU over the last minute; None where it cannot be told."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def today() -> str:
    """The date, ISO form."""
    return datetime.date.today().isoformat()


class CpuUse:
    """How busy all CPUs were between creation and `percent`, all processes together (Linux)."""

    def __init__(self) -> None:
        self._start = _cpu_ticks()

    def percent(self, own_seconds: float = 0.0) -> dict[str, float]:
        """`others`: all processor time but `own_seconds`; `steal`: what the hypervisor gave away.

        Both in percent of all CPUs; empty where it cannot be told.
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
    """Percent of all CPUs used by others, measured while this benchmark does nothing.

    None where it cannot be told.
    """
    use = CpuUse()
    time.sleep(seconds)
    return use.percent().get("others")


def describe() -> dict[str, object]:
    """Date, CPU, versions, command line: the first line of every results file."""
    return {
        "date": today(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": installed_versions(),
        "command": command_line(),
        "load": load_average(),
    }
