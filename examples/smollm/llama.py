"""The process of one llama.cpp engine, which reads the package's file or a file made from it."""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness.text import package_file
from harness.workers import call_seconds, peak_megabytes

from smollm.engines import LLAMA_CPP
from smollm.inputs import PACKAGE, PROMPT

OF_THE_PACKAGE = "Q4_1"
EXTRA_TOKENS = 256  # that may follow a window


class LlamaWorker:
    """The requests that an engine answers: those of `LanguageModelWorker`."""

    def __init__(self, engine: str, threads: int, folder: Path) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        self.gguf, self.threads, self.folder = LLAMA_CPP[engine].gguf, threads, folder
        self.inputs = dict(np.load(folder / "inputs.npz"))
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))

    def load(self) -> dict[str, Any]:
        """Load the file, with room for one window and a continuation."""
        start, library = time.perf_counter(), self.library
        library.llama_backend_init()
        self.path = self._file()
        options = library.llama_model_default_params()
        self.model = library.llama_model_load_from_file(str(self.path).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {self.path.name}")
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        window = self.inputs["windows"].shape[1]
        context = library.llama_context_default_params()
        context.n_ctx = max(window, PROMPT) + EXTRA_TOKENS
        context.n_batch = context.n_ubatch = max(window, PROMPT)
        context.n_threads = context.n_threads_batch = self.threads
        self.context = library.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp does not create a context")
        return {"load_s": time.perf_counter() - start, "report": ""}

    def perplexity(self) -> dict[str, Any]:
        """exp of the mean negative log-likelihood of each window's tokens except the first."""
        total = 0.0
        for window in self.inputs["windows"]:
            logits = self._all_logits(window)[:-1].astype(np.float64)
            largest = logits.max(-1, keepdims=True)
            log_sums = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
            total += float((log_sums - logits[np.arange(len(logits)), window[1:]]).mean())
        return {"perplexity": math.exp(total / len(self.inputs["windows"]))}

    def prefill(self, seconds: float) -> dict[str, Any]:
        """Times of a prompt of one window: cache and the last token's logits."""
        window = self.inputs["windows"][0]
        return {"seconds": call_seconds(lambda: self._prompt(window), seconds)}

    def first_token(self, seconds: float) -> dict[str, Any]:
        """Times from a prompt of 128 tokens to the first token that follows it."""
        prompt = self.inputs["windows"][0, :PROMPT]
        return {"seconds": call_seconds(lambda: self._prompt(prompt), seconds)}

    def decode(self, steps: int) -> dict[str, Any]:
        """Times of single greedy steps after a prompt of 128 tokens."""
        times: list[float] = []
        self._greedy(self.inputs["windows"][0, :PROMPT], steps, times)
        return {"seconds": times}

    def sample(self, steps: int) -> dict[str, Any]:
        """The model's continuation of the prompt."""
        return {"tokens": self._greedy(self.inputs["prompt"], steps, [])}

    def memory(self) -> dict[str, Any]:
        """Peak memory of the process, and size of the model's tensors."""
        size = self.library.llama_model_size(self.model)
        return {"peak_mb": peak_megabytes(), "model_mb": size / 1e6}

    def _file(self) -> Path:
        """The package's own file, or one with another type made from it."""
        source: Path = package_file(PACKAGE, ".gguf")
        if self.gguf == OF_THE_PACKAGE:
            return source
        library, target = self.library, self.folder / f"{self.gguf}.gguf"
        options = library.llama_model_quantize_default_params()
        options.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{self.gguf}")
        options.nthread, options.allow_requantize = self.threads, True
        names = (str(path).encode() for path in (source, target))
        if library.llama_model_quantize(*names, ctypes.byref(options)):
            raise RuntimeError(f"llama.cpp does not make a file of {self.gguf}")
        return target

    def _run(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens to the cache; the last one gives logits."""
        array = (self.library.llama_token * len(tokens))(*(int(token) for token in tokens))
        batch = self.library.llama_batch_get_one(array, len(tokens))
        if self.library.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def _clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def _prompt(self, tokens: np.ndarray) -> int:
        self._clear()
        self._run(tokens)
        return self._next()

    def _next(self) -> int:
        """The most likely token after the last one."""
        logits = self.library.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def _greedy(self, prompt: np.ndarray, steps: int, times: list[float]) -> list[int]:
        token, tokens = self._prompt(prompt), []
        for _ in range(steps):
            tokens.append(token)
            start = time.perf_counter()
            self._run([token])
            times.append(time.perf_counter() - start)
            token = self._next()
        return tokens

    def _all_logits(self, window: np.ndarray) -> np.ndarray:
        """fp32 `[T, vocabulary]`."""
        self._clear()
        count, library = len(window), self.library
        batch = library.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for index, token in enumerate(window):
            batch.token[index], batch.pos[index] = int(token), index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = True
        try:
            if library.llama_decode(self.context, batch):
                raise RuntimeError("llama_decode failed")
        finally:
            library.llama_batch_free(batch)
        rows = [library.llama_get_logits_ith(self.context, index) for index in range(count)]
        shape = (self.vocabulary,)
        return np.stack([np.ctypeslib.as_array(row, shape=shape).copy() for row in rows])
