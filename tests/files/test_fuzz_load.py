"""A short run of tests/fuzz/fuzz_load.py: torchquant.load refuses damaged files."""

import argparse
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchquant.files import load as io

FUZZ = Path(__file__).parents[1] / "fuzz" / "fuzz_load.py"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """A fixed sequence of cases."""
    command = ["--engine", "random", "--cases", "1500", "--seconds", "300"]
    result = subprocess.run(
        [sys.executable, FUZZ, *command, "--artifacts", tmp_path],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.startswith("fuzz_load: 1500 cases (drawn at random")
    kinds = ("loaded and called", "not a safetensors file", "metadata", "checksum", "does not fit")
    for kind in kinds:  # every branch of load is reached
        assert kind in result.stdout
    print(result.stdout)


def undoes_nothing(path: Any, model: nn.Module) -> nn.Module:
    try:
        return io.__dict__["real_load"](path, model)  # type: ignore[no-any-return]
    except ValueError:
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.add_(1)
            break
        raise


def takes_memory(path: Any, model: nn.Module) -> nn.Module:
    with mmap.mmap(-1, 100 * 2**20) as fresh:  # new memory, because the heap may have free blocks
        fresh.write(bytes(len(fresh)))
    return io.__dict__["real_load"](path, model)  # type: ignore[no-any-return]


def raises_key_errors(path: Any, model: nn.Module) -> nn.Module:
    try:
        return io.__dict__["real_load"](path, model)  # type: ignore[no-any-return]
    except ValueError as error:
        raise KeyError("layers") from error


def never_ends(path: Any, model: nn.Module) -> nn.Module:
    while True:
        pass


@pytest.mark.parametrize(
    ("bug", "finding"),
    [
        (undoes_nothing, "the model is changed after"),
        pytest.param(
            takes_memory,
            "bytes of memory",
            marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
        ),
        (raises_key_errors, "KeyError"),
        (never_ends, "more than 1 seconds"),
    ],
)
def test_the_fuzzer_finds_bugs(
    bug: Callable[..., nn.Module],
    finding: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.syspath_prepend(FUZZ.parent)
    import fuzz_load

    monkeypatch.setattr(fuzz_load, "SECONDS", 1)
    monkeypatch.setitem(io.__dict__, "real_load", io.load)
    monkeypatch.setattr(io, "load", bug)
    arguments = argparse.Namespace(seconds=60, cases=200, seed=0, artifacts=tmp_path)
    assert fuzz_load.run_random(fuzz_load.Harness(), arguments) == 1
    assert finding in capsys.readouterr().err
    assert list(tmp_path.iterdir())
