"""Train the two convolutional networks that torchquant contains, on digits or on photographs.

    python examples/train_cnn.py                     # both, on digits; writes into torchquant/data/
    python examples/train_cnn.py --output DIR        # writes elsewhere
    python examples/train_cnn.py --data photographs --output DIR
    python examples/train_cnn.py --smoke             # a tiny run into a temporary folder

The digits ship with torchquant; here they are enlarged to 32 x 32 pixels, and shifted, rotated, and
changed in contrast and noise, differently in each epoch. The photographs are those that
scikit-learn and scikit-image install (``pip install scikit-learn scikit-image``): the network says
which of them a patch of 32 x 32 pixels comes from.

Everything random comes from one seed and one thread does the work, so the same torch on the same
processor makes the same files again; the printed SHA-256 tells. The test images take no part in the
training, and the weights are simply those after the last step. The weights are stored in float16
and loaded as float32; the printed accuracy is that of the stored weights. A full run on the digits
takes a few minutes for each network.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant.data import ImageData, augment, digit_images, photograph_patches
from torchquant.models import SmallResNet, SmallVGG
from torchquant.models.checkpoint import load_checkpoint, save_checkpoint
from torchquant.models.resnet import RESNET_KEY
from torchquant.models.vgg import VGG_KEY

PACKAGE_DATA = Path(__file__).resolve().parent.parent / "torchquant" / "data"
MODELS = {"vgg": (SmallVGG, VGG_KEY), "resnet": (SmallResNet, RESNET_KEY)}


@dataclass(frozen=True)
class Recipe:
    """Settings of the training, and the number of test images."""

    epochs: int
    test_copies: int = 8  # of each digit
    digits: int = 10_000  # at most so many, to train and to test
    patches: int = 512  # of each photograph, to train and to test
    batch: int = 64
    peak_learning_rate: float = 5e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    warmup: float = 0.1  # of all steps


RECIPES = {"digits": Recipe(epochs=40), "photographs": Recipe(epochs=20)}


def read_data(name: str, recipe: Recipe, seed: int) -> ImageData:
    """The images of ``digits`` (grey) or ``photographs`` (colour)."""
    if name == "digits":
        data = digit_images(test_copies=recipe.test_copies, seed=seed)
        return ImageData(*(part[: recipe.digits] for part in data[:4]), data.classes)
    return photograph_patches(train_patches=recipe.patches, test_patches=recipe.patches, seed=seed)


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine to zero; ``progress`` from 0 to 1."""
    if progress < recipe.warmup:
        return recipe.peak_learning_rate * progress / recipe.warmup
    remaining = (progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * remaining))


def batches(count: int, recipe: Recipe, random: torch.Generator) -> Iterator[Tensor]:
    """Indices of one epoch's batches, shuffled; a last batch that is smaller is left out."""
    order = torch.randperm(count, generator=random)
    for start in range(0, count - recipe.batch + 1, recipe.batch):
        yield order[start : start + recipe.batch]


def train(model: nn.Module, data: ImageData, recipe: Recipe, random: torch.Generator) -> None:
    """Train a network from scratch with AdamW; it is in evaluation mode afterwards."""
    images, labels = data.train_images, data.train_labels
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
    )
    model.train().to(memory_format=torch.channels_last)
    steps = recipe.epochs * (len(images) // recipe.batch)
    step = 0
    for epoch in range(1, recipe.epochs + 1):
        total, seen = 0.0, 0
        for index in batches(len(images), recipe, random):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step / steps, recipe)
            batch = augment(images[index], random).contiguous(memory_format=torch.channels_last)
            smoothing = recipe.label_smoothing
            loss = F.cross_entropy(model(batch), labels[index], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
            seen += len(index)
        if epoch % 10 == 0 or epoch == recipe.epochs:
            print(f"epoch {epoch:3d} of {recipe.epochs}: loss {total / seen:.4f}", flush=True)
    model.eval().to(memory_format=torch.contiguous_format)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images classified correctly."""
    answers = torch.cat([model(batch).argmax(dim=1) for batch in images.split(256)])
    return (answers == labels).double().mean().item()


def run(folder: Path, data_name: str, models: list[str], recipe: Recipe, seed: int) -> None:
    """Train the models on one set of images, write their checkpoints and print the accuracy."""
    torch.set_num_threads(1)
    data = read_data(data_name, recipe, seed)
    print(f"{data_name}: {len(data.train_images)} images to train, {len(data.test_images)} to test")
    for name in models:
        start = time.perf_counter()
        cls, key = MODELS[name]
        torch.manual_seed(seed)
        model = cls(channels=data.train_images.shape[1], classes=len(data.classes))
        train(model, data, recipe, torch.Generator().manual_seed(seed))
        path = folder / f"{data_name}_{name}.safetensors"
        save_checkpoint(model, path, key, model.config, torch.float16)
        model.load_state_dict(load_checkpoint(path, key)[1])
        for part, (images, labels) in {"training": data[:2], "test": data[2:4]}.items():
            found = accuracy(model, images, labels)
            print(f"{name}: {found:.2%} of {len(labels)} {part} images correct")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.name}: {path.stat().st_size:,} bytes, SHA-256 {digest[:16]}...")
        print(f"{time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small CNNs of torchquant.")
    parser.add_argument("--data", choices=[*RECIPES], default="digits")
    parser.add_argument("--model", choices=[*MODELS], help="one of the networks; default: both")
    parser.add_argument("--output", type=Path, help="folder to write to")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny run that writes to a temporary folder"
    )
    arguments = parser.parse_args()
    models = [arguments.model] if arguments.model else [*MODELS]
    recipe = RECIPES[arguments.data]
    if arguments.epochs is not None:
        recipe = replace(recipe, epochs=arguments.epochs)
    if arguments.smoke:
        tiny = replace(recipe, epochs=1, test_copies=1, digits=128, patches=64)
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), arguments.data, models, tiny, arguments.seed)
        return
    folder = arguments.output
    if folder is None:
        if arguments.data != "digits":
            parser.error("--output must name a folder; only models of digits are in the package")
        folder = PACKAGE_DATA
    folder.mkdir(parents=True, exist_ok=True)
    run(folder, arguments.data, models, recipe, arguments.seed)


if __name__ == "__main__":
    main()
