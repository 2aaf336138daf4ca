"""peft: adapters on quantized layers and on layers that are prepared for training.

Nothing has to be called: ``import torchquant`` arranges that peft is extended when the program
imports it. :func:`register` extends it at once and raises if that is impossible.

LoRA (with DoRA and its other variants that leave the weight unchanged) and IA3 then accept the
layers of torchquant. The integers of a quantized layer are frozen; the adapter trains. Merging an
adapter into a quantized layer rounds the sum to integers again, and a warning says so. ``unmerge``
restores the integers that the layer had before. Modules in ``modules_to_save`` are trained in
float. Other tuners refuse the layers, and refuse to merge into them.
"""

from torchquant.integrations.peft.register import register

__all__ = ["register"]
