"""All measurements on an NVIDIA GPU: first the bits against this machine's CPU, then the speed.

    python benchmarks/bench_cuda.py --save          all parts, under 8 minutes
    python benchmarks/bench_cuda.py --parts linear --minutes 3
    python benchmarks/bench_cuda.py --smoke         tiny sizes; without a GPU on the CPU, untimed

Correctness comes first and decides the exit code: every operator runs on random inputs, odd sizes
and non-finite values, on each path (Triton, ATen), into memory that was filled with other bytes
before; every bit of its result must equal the CPU kernel's.

Times are of replayed CUDA graphs, measured by events. Models and peers take turns in rounds, in
every other round backwards; the results are medians. Up to 16 rows a graph's calls use several
copies of the weights, together twice as large as the L2 cache. Ceilings are measured in the same
run: a bf16 and an int8 product of 8192^3, a copy and a read of 2 GiB. TOPS counts a multiplication
and an addition as two operations.

Peers: `bf16` is `nn.functional.linear`; `_int_mm` is torch's integer product followed by scales and
bias, eager or through `torch.compile` (left out for sizes that it does not support); `torchao` is
`Int8DynamicActivationInt8WeightConfig` through `torch.compile`, if it is installed and time allows.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from gpu.block import block
from gpu.ceilings import ceilings
from gpu.correctness import correctness
from gpu.linear import linear
from gpu.run import Run
from gpu.training import fake_quantize, qat
from rich.console import Console

import torchquant
from torchquant.bench import machine
from torchquant.bench.files import FOLDER

PARTS: dict[str, Callable[[Run], bool | None]] = {
    "correctness": correctness,
    "ceilings": ceilings,
    "linear": linear,
    "fake_quantize": fake_quantize,
    "qat": qat,
    "block": block,
}
PEAK_INT8_TOPS, PEAK_BANDWIDTH = 1979.0, 4.8e12  # NVIDIA's data sheet of the H200, dense


def describe(device: torch.device) -> dict[str, Any]:
    """The GPU's properties, for the header."""
    if device.type != "cuda":
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "path": torchquant.cuda.active_path(),
        "peak_int8_tops_data_sheet": PEAK_INT8_TOPS,
        "peak_bytes_per_second_data_sheet": PEAK_BANDWIDTH,
    }


def main() -> int:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.0, help="time for all parts (default 7)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.jsonl")
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    arguments = parser.parse_args()
    console = Console(width=140)
    if not torch.cuda.is_available() and not arguments.smoke:
        console.print("no CUDA device here; --smoke runs every part in tiny sizes on the CPU")
        return 2
    warnings.filterwarnings("ignore", module=r"torch(\.|$)")  # torchquant's own warnings stay
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(device, arguments.smoke, time.monotonic() + 60 * arguments.minutes, console)
    header = {**machine.describe(), **describe(device)}
    if arguments.save and run.on_gpu:
        name = "-".join(str(header["gpu"]).lower().split())
        run.file = FOLDER / f"cuda-{machine.today()}-{name}.jsonl"
        run.file.parent.mkdir(parents=True, exist_ok=True)
        run.file.write_text("")
    run.keep("cuda", **header)
    console.print(f"{header['gpu'] or header['cpu']}, torch {torch.__version__}")
    started, right = time.monotonic(), True
    for part in PARTS:
        if part not in arguments.parts:
            continue
        try:
            right = PARTS[part](run) is not False and right
        except Exception:  # the other parts can still run
            run.failed = True
            console.print_exception()
        console.print(f"{part}: {time.monotonic() - started:.0f} s since the start", style="dim")
    for gpu in torchquant.cuda.gpus():
        run.keep("path", index=gpu.index, path=gpu.path, reason=gpu.reason, left=gpu.left_to_aten)
        for name, why in gpu.left_to_aten.items():  # its measurements are ATen's
            run.failed = True
            console.print(f"{name} was left to ATen: {why}", style="bold red", markup=False)
    if run.file is not None:
        console.print(f"written: {run.file.name}")
    return 0 if right and not run.failed else 1


if __name__ == "__main__":
    sys.exit(main())
