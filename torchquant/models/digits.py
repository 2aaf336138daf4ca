"""A transformer classifier of handwritten digits, small enough to ship.

The image is cut into patches of 2 x 2 pixels, each patch becomes a token::

    8 x 8 pixels -> 16 tokens of 4 pixels -> patch_embedding -> + position_embedding
        -> 2 pre-norm blocks (attention, MLP) -> norm -> mean over tokens -> head -> 10 logits

The linear layers of the blocks are large enough to gain from integer kernels. The patch embedding
(4 inputs) and the head (10 outputs) are too small and stay in float, as in real models.

``examples/train_digits.py`` makes the checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant.data.files import packaged
from torchquant.models.checkpoint import trained_model

IMAGE_SIZE = 8
PATCH_SIZE = 2
CLASSES = 10

CHECKPOINT_FILE = "digits_transformer.safetensors"
CONFIG_KEY = "digits_transformer"


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
    return trained_model(
        DigitsTransformer, packaged(CHECKPOINT_FILE, "train_digits.py"), CONFIG_KEY
    )
