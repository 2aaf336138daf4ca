"""Train the digits transformer that torchquant contains, and write its data file.

    pip install scikit-learn
    python examples/train_digits.py                # writes both files into torchquant/data/
    python examples/train_digits.py --output DIR   # writes them elsewhere
    python examples/train_digits.py --smoke        # a tiny run into a temporary folder

Everything random comes from one seed and one thread does the work, so the same torch on the same
processor makes the same files again; the printed SHA-256 tells. (For a model of this size a second
thread gains little.) The test images take no part in the training, and the weights are simply those
after the last step. The full run takes about two minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant.data.digits import DATA_FILE, MAX_PIXEL
from torchquant.models.checkpoint import save_checkpoint
from torchquant.models.digits import CHECKPOINT_FILE, CONFIG_KEY, DigitsTransformer

PACKAGE_DATA = Path(__file__).resolve().parent.parent / "torchquant" / "data"
TEST_IMAGES = 450


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings of the training; ``SMOKE`` has tiny ones."""

    epochs: int = 120
    batch: int = 64
    peak_learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup: float = 0.1  # of all steps
    hidden: int = 512


SMOKE = Recipe(epochs=2, hidden=64)


def make_data(path: Path, seed: int) -> None:
    """Write scikit-learn's digits (uint8) with a random split into train and test indices."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    np.savez_compressed(
        path,
        images=digits.images.astype(np.uint8),
        labels=digits.target.astype(np.uint8),
        train_indices=np.sort(order[TEST_IMAGES:]).astype(np.int16),
        test_indices=np.sort(order[:TEST_IMAGES]).astype(np.int16),
    )


def read_data(path: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images fp32 ``[n, 8, 8]`` from 0 to 1 and labels int64 ``[n]`` of ``train`` or ``test``."""
    with np.load(path) as file:
        indices = file[f"{part}_indices"]
        images = torch.from_numpy(file["images"][indices]).to(torch.float32) / MAX_PIXEL
        labels = torch.from_numpy(file["labels"][indices]).to(torch.int64)
    return images, labels


def distort(images: Tensor, random: torch.Generator) -> Tensor:
    """Rotate, scale, shear and shift each image a little, like different handwriting."""

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=random) - 1) * limit

    angle = uniform(math.radians(12))
    cos, sin = torch.cos(angle) * (1 + uniform(0.12)), torch.sin(angle) * (1 + uniform(0.12))
    # In units where the image spans [-1, 1]: one pixel is 0.25.
    top = torch.stack([cos, -sin + uniform(0.15), uniform(0.25)], dim=1)
    bottom = torch.stack([sin, cos, uniform(0.25)], dim=1)
    grid = F.affine_grid(
        torch.stack([top, bottom], dim=1), [len(images), 1, 8, 8], align_corners=False
    )
    return F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine to zero; ``progress`` from 0 to 1."""
    if progress < recipe.warmup:
        return recipe.peak_learning_rate * progress / recipe.warmup
    remaining = (progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * remaining))


def batches(count: int, recipe: Recipe, random: torch.Generator) -> Iterator[Tensor]:
    """Indices of one epoch's batches, shuffled."""
    order = torch.randperm(count, generator=random)
    for start in range(0, count, recipe.batch):
        yield order[start : start + recipe.batch]


def train(images: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> DigitsTransformer:
    """Train from scratch with AdamW; returns the model after the last step."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = DigitsTransformer(hidden=recipe.hidden).train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
    )
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch)
    step = 0
    for epoch in range(1, recipe.epochs + 1):
        total = 0.0
        for index in batches(len(images), recipe, random):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step / steps, recipe)
            logits = model(distort(images[index], random))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(index)
        if epoch % 10 == 0 or epoch == recipe.epochs:
            print(f"epoch {epoch:3d} of {recipe.epochs}: loss {total / len(images):.4f}")
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images classified correctly."""
    right: Tensor = model(images).argmax(dim=1) == labels
    return right.double().mean().item()


def report_file(path: Path) -> None:
    """Print name, size and hash of a file, to compare runs."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path.name}: {path.stat().st_size:,} bytes, SHA-256 {digest[:16]}...")


def run(folder: Path, recipe: Recipe, seed: int) -> None:
    """Make the data file and the checkpoint in ``folder`` and print the accuracy."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    data_file, checkpoint = folder / DATA_FILE, folder / CHECKPOINT_FILE
    make_data(data_file, seed)
    train_images, train_labels = read_data(data_file, "train")
    model = train(train_images, train_labels, recipe, seed)
    save_checkpoint(model, checkpoint, CONFIG_KEY, model.config)
    print(f"accuracy on {len(train_labels)} training images:", end=" ")
    print(f"{accuracy(model, train_images, train_labels):.2%}")
    test_images, test_labels = read_data(data_file, "test")
    print(f"accuracy on {len(test_labels)} test images: ", end="")
    print(f"{accuracy(model, test_images, test_labels):.2%}")
    report_file(data_file)
    report_file(checkpoint)
    print(f"{time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits transformer of torchquant.")
    parser.add_argument("--output", type=Path, default=PACKAGE_DATA, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny run that writes to a temporary folder"
    )
    arguments = parser.parse_args()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), SMOKE, arguments.seed)
    else:
        arguments.output.mkdir(parents=True, exist_ok=True)
        run(arguments.output, Recipe(), arguments.seed)


if __name__ == "__main__":
    main()
