"""The finder on architectures of transformers: what folds, and outputs that stay the same."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from architectures import ARCHITECTURES, Architecture  # noqa: E402

from torchquant.algorithms import (  # noqa: E402
    find_scaling_groups,
    fold,
    output_difference,
    rotate_,
)
from torchquant.algorithms.batches import outputs_of  # noqa: E402

# The numbers of groups after a norm, of groups after a linear layer, and of layers that are left.
FOUND = {
    "bert": (0, 2, 11),
    "bert_mlm": (1, 2, 11),
    "roberta": (1, 2, 11),
    "distilbert": (0, 2, 10),
    "deberta_v2": (0, 2, 14),
    "deberta": (0, 0, 12),
    "albert": (1, 1, 7),
    "electra": (1, 2, 10),
    "mpnet": (0, 2, 11),
    "modernbert": (5, 6, 1),
    "longformer": (0, 0, 19),
    "xlnet": (0, 0, 4),
    "fnet": (1, 0, 5),
    "nystromformer": (0, 0, 12),
    "esm": (4, 2, 4),
    "t5": (10, 10, 5),
    "t5_v11_gated": (10, 10, 5),
    "bart": (0, 6, 27),
    "marian": (0, 6, 27),
    "pegasus": (10, 6, 9),
    "switch_transformers": (8, 16, 15),
    "longt5": (10, 8, 7),
    "gpt2": (4, 2, 3),
    "gpt_neo": (4, 2, 3),
    "gpt_neox": (5, 2, 2),
    "gptj": (3, 2, 2),
    "opt": (4, 4, 1),
    "bloom": (4, 2, 3),
    "llama": (5, 4, 0),
    "mistral": (5, 4, 0),
    "qwen2": (5, 4, 0),
    "qwen3": (5, 4, 0),
    "gemma": (4, 4, 1),
    "gemma2": (4, 4, 1),
    "gemma3": (4, 4, 1),
    "phi": (3, 2, 2),
    "phi3": (5, 4, 0),
    "falcon": (2, 2, 3),
    "cohere": (2, 4, 1),
    "olmo": (0, 4, 11),
    "stablelm": (5, 4, 0),
    "starcoder2": (4, 2, 3),
    "mixtral": (5, 4, 0),
    "qwen2_moe": (5, 6, 0),
    "qwen3_moe": (5, 4, 0),
    "deepseek_v3": (9, 5, 0),
    "gpt_oss": (5, 2, 0),
    "llama4": (5, 5, 0),
    "mamba": (2, 2, 5),
    "mamba2": (5, 0, 0),
    "rwkv": (1, 0, 14),
    "jamba": (6, 3, 2),
    "recurrent_gemma": (6, 4, 3),
    "xglm": (4, 2, 3),
    "ctrl": (4, 4, 1),
    "vit": (4, 2, 3),
    "deit": (4, 2, 3),
    "swin": (9, 4, 4),
    "swinv2": (0, 8, 25),
    "beit": (4, 2, 2),
    "dinov2": (4, 2, 2),
    "clip": (9, 4, 5),
    "siglip": (9, 4, 7),
    "segformer": (5, 2, 4),
    "detr": (0, 12, 24),
    "donut": (15, 8, 11),
    "convnext": (4, 0, 4),
    "dpt": (8, 4, 8),
    "sam": (5, 21, 25),
    "levit": (0, 0, 22),
    "mobilevit": (18, 9, 9),
    "blip": (5, 6, 19),
    "whisper": (10, 6, 9),
    "wav2vec2": (0, 2, 11),
    "hubert": (1, 2, 10),
    "speecht5": (1, 6, 30),
    "vits": (0, 0, 8),
    "encodec": (0, 0, 0),
    "ast": (4, 2, 2),
    "timeseries_transformer": (0, 6, 28),
    "patchtst": (0, 2, 12),
    "informer": (0, 2, 32),
}
# The numbers of streams that are rotated; the other architectures have none.
ROTATED = {
    "albert": 1,
    "electra": 1,
    "fnet": 1,
    "t5": 1,
    "t5_v11_gated": 1,
    "pegasus": 1,
    "longt5": 1,
    "gpt2": 1,
    "gpt_neo": 1,
    "gpt_neox": 1,
    "gptj": 1,
    "opt": 1,
    "llama": 1,
    "mistral": 1,
    "qwen2": 1,
    "qwen3": 1,
    "gemma": 1,
    "phi": 1,
    "phi3": 1,
    "falcon": 1,
    "cohere": 1,
    "olmo": 1,
    "stablelm": 1,
    "starcoder2": 1,
    "mixtral": 1,
    "qwen2_moe": 1,
    "qwen3_moe": 1,
    "deepseek_v3": 3,
    "gpt_oss": 1,
    "llama4": 1,
    "mamba": 1,
    "mamba2": 1,
    "jamba": 1,
    "recurrent_gemma": 1,
    "whisper": 1,
}
FAST = ("bert", "gpt2", "llama", "gemma", "t5", "mixtral")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers warns about settings that do not matter here."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


CHOSEN = {one.name: one for one in ARCHITECTURES if one.package == "transformers"}


def marked(name: str) -> object:
    return pytest.param(CHOSEN[name], id=name, marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("architecture", [marked(name) for name in FOUND])
@torch.no_grad()
def test_groups_of_an_architecture(architecture: Architecture) -> None:
    """Folding with factors between 1/4 and 4 changes outputs by rounding only."""
    pytest.importorskip(architecture.package)
    model, batch = architecture.model(), architecture.arguments()
    expected = outputs_of("test", model, batch)
    found = find_scaling_groups(model, [batch])
    kinds = [group.kind for group in found.groups]
    counts = (kinds.count("norm"), kinds.count("linear"), len(found.reasons))
    assert counts == FOUND[architecture.name], found.reasons
    assert not [reason for reason in found.reasons.values() if "would change" in reason]
    generator = torch.Generator().manual_seed(3)
    for group in found.groups:
        factors = torch.exp2(torch.rand(group.count, generator=generator) * 4 - 2)
        fold(model, group, group.free(factors[group.channels.clamp(min=0)]))
    assert output_difference(expected, outputs_of("test", model, batch)) < 1e-5


@pytest.mark.parametrize("architecture", [marked(name) for name in FOUND if name != "encodec"])
def test_streams_of_an_architecture(architecture: Architecture) -> None:
    """A rotation changes outputs by rounding only; what is left has a reason."""
    pytest.importorskip(architecture.package)
    model, batch = architecture.model(), architecture.arguments()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = outputs_of("test", model, batch)
    report = rotate_(model, [batch])
    assert len(report.streams) == ROTATED.get(architecture.name, 0), report
    assert all(row.reason for row in report)
    assert output_difference(expected, outputs_of("test", model, batch)) < 1e-5
    if not report.streams:
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_table_has_enough_architectures() -> None:
    assert len(FOUND) >= 20
    assert sum(norm + linear > 0 for norm, linear, _ in FOUND.values()) >= 20
    assert len(ROTATED) >= 20 and set(ROTATED) <= set(FOUND)
