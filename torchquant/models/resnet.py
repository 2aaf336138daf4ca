"""A small residual network for images of 32 x 32 pixels.

The network of He et al. (2015) for small images: a convolution, three stages of residual blocks
with 16, 32 and 64 channels, the mean of each channel, and one linear layer. One block per stage
makes ResNet-8, two make ResNet-14, three make ResNet-20.

``examples/train_cnn.py`` makes the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchquant.data.files import packaged
from torchquant.models.checkpoint import trained_model

RESNET_FILE = "digits_resnet.safetensors"
RESNET_KEY = "small_resnet"


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3, added to the input.

    Where shapes differ, a convolution of 1 x 1 with the same stride brings the input to the shape
    of the sum.

    Shapes: ``[batch, inputs, h, w]`` in, ``[batch, outputs, h / stride, w / stride]`` out.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.relu(self.norm1(self.conv1(input)))
        hidden = self.norm2(self.conv2(hidden))
        output: Tensor = self.relu(hidden + self.shortcut(input))
        return output


class SmallResNet(nn.Module):
    """A residual network with ``6 * blocks + 2`` layers.

    Shapes: float images ``[batch, channels, height, width]`` in, logits ``[batch, classes]`` out.

    Args:
        channels: channels of the images: 1 for grey, 3 for colour.
        classes: number of logits.
        blocks: residual blocks per stage.
        widths: channels of the stages; each stage after the first halves height and width.

    Raises:
        ValueError: blocks is less than 1, or widths is empty.

    Example:
        >>> import torch
        >>> model = SmallResNet(channels=3, blocks=2)
        >>> model(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
        >>> sum(isinstance(module, nn.Conv2d) for module in model.modules())
        15
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        classes: int = 10,
        blocks: int = 1,
        widths: Sequence[int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        if blocks < 1 or not widths:
            raise ValueError(
                "SmallResNet: blocks must be at least 1 and widths must hold at least one number, "
                f"got blocks = {blocks!r} and widths = {widths!r}"
            )
        widths = list(widths)
        self.config = {
            "channels": channels,
            "classes": classes,
            "blocks": blocks,
            "widths": widths,
        }
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        stages = []
        inputs = widths[0]
        for index, width in enumerate(widths):
            stage = [ResidualBlock(inputs, width, 2 if index else 1)]
            stage += [ResidualBlock(width, width, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        # No test of the shape: a test would keep torch.fx from tracing the model.
        pooled = torch.flatten(self.pool(self.stages(self.stem(images))), 1)
        logits: Tensor = self.classifier(pooled)
        return logits


def load_digits_resnet() -> SmallResNet:
    """The trained fp32 :class:`SmallResNet` that ships with the package, in evaluation mode.

    It reads the images of :func:`torchquant.data.digit_images`: ``[batch, 1, 32, 32]``, from 0 to
    1.

    Raises:
        FileNotFoundError: the checkpoint is missing from the installed package.

    Example:
        >>> from torchquant.data import digit_images
        >>> data = digit_images(test_copies=0)
        >>> answers = load_digits_resnet()(data.test_images[:100]).argmax(dim=1)
        >>> int((answers == data.test_labels[:100]).sum()) > 95
        True
    """
    return trained_model(SmallResNet, packaged(RESNET_FILE, "train_cnn.py"), RESNET_KEY)
