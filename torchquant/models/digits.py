"""A transformer classifier of handwritten digits, with its data, small enough to ship.

The image is cut into patches of 2 x 2 pixels, each patch becomes a token::

    8 x 8 pixels -> 16 tokens of 4 pixels -> patch_embedding -> + position_embedding
        -> 2 pre-norm blocks (attention, MLP) -> norm -> mean over tokens -> head -> 10 logits

The linear layers of the blocks are large enough to gain from integer kernels. The patch embedding
(4 inputs) and the head (10 outputs) are too small and stay in float, as in real models.

``examples/train_digits.py`` makes the data file and the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 8
PATCH_SIZE = 2
CLASSES = 10
MAX_PIXEL = 16  # each pixel counts the ink dots in a 4 x 4 square of the scanned bitmap

DATA_FILE = "digits.npz"
CHECKPOINT_FILE = "digits_transformer.safetensors"
# A single metadata key: safetensors writes several keys in no fixed order, and the training script
# must write the same bytes for the same weights.
CONFIG_KEY = "digits_transformer"


class DigitsData(NamedTuple):
    """The digits, split into a part to train on and a part to test on.

    Images are fp32 ``[n, 8, 8]`` with values from 0 (white) to 1 (ink), labels int64 ``[n]`` with
    values from 0 to 9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class SelfAttention(nn.Module):
    """Multi-head self-attention built from plain ``nn.Linear`` layers.

    ``nn.MultiheadAttention`` reads its weights without calling its layers, so int8 layers cannot
    replace them. Here ``qkv`` and ``out`` are ordinary modules.

    Shapes: ``[batch, tokens, width]`` in and out.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"SelfAttention: width must be a multiple of heads, got width = {width} and "
                f"heads = {heads}; change one of them"
            )
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, input: Tensor) -> Tensor:
        batch, tokens, width = input.shape
        # [batch, tokens, 3 * width] -> three of [batch, heads, tokens, width / heads]
        qkv = self.qkv(input).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return output


class Block(nn.Module):
    """One pre-norm transformer block: attention, then a two-layer MLP, each added to its input.

    Shapes: ``[batch, tokens, width]`` in and out.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, input: Tensor) -> Tensor:
        input = input + self.attention(self.norm1(input))
        output: Tensor = input + self.mlp(self.norm2(input))
        return output


class DigitsTransformer(nn.Module):
    """A vision transformer for 8 x 8 images of digits (Dosovitskiy et al., 2020, at a small size).

    Shapes: float images ``[batch, 8, 8]`` in (0 white, 1 ink), logits ``[batch, 10]`` out.

    Args:
        width: features per token.
        depth: number of blocks.
        heads: attention heads; ``width`` must be a multiple of this number.
        hidden: width of the hidden layer of the MLPs.

    Raises:
        ValueError: ``width`` is not a multiple of ``heads``, or the input is not ``[batch, 8, 8]``.

    Example:
        >>> import torch
        >>> from torchquant.models import DigitsTransformer
        >>> model = DigitsTransformer(width=16, depth=1, heads=2, hidden=32)
        >>> model(torch.zeros(3, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self, *, width: int = 128, depth: int = 2, heads: int = 4, hidden: int = 512
    ) -> None:
        super().__init__()
        self.config = {"width": width, "depth": depth, "heads": heads, "hidden": hidden}
        tokens = (IMAGE_SIZE // PATCH_SIZE) ** 2
        self.patch_embedding = nn.Linear(PATCH_SIZE * PATCH_SIZE, width)
        # As large as the patches' embedding: with the customary 0.02 training starts slowly.
        self.position_embedding = nn.Parameter(0.5 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embedding(_patches(images)) + self.position_embedding
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).mean(dim=1))
        return logits


def _patches(images: Tensor) -> Tensor:
    """Images ``[batch, 8, 8]`` as tokens ``[batch, 16, 4]``, row by row."""
    if images.dim() != 3 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            "DigitsTransformer: images must be [batch, 8, 8], got "
            f"{list(images.shape)}; use images.reshape(-1, 8, 8) for flattened or single images"
        )
    batch, side = images.shape[0], IMAGE_SIZE // PATCH_SIZE
    grid = images.reshape(batch, side, PATCH_SIZE, side, PATCH_SIZE).transpose(2, 3)
    return grid.reshape(batch, side * side, PATCH_SIZE * PATCH_SIZE)


def load_digits_data() -> DigitsData:
    """The handwritten digits that ship with the package, without scikit-learn.

    1797 images from the UCI "Optical Recognition of Handwritten Digits" data set (CC BY 4.0), as
    scikit-learn distributes them; see ``torchquant/data/README.md``. The split is fixed.

    Returns:
        :class:`DigitsData`; images fp32 ``[n, 8, 8]`` from 0 to 1, labels int64 ``[n]``.

    Raises:
        FileNotFoundError: the data file is missing from the installed package.

    Example:
        >>> from torchquant.models import load_digits_data
        >>> data = load_digits_data()
        >>> data.train_images.shape, data.test_images.shape
        (torch.Size([1347, 8, 8]), torch.Size([450, 8, 8]))
    """
    with np.load(_packaged(DATA_FILE)) as file:
        images = torch.from_numpy(file["images"]).to(torch.float32) / MAX_PIXEL
        labels = torch.from_numpy(file["labels"]).to(torch.int64)
        train = torch.from_numpy(file["train_indices"]).to(torch.int64)
        test = torch.from_numpy(file["test_indices"]).to(torch.int64)
    return DigitsData(images[train], labels[train], images[test], labels[test])


def load_digits_model() -> DigitsTransformer:
    """The trained fp32 :class:`DigitsTransformer` that ships with the package, in evaluation mode.

    Raises:
        FileNotFoundError: the checkpoint is missing from the installed package.

    Example:
        >>> from torchquant.models import load_digits_model
        >>> model = load_digits_model()
        >>> model.training, model.blocks[0].attention.qkv.weight.dtype
        (False, torch.float32)
    """
    with safetensors.safe_open(_packaged(CHECKPOINT_FILE), framework="pt") as file:
        config = json.loads(file.metadata()[CONFIG_KEY])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # The initial weights are random and unused; drawing them must not change the caller's state.
    with torch.random.fork_rng(devices=[]):
        model = DigitsTransformer(**config)
    model.load_state_dict(state)
    return model.eval()


def _packaged(name: str) -> Path:
    """Path of the package's data file ``name``."""
    path = Path(__file__).resolve().parent.parent / "data" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"torchquant: the package's file data/{name} is missing; reinstall torchquant, or "
            "make it with examples/train_digits.py"
        )
    return path
