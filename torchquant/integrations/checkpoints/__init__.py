"""Checkpoints of other libraries: GPTQ, AWQ, compressed-tensors, and GGUF (reading only).

:func:`load_checkpoint` finds out the layout, and :func:`save_checkpoint` writes one of the first
three. Each layout has a module that describes and reads it.
"""

from torchquant.integrations.checkpoints.load import load_checkpoint
from torchquant.integrations.checkpoints.report import CheckpointReport, CheckpointRow
from torchquant.integrations.checkpoints.save import save_checkpoint

__all__ = ["CheckpointReport", "CheckpointRow", "load_checkpoint", "save_checkpoint"]
