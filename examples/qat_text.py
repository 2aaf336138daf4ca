"""A language model at 8 and fewer bits: the cost of quantization with and without training.

    pip install "torchquant[examples]"
    python examples/qat_text.py                # three seeds, under half an hour on two cores
    python examples/qat_text.py --seeds 1 --settings W2A8 W4A4 --distill
    python examples/qat_text.py --save         # results and figure into benchmarks/results/
    python examples/qat_text.py --smoke        # tiny sizes: only shows that it works

A transformer of a million parameters reads Python's own documentation byte by byte. For each seed
it is trained in float with a constant learning rate. From there it is trained further, with the
same batches in the same order and a learning rate that falls to zero,

- in float: the baseline, which has seen as many batches as the others;
- with quantized layers (`prepare_qat_`), once per setting: WxAy has x bits per weight and y bits
  per activation.

Every quantized result is the result of the converted model (`convert_`), whose layers compute with
integers. `verify` counts the bits in which it differs from the trained model: none. The table also
has the baseline quantized without any training (PTQ).

The test text is whole topics of the documentation; paragraphs that both parts contain are removed
from the training text.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.report import header
from qat.model import SMOKE, Recipe, TextModel
from qat.report import cells, save, show_table
from qat.study import ABLATED, ABLATION, SETTINGS, Job, work
from rich.console import Console

from torchquant.bench.files import results_file


def run(options: argparse.Namespace, folder: Path, console: Console) -> list[dict[str, Any]]:
    """All records. A seed's other runs start when its baseline is complete."""
    job = Job("float", "float", 0, options.recipe, folder, options.distill)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    settings = [("setting", name) for name in options.settings]
    ablation = [("ablation", name) for name in ABLATION if options.ablation]
    # Not forked: the child of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    records = []
    with ProcessPoolExecutor(options.jobs, context) as pool:
        pending = {pool.submit(work, replace(job, seed=seed)) for seed in seeds}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    record = future.result()
                    records.append(record)
                    console.print(_line(record), highlight=False)
                    if record["kind"] == "float":
                        seed = record["seed"]
                        followers = settings + (ablation if seed == seeds[0] else [])
                        pending |= {
                            pool.submit(work, replace(job, kind=kind, name=name, seed=seed))
                            for kind, name in followers
                        }
        except KeyboardInterrupt:
            console.print("interrupted: the report has the runs that are complete")
            pool.shutdown(wait=False, cancel_futures=True)
    order = ["float", *SETTINGS, *ABLATION]
    return sorted(records, key=lambda record: (order.index(record["name"]), record["seed"]))


def _line(record: dict[str, Any]) -> str:
    name = f"{ABLATED}, {record['name']}" if record["kind"] == "ablation" else record["name"]
    line = f"seed {record['seed']}: {name} {record['bits']:.4f} bits per byte"
    if "over_float" in record:
        line += f" ({record['over_float']:+.2%}), {record['differing_bits']} bits differ"
    if "ptq_bits" in record:
        line += f", PTQ {record['ptq_bits']:.4f} ({record['ptq_over_float']:+.2%})"
    return f"{line}, {record['step_ms']:.0f} ms a step"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at the same time, with one thread each"
    )
    parser.add_argument(
        "--distill", action="store_true", help="also train on the float model's predictions"
    )
    parser.add_argument("--no-ablation", dest="ablation", action="store_false")
    parser.add_argument("--output", type=Path, help="path of the files to write, without suffix")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    options.recipe = SMOKE if options.smoke else Recipe()
    if options.smoke:
        options.seeds = 1
    if options.save and options.output is None:
        options.output = results_file("qat_text", suffix="")
    return options


def main() -> None:
    """Train everything and report."""
    options = parse()
    console = Console()
    start = time.perf_counter()
    recipe = options.recipe
    parameters = sum(p.numel() for p in TextModel(recipe).parameters())
    taught = ", distilled from the float model" if options.distill else ""
    title = (
        f"Text model of {parameters:,} parameters, {recipe.pretrain_steps} + "
        f"{recipe.finetune_steps} steps, {options.seeds} seed(s): converted models against float "
        f"trained as long{taught}"
    )
    with tempfile.TemporaryDirectory() as folder:
        records = run(options, Path(folder), console)
        show_table(console, title, cells(records))
        if options.smoke and options.output is None:
            options.output = Path(folder) / "smoke"  # so that the writers run, too
        if options.output is not None:
            minutes = (time.perf_counter() - start) / 60
            first_line = header(1, jobs=options.jobs, minutes=minutes, title=title)
            save(options.output, title, records, first_line, console)
    differing = sum(record.get("differing_bits", 0) for record in records)
    if differing:
        raise SystemExit(f"converted models differ from the trained models in {differing} bits")


if __name__ == "__main__":
    main()
