"""A language model trained for int8 and fewer bits: what quantization costs, with and without it.

    pip install "torchquant[examples]"
    python examples/qat_text.py                # three seeds, within half an hour on two cores
    python examples/qat_text.py --seeds 1 --settings W2A8 W4A4 --distill
    python examples/qat_text.py --save         # results and figure into benchmarks/results/
    python examples/qat_text.py --smoke        # in small: does it run at all?

A transformer of a million parameters reads Python's own documentation byte by byte. Per seed it is
trained in float with a constant learning rate; from there, with the same batches in the same order
and a learning rate that falls to zero, it is trained on

- in float: the baseline, which so has seen as much as any other;
- with quantized layers (`prepare_qat_`), once for each setting: WxAy is x bits of weight and y bits
  of activation.

Every quantized result is that of the converted model (`convert_`), whose layers compute with
integers. `verify` counts the bits in which it differs from the model that was trained: none. Beside
it stands the baseline quantized without any training (PTQ).

The text that is measured on is whole topics of the documentation; paragraphs that stand in both
parts are removed from the training part.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness.report import machine, write_json_lines
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from torchquant import (
    LSQQuantizer,
    QATConfig,
    TrainingConfig,
    convert_,
    parameter_groups,
    prepare_qat_,
    verify,
)
from torchquant.bench.machine import cpu_slug, today

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
EVALUATION_BATCH = 16
HELD_OUT = 8  # one topic in so many


@dataclass(frozen=True)
class Recipe:
    """Sizes and training; ``SMOKE`` is the same in small.

    A learned step is a small number (0.01 to 0.2), and Adam moves every parameter by about its
    learning rate: steps need a smaller one than weights, ``step_rate`` times theirs.
    """

    width: int = 128
    hidden: int = 640
    layers: int = 4
    heads: int = 4
    context: int = 128  # bytes that the model sees
    batch: int = 8
    pretrain_steps: int = 1300
    finetune_steps: int = 600
    warmup_steps: int = 100
    learning_rate: float = 2.5e-3
    step_rate: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm
    sgd_rate: float = 0.1  # for the ablation, without decay
    teacher_share: float = 0.5  # of the loss, with --distill
    test_bytes: int | None = None  # None: all


SMOKE = Recipe(
    width=32,
    hidden=64,
    layers=2,
    heads=2,
    context=32,
    pretrain_steps=6,
    finetune_steps=4,
    warmup_steps=2,
    test_bytes=2000,
)


@dataclass(frozen=True)
class Setting:
    """One width of weights and activations, how it is trained, and what it may cost.

    `bound`: bits per byte above the float baseline, relative.
    """

    qat: TrainingConfig
    ptq: TrainingConfig
    bound: float


def _setting(weight_bits: int, activation_bits: int, bound: float, **qat: Any) -> Setting:
    edge = 8 if min(weight_bits, activation_bits) < 8 else None
    rounded = QATConfig(weight_bits, activation_bits, edge_bits=edge)
    return Setting(replace(rounded, **qat), rounded, bound)


# At 8 bits a channel's own range is as good a scale as any. Below, steps are learned (LSQ). The
# first and the last linear layer keep 8 bits, as is usual.
SETTINGS = {
    "W8A8": _setting(8, 8, 0.002),
    "W4A8": _setting(4, 8, 0.005, learned_weights=True),
    "W3A8": _setting(3, 8, 0.015, learned_weights=True),
    "W2A8": _setting(2, 8, 0.05, learned_weights=True),
    "W4A4": _setting(4, 4, 0.02, learned_weights=True),
}

# Text.


def split_text() -> tuple[Tensor, Tensor]:
    """Bytes int64 ``[n]`` of the training text and of the text to measure on.

    `pydoc_data.topics` comes with Python, so the text changes a little from one Python version to
    the next. Topics quote each other: a paragraph counts once, and for the measured part.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()

    def part(held_out: bool) -> Tensor:
        kept = []
        for index, name in enumerate(sorted(topics)):
            if (index % HELD_OUT == HELD_OUT // 2 - 1) is not held_out:
                continue
            for paragraph in topics[name].split("\n\n"):
                words = " ".join(paragraph.split())
                if words not in seen:
                    seen.add(words)
                    kept.append(paragraph)
        return torch.frombuffer(bytearray("\n\n".join(kept).encode()), dtype=torch.uint8).long()

    test = part(held_out=True)
    return part(held_out=False), test


def batches(text: Tensor, recipe: Recipe, random: torch.Generator) -> Iterator[Tensor]:
    """Endless windows ``[batch, context + 1]`` at random places."""
    positions = torch.arange(recipe.context + 1)
    while True:
        starts = torch.randint(len(text) - recipe.context, (recipe.batch, 1), generator=random)
        yield text[starts + positions]


# Model.


class Block(nn.Module):
    """Attention and a ReLU network, each behind a norm and beside the residual stream."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width, hidden = recipe.width, recipe.hidden
        self.heads = recipe.heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.network_norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, hidden)
        self.relu = nn.ReLU()  # a module: prepare_qat_ computes it in the layer before
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, T, width]`` to the same; cos, sin ``[T, width / heads]``: see :func:`rotary`."""
        joint = self.query_key_value(self.attention_norm(x))
        joint = joint.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        first, second = joint[:2].chunk(2, dim=-1)
        query, key = joint[:2] * cos + torch.cat((-second, first), dim=-1) * sin
        attended = F.scaled_dot_product_attention(query, key, joint[2], is_causal=True)
        x = x + self.attention_output(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(self.relu(self.up(self.network_norm(x))))
        return out


class TextModel(nn.Module):
    """Predicts the next byte: int64 ``[B, T]`` to logits ``[B, T, 256]``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, recipe.width)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.layers))
        self.norm = nn.RMSNorm(recipe.width, eps=1e-6)
        self.head = nn.Linear(recipe.width, 256)
        cos, sin = rotary(recipe.context, recipe.width // recipe.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                # What is added to the residual stream starts small, the deeper the smaller.
                added = name.endswith(("attention_output", "down"))
                depth = 2 * recipe.layers if added else 1
                nn.init.normal_(layer.weight, std=(layer.in_features * depth) ** -0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def rotary(context: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[context, width]`` of rotary embedding (Su et al., 2021)."""
    speeds = 1000.0 ** (-torch.arange(width // 2) / (width // 2))
    angles = (torch.arange(context)[:, None] * speeds).repeat(1, 2)
    return angles.cos(), angles.sin()


# Training.


@dataclass
class Trained:
    """Seconds per step, and the loss of every step in bits per byte."""

    seconds: float
    losses: list[float]


def constant_rate(recipe: Recipe) -> Callable[[int], float]:
    """Share of the learning rate in pretraining: a warm-up, then all of it."""
    return lambda step: min(1.0, (step + 1) / recipe.warmup_steps)


def falling_rate(recipe: Recipe) -> Callable[[int], float]:
    """Share of the learning rate in fine-tuning: down to zero."""
    return lambda step: 1.0 - step / recipe.finetune_steps


def optimizer_for(model: nn.Module, recipe: Recipe, sgd: bool = False) -> torch.optim.Optimizer:
    """AdamW (or SGD) without decay for steps, biases and norms, and a rate of its own for steps."""
    learned = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LSQQuantizer)
        for parameter in module.parameters()
    }
    groups = []
    for group in parameter_groups(model, 0.0 if sgd else recipe.weight_decay):
        weights = [p for p in group["params"] if id(p) not in learned]
        steps = [p for p in group["params"] if id(p) in learned]
        groups.append(group | {"params": weights, "share": 1.0})
        groups.append(group | {"params": steps, "share": 1.0 if sgd else recipe.step_rate})
    groups = [group for group in groups if group["params"]]
    if sgd:
        return torch.optim.SGD(groups, lr=recipe.sgd_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    model: nn.Module,
    data: Iterator[Tensor],
    steps: int,
    rate: Callable[[int], float],
    recipe: Recipe,
    *,
    sgd: bool = False,
    teacher: nn.Module | None = None,
) -> Trained:
    """A plain loop: nothing in it knows of quantization.

    With a teacher, part of the loss is the cross entropy to the teacher's distribution over the
    next byte in place of the byte that came (Hinton et al., 2015): a quantized model has to find
    again what the float model knows, and its distribution says more of that than one byte does.
    """
    optimizer = optimizer_for(model, recipe, sgd)
    peak = recipe.sgd_rate if sgd else recipe.learning_rate
    losses = []
    start = time.perf_counter()
    model.train()
    for step, window in enumerate(itertools.islice(data, steps)):
        for group in optimizer.param_groups:
            group["lr"] = peak * group["share"] * rate(step)
        tokens, following = window[:, :-1], window[:, 1:].flatten()
        logits = model(tokens).flatten(0, 1)
        loss = F.cross_entropy(logits, following)
        losses.append(loss.item() / math.log(2))
        if teacher is not None:
            with torch.no_grad():
                known = teacher(tokens).flatten(0, 1).softmax(-1)
            share = recipe.teacher_share
            loss = (1 - share) * loss + share * F.cross_entropy(logits, known)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
    return Trained((time.perf_counter() - start) / steps, losses)


@torch.inference_mode()
def bits_per_byte(model: nn.Module, text: Tensor, context: int) -> float:
    """Mean cross entropy over windows side by side, in bits."""
    model.eval()
    count = (len(text) - 1) // context
    tokens = text[: count * context].view(count, context)
    following = text[1 : count * context + 1].view(count, context)
    total = 0.0
    for now, then in zip(
        tokens.split(EVALUATION_BATCH), following.split(EVALUATION_BATCH), strict=True
    ):
        total += F.cross_entropy(model(now).flatten(0, 1), then.flatten(), reduction="sum").item()
    return total / (count * context) / math.log(2)


# Runs. Each is a job of one thread, so several share a machine without waiting for each other, and
# the same processor gives the same figures whatever the number of jobs at once.


@dataclass(frozen=True)
class Job:
    """One training run of a seed: the float baseline (`name` "float"), a setting or an ablation."""

    kind: str
    name: str
    seed: int
    recipe: Recipe
    folder: Path
    distill: bool = False

    @property
    def study_file(self) -> Path:
        """What the baseline's job leaves for the others of its seed."""
        return self.folder / f"seed{self.seed}.pt"


@dataclass
class Study:
    """What all runs of a seed share: the pretrained model, where its data stands, the baseline."""

    recipe: Recipe
    train_text: Tensor
    test_text: Tensor
    model: TextModel
    random_state: Tensor
    baseline: TextModel
    baseline_bits: float

    @classmethod
    def begin(cls, recipe: Recipe, seed: int) -> tuple[Study, Trained]:
        """Train in float: as far as all share it, and on to the baseline."""
        train_text, test_text = split_text()
        test_text = test_text[: recipe.test_bytes]
        torch.manual_seed(seed)
        model = TextModel(recipe)
        random = torch.Generator().manual_seed(seed)
        data = batches(train_text, recipe, random)
        train(model, data, recipe.pretrain_steps, constant_rate(recipe), recipe)
        state = random.get_state()
        baseline = copy.deepcopy(model)
        training = train(baseline, data, recipe.finetune_steps, falling_rate(recipe), recipe)
        bits = bits_per_byte(baseline, test_text, recipe.context)
        return cls(recipe, train_text, test_text, model, state, baseline, bits), training

    def converted_bits(self, model: nn.Module) -> tuple[float, int]:
        """Bits per byte once converted, and in how many bits the converted model differs."""
        converted = copy.deepcopy(model)
        convert_(converted)
        rows = EVALUATION_BATCH * self.recipe.context
        sample = self.test_text[:rows].view(EVALUATION_BATCH, -1)
        report = verify(model, converted, [sample])
        bits = bits_per_byte(converted, self.test_text, self.recipe.context)
        return bits, report.differing_bits + report.outputs.bits

    def quantize(self, setting: Setting) -> float:
        """Bits per byte of the baseline, quantized as it is."""
        model = copy.deepcopy(self.baseline)
        prepare_qat_(model, setting.ptq, filter_fn=_every_layer, strict=True)
        return self.converted_bits(model)[0]

    def train_quantized(
        self, setting: Setting, *, scaled: bool = True, sgd: bool = False, distill: bool = False
    ) -> dict[str, Any]:
        """Train on with quantized layers and the batches that the baseline has seen.

        `scaled`: with LSQ's gradient scale.
        """
        recipe = self.recipe
        model = copy.deepcopy(self.model)
        prepare_qat_(model, setting.qat, filter_fn=_every_layer, strict=True)
        for module in model.modules():
            if isinstance(module, LSQQuantizer) and not scaled:
                _without_gradient_scale(module)
        random = torch.Generator()
        random.set_state(self.random_state)
        training = train(
            model,
            batches(self.train_text, recipe, random),
            recipe.finetune_steps,
            falling_rate(recipe),
            recipe,
            sgd=sgd,
            teacher=self.baseline if distill else None,
        )
        bits, differing = self.converted_bits(model)
        return {
            "bits": bits,
            "over_float": bits / self.baseline_bits - 1,
            "differing_bits": differing,
            "step_ms": 1e3 * training.seconds,
            "losses": training.losses,
        }


ABLATED = "W2A8"
ABLATION = {
    "AdamW, without g": {"scaled": False},
    "SGD, with g": {"sgd": True},
    "SGD, without g": {"sgd": True, "scaled": False},
}


def _every_layer(module: nn.Module, name: str) -> bool:
    """Also layers so small that int8 does not make them faster."""
    return True


def _without_gradient_scale(quantizer: LSQQuantizer) -> None:
    quantizer.grad_factor = lambda input: 1.0  # type: ignore[method-assign]


def work(job: Job) -> dict[str, Any]:
    """Do a job, in a process of its own; its record."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {"kind": job.kind, "name": job.name, "seed": job.seed}
    if job.kind == "float":
        begun, training = Study.begin(job.recipe, job.seed)
        torch.save(begun, job.study_file)
        step_ms = 1e3 * training.seconds
        return record | {
            "bits": begun.baseline_bits,
            "step_ms": step_ms,
            "losses": training.losses,
        }
    study: Study = torch.load(job.study_file, weights_only=False)  # ours, written a moment ago
    if job.kind == "ablation":
        return record | study.train_quantized(SETTINGS[ABLATED], **ABLATION[job.name])
    setting = SETTINGS[job.name]
    record |= study.train_quantized(setting, distill=job.distill)
    rounded = study.quantize(setting)
    return record | {"ptq_bits": rounded, "ptq_over_float": rounded / study.baseline_bits - 1}


def run(options: argparse.Namespace, folder: Path, console: Console) -> list[dict[str, Any]]:
    """All records: baselines first, whatever waits for a baseline once it is there."""
    job = Job("float", "float", 0, options.recipe, folder, options.distill)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    settings = [("setting", name) for name in options.settings]
    ablation = [("ablation", name) for name in ABLATION if options.ablation]
    # A process that is forked from one with threads may hang, so they start afresh.
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
            console.print("interrupted: what is done is reported")
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


# Report.


def summaries(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Means over the seeds of all records of a kind, one by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == kind:
            found.setdefault(record["name"], []).append(record)
    rows = []
    for name, runs in found.items():
        keys = ("bits", "over_float", "ptq_bits", "ptq_over_float", "step_ms", "differing_bits")
        means = {key: statistics.fmean(run[key] for run in runs) for key in keys if key in runs[0]}
        spread = [run["over_float"] for run in runs if "over_float" in run]
        if len(spread) > 1:
            means["spread"] = statistics.stdev(spread)
        rows.append({"kind": "mean", "of": kind, "name": name, "seeds": len(runs), **means})
    return rows


HEADINGS = ("model", "PTQ", "over float", "QAT", "over float", "+- seeds", "bound", "bits")
LEGEND = (
    "PTQ, QAT: bits per byte of the converted model. Bits: by how many it differs from the model "
    "that was trained"
)


def cells(records: list[dict[str, Any]]) -> list[list[str]]:
    """The table's lines: float, the settings, and the ablation of one of them."""
    lines = []
    means = [row for kind in ("float", "setting", "ablation") for row in summaries(records, kind)]
    for row in means:
        bound = SETTINGS[row["name"]].bound if row["of"] == "setting" else None
        name = f"{ABLATED}, {row['name']}" if row["of"] == "ablation" else row["name"]
        values: list[tuple[Any, str]] = [
            (row.get("ptq_bits"), ".4f"),
            (row.get("ptq_over_float"), "+.2%"),
            (row["bits"], ".4f"),
            (row.get("over_float"), "+.2%"),
            (row.get("spread"), ".2%"),
            (bound, ".1%"),
            (row.get("differing_bits"), ".0f"),
        ]
        lines.append([name, *("" if value is None else format(value, f) for value, f in values)])
    return lines


def show_table(console: Console, title: str, lines: list[list[str]]) -> None:
    """On the terminal."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for line in lines:
        table.add_row(*map(escape, line))
    console.print(table)
    console.print(LEGEND, style="dim")


def markdown(title: str, lines: list[list[str]], header: dict[str, Any]) -> str:
    """The same as a page."""
    rows = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *lines]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"# {title}\n\n{table}\n\n{LEGEND}.\n\n{header['cpu']}, {header['jobs']} runs at a time, "
        f"a thread each, torch {header['versions']['torch']}, {header['minutes']:.0f} minutes; "
        f"`{header['command']}`\n"
    )


def save_figure(path: Path, title: str, records: list[dict[str, Any]]) -> None:
    """What every setting costs, PTQ beside QAT, and the losses of the ablation.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    names = [row["name"] for row in summaries(records, "setting")]
    for key, colour, marker, shift, label in (
        ("ptq_over_float", "#d1495b", "x", -0.12, "PTQ"),
        ("over_float", "#0b5fa5", "o", 0.12, "QAT"),
    ):
        for place, name in enumerate(names):
            values = [100 * r[key] for r in records if r["kind"] == "setting" and r["name"] == name]
            places = [place + shift] * len(values)
            named = label if not place else None
            left.scatter(places, values, s=22, color=colour, marker=marker, label=named)
    for place, name in enumerate(names):
        bound = 100 * SETTINGS[name].bound
        left.hlines(bound, place - 0.35, place + 0.35, color="black", lw=0.8, ls=":")
    left.axhline(0, color="black", lw=0.8)
    left.set_yscale("symlog", linthresh=1.0)
    left.set_xticks(range(len(names)), names)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    left.set_title(
        "bits per byte over float trained as long, by seed (dotted: bound)", fontsize=9, loc="left"
    )
    left.legend(fontsize=8, frameon=False)
    curves = {"float": "float", ABLATED: f"{ABLATED}, AdamW, with g"}
    curves |= {name: f"{ABLATED}, {name}" for name in ABLATION}
    for name, label in curves.items():
        runs = [r["losses"] for r in records if r["name"] == name]
        if runs:
            mean = [statistics.fmean(values) for values in zip(*runs, strict=True)]
            right.plot(_smooth(mean), lw=1.2, label=label)
    right.set_xlabel("fine-tuning step", fontsize=9)
    right.set_title(
        "training loss in bits per byte: LSQ with and without its gradient scale g",
        fontsize=9,
        loc="left",
    )
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: Sequence[float], weight: float = 0.05) -> list[float]:
    """Running mean."""
    mean, smooth = values[0], []
    for value in values:
        mean += weight * (value - mean)
        smooth.append(mean)
    return smooth


def save(
    stem: Path, title: str, records: list[dict[str, Any]], header: dict[str, Any], console: Console
) -> None:
    """Write table, records and figure beside each other."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    short = [{k: v for k, v in record.items() if k != "losses"} for record in records]
    means = [row for kind in ("float", "setting", "ablation") for row in summaries(records, kind)]
    write_json_lines(stem.with_suffix(".jsonl"), [header, *short, *means])
    stem.with_suffix(".md").write_text(markdown(title, cells(records), header))
    try:
        save_figure(stem.with_suffix(".png"), title, records)
    except ImportError:
        console.print("no figure: matplotlib is not installed; pip install matplotlib")
    console.print(f"results: {stem}.md, .jsonl, .png", highlight=False)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument(
        "--distill", action="store_true", help="train also on what the float model predicts"
    )
    parser.add_argument("--no-ablation", dest="ablation", action="store_false")
    parser.add_argument("--output", type=Path, help="files to write, without their suffix")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="seconds: does it run at all?")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    options.recipe = SMOKE if options.smoke else Recipe()
    if options.smoke:
        options.seeds = 1
    if options.save and options.output is None:
        stem = f"qat_text-{today()}-{cpu_slug()}"
        options.output = (RESULTS if RESULTS.is_dir() else Path()) / stem
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
            options.output = Path(folder) / "smoke"  # so that this runs too
        if options.output is not None:
            minutes = (time.perf_counter() - start) / 60
            header = machine(1) | {"jobs": options.jobs, "minutes": minutes, "title": title}
            save(options.output, title, records, header, console)
    differing = sum(record.get("differing_bits", 0) for record in records)
    if differing:
        raise SystemExit(f"converted models differ from what was trained in {differing} bits")


if __name__ == "__main__":
    main()
