"""Greedy decoding, one token at a time: in eager mode, with a fused decoder, or a compiled step."""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CACHE_STEP = 256  # the cache of a compiled step has a multiple of so many places
WARM_STEPS = 2  # the first one compiles; the second one finds what was compiled


class Eager:
    """A step is the model's own forward, with the cache that the model makes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        # transformers 5.24 renamed the argument.
        names = inspect.signature(type(model).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"

    def start(self, prompt: torch.Tensor, steps: int) -> torch.Tensor:
        """Logits `[1, V]` after a prompt `[T]`, which `steps` tokens are to follow."""
        return self._forward(self.model, prompt[None], None)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits `[1, V]` after one more token `[1]`."""
        return self._forward(self.model, token[:, None], self.cache)

    def _forward(self, forward: Any, tokens: torch.Tensor, cache: Any, **rest: Any) -> torch.Tensor:
        given = {self.cache_name: cache} if cache is not None else {}
        output = forward(tokens, use_cache=True, logits_to_keep=1, **given, **rest)
        self.cache = output[self.cache_name]
        logits: torch.Tensor = output.logits[:, -1]
        return logits


class Fused(Eager):
    """The same calls after `torchquant.fuse_decoder_`: one call computes all blocks."""

    def __init__(self, model: Any) -> None:
        import torchquant

        super().__init__(model)
        torchquant.fuse_decoder_(model)


class Compiled(Eager):
    """A step is one compiled graph, with a cache of constant size; the prompt runs in eager mode.

    Once it is warm, `torch.compile` does not check again whether its assumptions hold, because this
    loop changes no module: the checks of 30 blocks would take a tenth of a step.
    """

    def __init__(self, model: Any) -> None:
        import torch

        super().__init__(model)
        torch._dynamo.config.cache_size_limit = 64
        self.compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)
        self.places = self.steps = self.position = 0

    def start(self, prompt: torch.Tensor, steps: int) -> torch.Tensor:
        """See `Eager`."""
        import torch
        from transformers import StaticCache

        needed = len(prompt) + steps
        if needed > self.places:
            torch.compiler.set_stance("default")
            self.places = -(-needed // CACHE_STEP) * CACHE_STEP
            self.static = StaticCache(config=self.model.config, max_cache_len=self.places)
            self.steps = 0
        self.static.reset()
        self.position = len(prompt)
        return self._forward(self.model, prompt[None], self.static)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """See `Eager`."""
        import torch

        if self.steps == WARM_STEPS:
            torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)
        position = torch.tensor([[self.position]])
        logits = self._forward(self.compiled, token[:, None], self.static, position_ids=position)
        self.position += 1
        self.steps += 1
        return logits
