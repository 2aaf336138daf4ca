"""gptq_ on architectures of `benchmarks/zoo.py`: blocks that run alone give the same integers.

The oracle runs the whole model for each layer. A few architectures by default, all with -m slow.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from architectures import ARCHITECTURES, Architecture  # noqa: E402
from zoo_checks import missing_package  # noqa: E402

import torchquant  # noqa: E402
from torchquant.algorithms import walk  # noqa: E402
from torchquant.nn.base import QuantizedModule  # noqa: E402

CONFIG = torchquant.IntxWeightOnlyConfig(4, group_size=16)
DEFAULT = {"gemma2"}
# Blocks of these architectures that are found; the others of the list may have none.
SEQUENCES = {"gpt2": 1, "gemma2": 1, "t5": 4, "llama": 1, "bart": 2, "swin": 3, "mixtral": 1}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def compressed(architecture: Architecture) -> tuple[Any, dict[str, torch.Tensor], Any]:
    model, x = architecture.model(), architecture.arguments()
    report = torchquant.gptq_(model, CONFIG, [x] * 8, progress=False)
    integers = {
        name: layer.integers
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedModule)
    }
    with torch.no_grad():
        model(**x)
    return report, integers, model


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, id=a.name, marks=() if a.name in DEFAULT else pytest.mark.slow)
        for a in ARCHITECTURES
        if not a.real
    ],
)
def test_blocks_give_the_integers_of_whole_runs(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = missing_package(architecture)
    if package is not None:
        pytest.skip(f"needs the package {package}")
    found: list[Any] = []
    find = walk.find_blocks
    monkeypatch.setattr(walk, "find_blocks", lambda *args: found.extend(f := find(*args)) or f)
    report, integers, model = compressed(architecture)
    assert len(found) >= SEQUENCES.get(architecture.name, 0)
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            assert report[name].action == "left" and report[name].reason
    monkeypatch.setattr(walk, "find_blocks", lambda *args: [])
    whole, expected, _ = compressed(architecture)
    assert integers.keys() == expected.keys()
    different = [name for name, value in integers.items() if not torch.equal(value, expected[name])]
    assert different == []
    assert [row.action for row in report] == [row.action for row in whole]
