"""The decoding steps of examples/smollm2.py, on a small model with random weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchquant

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The classes by name; the examples are scripts, which import from their own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from smollm.worker import STEPS

    found = dict(STEPS)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("smollm", "harness")]:
        monkeypatch.delitem(sys.modules, name)
    return found


def model() -> Any:
    """A Llama of two blocks, with fewer heads for keys than for queries."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=101,
        max_position_embeddings=512,
        initializer_range=0.2,  # large enough for positions to matter
    )
    made = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    torchquant.quantize_(made, torchquant.Int8DynamicActivationIntxWeightConfig(bits=4))
    return made


def logits_of(decoder: Any, prompt: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        rows = [decoder.start(prompt, len(following))]
        rows += [decoder.step(token[None]) for token in following]
    return torch.cat(rows)


def test_the_fused_step_computes_the_models_forward(steps: dict[str, Any]) -> None:
    tokens = torch.randint(0, 101, (21,))
    prompt, following = tokens[:9], tokens[9:]
    with torch.inference_mode():
        expected = model()(tokens[None]).logits[0, len(prompt) - 1 :]
    eager, fused = (logits_of(steps[n](model()), prompt, following) for n in ("eager", "fused"))
    # A value between two integers of an activation may be rounded otherwise after float rounding.
    assert (eager - expected).norm() <= 2e-2 * expected.norm()
    assert (fused - eager).norm() <= 2e-2 * eager.norm()


def test_a_fused_step_starts_again(steps: dict[str, Any]) -> None:
    tokens = torch.randint(0, 101, (30,))
    fused = steps["fused"](model())
    short = logits_of(fused, tokens[:5], tokens[5:12])
    logits_of(fused, tokens[:20], tokens[20:])
    assert torch.equal(logits_of(fused, tokens[:5], tokens[5:12]), short)
