"""The process of one engine that runs torch modules."""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from harness.comparison import offline
from harness.engines import saved_megabytes
from harness.workers import call_seconds, peak_megabytes, release_freed_memory

from smollm.decoding import Compiled, Eager, Fused
from smollm.engines import ENGINES, LanguageEngine
from smollm.inputs import PROMPT

if TYPE_CHECKING:
    import torch

STEPS = {"eager": Eager, "compiled": Compiled, "fused": Fused}


class LanguageModelWorker:
    """The requests that an engine answers."""

    model: Any

    def __init__(self, engine: str, threads: int, folder: Path) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.engine, self.folder = engine, folder
        self.inputs = {
            name: torch.from_numpy(tokens)
            for name, tokens in np.load(folder / "inputs.npz").items()
        }

    def load(self) -> dict[str, Any]:
        """Load the model and convert it."""
        import torch

        offline()
        from transformers import AutoModelForCausalLM

        start = time.perf_counter()
        engine = ENGINES[self.engine]
        is_rotated = isinstance(engine, LanguageEngine) and engine.rotated
        step = engine.step if isinstance(engine, LanguageEngine) else "eager"
        self.model = AutoModelForCausalLM.from_pretrained(
            self.folder / ("rotated" if is_rotated else "model"), dtype=torch.float32
        ).eval()
        report = engine.convert(self.model) if engine.convert else None
        self.decoder = STEPS[step](self.model)
        release_freed_memory()
        return {"load_s": time.perf_counter() - start, "report": str(report or "")}

    def perplexity(self) -> dict[str, Any]:
        """exp of the mean negative log-likelihood of each window's tokens except the first."""
        import torch

        total = 0.0
        measured = self.inputs["windows"]
        with torch.inference_mode():
            for window in measured:
                logits = self.model(window[None]).logits[0, :-1].float()
                total += torch.nn.functional.cross_entropy(logits, window[1:]).item()
        return {"perplexity": math.exp(total / len(measured))}

    def prefill(self, seconds: float) -> dict[str, Any]:
        """Times of a prompt of one window: cache and the last token's logits, as in `generate`."""
        import torch

        def call() -> None:
            self.model(self.inputs["windows"][:1], use_cache=True, logits_to_keep=1)

        with torch.inference_mode():
            return {"seconds": call_seconds(call, seconds)}

    def first_token(self, seconds: float) -> dict[str, Any]:
        """Times from a prompt of 128 tokens to the first token that follows it."""
        import torch

        prompt = self.inputs["windows"][:1, :PROMPT]

        def call() -> int:
            output = self.model(prompt, use_cache=True, logits_to_keep=1)
            return int(output.logits[0, -1].argmax())

        with torch.inference_mode():
            return {"seconds": call_seconds(call, seconds)}

    def decode(self, steps: int) -> dict[str, Any]:
        """Times of single greedy steps after a prompt of 128 tokens."""
        times: list[float] = []
        self._greedy(self.inputs["windows"][0, :PROMPT], steps, times)
        return {"seconds": times}

    def sample(self, steps: int) -> dict[str, Any]:
        """The model's continuation of the prompt."""
        return {"tokens": self._greedy(self.inputs["prompt"], steps, [])}

    def memory(self) -> dict[str, Any]:
        """Peak memory of the process, including loading and converting, and size of the model."""
        return {"peak_mb": peak_megabytes(), "model_mb": saved_megabytes(self.model)}

    def _greedy(self, prompt: torch.Tensor, steps: int, times: list[float]) -> list[int]:
        import torch

        tokens: list[int] = []
        with torch.inference_mode():
            logits = self.decoder.start(prompt, steps)
            for _ in range(steps):
                token = logits.argmax(-1)
                tokens.append(int(token))
                start = time.perf_counter()
                logits = self.decoder.step(token)
                times.append(time.perf_counter() - start)
        return tokens
