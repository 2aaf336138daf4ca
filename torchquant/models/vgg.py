"""A VGG-style convolutional network for images of 32 x 32 pixels.

Convolutions of 3 x 3 with batch norm and ReLU, in stages that a max pooling of 2 x 2 separates;
then the mean of each channel, and one linear layer (Simonyan and Zisserman, 2014, at a small size).

``examples/train_cnn.py`` makes the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchquant.data.files import packaged
from torchquant.models.checkpoint import trained_model

VGG_FILE = "digits_vgg.safetensors"
VGG_KEY = "small_vgg"


class SmallVGG(nn.Module):
    """A VGG-style network with batch norm.

    Shapes: float images ``[batch, channels, height, width]`` in, logits ``[batch, classes]`` out.
    Height and width are at least ``2 ** len(stages)``; the network is made for 32.

    Args:
        channels: channels of the images: 1 for grey, 3 for colour.
        classes: number of logits.
        stages: the output channels of the convolutions, stage by stage.

    Raises:
        ValueError: stages is empty, or one of the stages is.

    Example:
        >>> import torch
        >>> model = SmallVGG(channels=3, stages=[[8], [16, 16]])
        >>> model(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        classes: int = 10,
        stages: Sequence[Sequence[int]] = ((16, 16), (32, 32), (64, 64), (96,)),
    ) -> None:
        super().__init__()
        if not stages or not all(stages):
            raise ValueError(
                "SmallVGG: stages must hold at least one stage, and each stage at least one number "
                f"of channels, got {stages!r}; pass for example [[16, 16], [32]]"
            )
        widths = [list(stage) for stage in stages]
        self.config = {"channels": channels, "classes": classes, "stages": widths}
        layers: list[nn.Module] = []
        width = channels
        for stage in widths:
            for wider in stage:
                layers.append(nn.Conv2d(width, wider, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
                width = wider
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        # No test of the shape: a test would keep torch.fx from tracing the model.
        pooled = torch.flatten(self.pool(self.features(images)), 1)
        logits: Tensor = self.classifier(pooled)
        return logits


def load_digits_vgg() -> SmallVGG:
    """The trained fp32 :class:`SmallVGG` that ships with the package, in evaluation mode.

    It reads the images of :func:`torchquant.data.digit_images`: ``[batch, 1, 32, 32]``, from 0 to
    1.

    Raises:
        FileNotFoundError: the checkpoint is missing from the installed package.

    Example:
        >>> from torchquant.data import digit_images
        >>> data = digit_images(test_copies=0)
        >>> answers = load_digits_vgg()(data.test_images[:100]).argmax(dim=1)
        >>> int((answers == data.test_labels[:100]).sum()) > 95
        True
    """
    return trained_model(SmallVGG, packaged(VGG_FILE, "train_cnn.py"), VGG_KEY)
