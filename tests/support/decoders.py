"""Small language models with random weights, quantized, whose decoders can be fused or cannot."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

import torchquant
from torchquant import Int8DynamicActivationInt8WeightConfig as Int8
from torchquant import Int8DynamicActivationIntxWeightConfig as Intx
from torchquant import Int8StaticActivationInt8WeightConfig as Static
from torchquant import IntxWeightOnlyConfig as WeightOnly
from torchquant.integrations.transformers.decoder_forward import FusedForward

VOCABULARY = 101
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough for positions to matter
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGURATIONS = {
    "int8": Int8,
    "4 bits": lambda: Intx(bits=4, group_size=32),
    "3 bits, zero points": lambda: Intx(bits=3, group_size=32, symmetric=False),
    "float activations": lambda: WeightOnly(bits=4, group_size=32),
}
# The name of the argument; transformers 5.24 renamed it.
_NAMES = inspect.signature(transformers.LlamaModel.forward).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"
IDS = torch.randint(0, VOCABULARY, (1, 19), generator=torch.Generator().manual_seed(3))

__all__ = ["CACHE", "CONFIGURATIONS", "IDS", "SIZES", "Static", "counted", "logits", "model"]


def model(name: str = "Llama", configuration: str | None = "int8", **options: Any) -> Any:
    """A causal language model; the configuration None leaves its layers in float."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    made = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in made.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # zeros and ones would hide mistakes
    if configuration is not None:
        torchquant.quantize_(made, CONFIGURATIONS[configuration]())
    return made


@torch.no_grad()
def logits(made: Any, cache: Any = None, ids: Tensor = IDS, *cuts: int) -> Tensor:
    """Of all tokens, given to the model in parts that end at the cuts."""
    cache = transformers.DynamicCache() if cache is None else cache
    ends = [*cuts, ids.shape[1]]
    parts = [ids[:, a:b] for a, b in zip([0, *ends], ends, strict=False) if b > a]
    given = {CACHE: cache, "use_cache": True}
    return torch.cat([made(part, **given).logits for part in parts], 1)


@contextmanager
def counted(patch: Any) -> Iterator[list[int]]:
    """A list with the number of tokens of each call that a fused decoder serves."""
    calls: list[int] = []
    run = FusedForward.run

    def counting(self: FusedForward, hidden: Tensor, *rest: Any) -> Tensor:
        calls.append(hidden.shape[0])
        return run(self, hidden, *rest)

    with patch.context() as patched:
        patched.setattr(FusedForward, "run", counting)
        yield calls
