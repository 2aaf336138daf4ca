"""Processes share the work of a walk and get the bits of one process; a folder continues a walk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.compressed_models import decoder, tokens
from support.compressing_processes import CONFIG, compressed, compressed_in_process
from support.processes import in_processes

import torchquant
from torchquant.algorithms import compress, walk
from torchquant.algorithms.resume import Results
from torchquant.algorithms.walk import _Walk


def assert_same(results: list[Any], expected: list[Any]) -> None:
    for found, wanted in zip(results, expected, strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
            assert same, key


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    expected = compressed()
    messages = []
    for results in in_processes(compressed_in_process, str(tmp_path)):
        assert_same(results[:-4], expected)
        messages.append(results[-4:])
    assert messages[0][0].startswith("RuntimeError process 1 failed: IndexError: ")
    assert messages[1][0].startswith("IndexError ")
    assert messages[0][1].startswith("ValueError gptq_: resume must name a folder of a call with")
    assert messages[1][1].startswith("RuntimeError process 0 failed: ValueError: gptq_: resume")
    for message in messages:
        assert message[2] == (
            "ValueError gptq_: all processes must have the same model and data, got other values "
            "of the batches; pass all batches in each process, which share them"
        )
    assert messages[0][3] == "OSError no space left on the disk"
    assert messages[1][3] == ("RuntimeError process 0 failed: OSError: no space left on the disk")
    assert_same(compressed(str(tmp_path)), expected)


def test_processes_with_other_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "place_among", lambda: (0, 2))
    monkeypatch.setattr(compress, "every", lambda value: [value, {**value, "data": 0}])
    model = decoder(1)
    with pytest.raises(ValueError, match="same model and data, got other values of the batches;"):
        torchquant.gptq_(model, CONFIG, tokens(1), progress=False)
    assert type(model.head) is torch.nn.Linear


def test_the_results_are_saved_so_that_all_processes_see_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = False
    saves: list[bool] = []

    def in_all(act: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return act()
        finally:
            inside = False

    monkeypatch.setattr(walk, "in_all", in_all)
    monkeypatch.setattr(Results, "save", lambda self, found: saves.append(inside))
    torchquant.gptq_(decoder(1), CONFIG, tokens(1), resume=tmp_path, progress=False)
    assert saves and all(saves)


def interrupted(folder: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compress a decoder until so many stages are done; the number of these stages."""
    collected = 0
    collect = _Walk._collect

    def count(self: Any, *arguments: Any) -> Any:
        nonlocal collected
        if collected == after:
            raise KeyboardInterrupt
        collected += 1
        return collect(self, *arguments)

    monkeypatch.setattr(_Walk, "_collect", count)
    model = decoder()
    try:
        torchquant.gptq_(model, CONFIG, tokens(), resume=folder, progress=False)
    except KeyboardInterrupt:
        assert type(model.head) is torch.nn.Linear
    monkeypatch.undo()
    return collected


def test_an_interrupted_walk_continues_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    expected, model = decoder(), decoder()
    wanted = torchquant.gptq_(expected, CONFIG, tokens(), progress=False)
    assert interrupted(folder, 5, monkeypatch) == 5
    assert len([*folder.glob("*.safetensors")]) == 5
    assert interrupted(folder, 100, monkeypatch) == 4, "8 stages of blocks, and the head"
    assert interrupted(folder, 100, monkeypatch) == 0
    report = torchquant.gptq_(model, CONFIG, tokens(), resume=folder, progress=False)
    assert report == wanted
    assert_same([dict(model.state_dict())], [dict(expected.state_dict())])


def test_a_folder_of_another_call_is_refused(tmp_path: Path) -> None:
    def run(model: Any, config: Any = CONFIG, data: Any = None, **options: Any) -> None:
        data = tokens(1) if data is None else data
        torchquant.gptq_(model, config, data, resume=tmp_path, progress=False, **options)

    run(decoder(1))
    files = sorted(path.name for path in tmp_path.iterdir())
    changed = decoder(1)
    with torch.no_grad():
        changed.head.weight[0, 0] += 1
    other_config = torchquant.IntxWeightOnlyConfig(3, group_size=32)
    for arguments, words in (
        ((changed,), "with other values of the model's tensors; pass another folder"),
        ((decoder(2),), "with other names of the model's tensors, values of the model's tensors"),
        ((decoder(1), other_config), "with other configuration; pass"),
        ((decoder(1), CONFIG, tokens(2)), "with other number of batches, values of the batches"),
        ((decoder(1), CONFIG, [tokens(2)[1]]), "with other values of the batches; pass"),
    ):
        with pytest.raises(ValueError, match=f"gptq_: resume must name a folder of.*{words}"):
            run(*arguments)
        assert type(arguments[0].head) is torch.nn.Linear
    with pytest.raises(ValueError, match="with other arguments of the verb; pass"):
        run(decoder(1), damping=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_a_folder_with_another_configuration_of_a_rounded_layer_is_refused(tmp_path: Path) -> None:
    def run(bits: int) -> None:
        embed = torchquant.IntxWeightOnlyConfig(bits, group_size=32)
        config = {"embed": embed, "*": CONFIG}
        torchquant.gptq_(decoder(1), config, tokens(1), resume=tmp_path, progress=False)

    run(8)
    run(8)
    with pytest.raises(ValueError, match="with other configuration; pass"):
        run(2)


def test_a_folder_of_other_ranges_of_a_prepared_model_is_refused(tmp_path: Path) -> None:
    data = [torch.randn(70, 64, generator=torch.Generator().manual_seed(0))]

    def run(factor: float) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        torchquant.prepare_(model, torchquant.Int8StaticActivationInt8WeightConfig())
        torchquant.calibrate(model, [factor * data[0]], progress=False)
        torchquant.gptq_(model, None, data, resume=tmp_path, progress=False)

    run(1.0)
    run(1.0)
    with pytest.raises(ValueError, match="with other values of the model's tensors; pass"):
        run(2.0)


@pytest.mark.parametrize(
    ("batch", "other"),
    [
        ("a text", "another"),
        ({"seed": 1}, {"seed": 2}),
        ([1.0], [2.0]),
        (np.arange(3), np.arange(3) + 1),
        (np.array(["a", None]), np.array(["b", None])),
    ],
)
def test_a_folder_of_other_data_without_tensors_is_refused(
    batch: Any, other: Any, tmp_path: Path
) -> None:
    def run(data: Any) -> None:
        x = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        torchquant.gptq_(
            model,
            CONFIG,
            [data],
            forward=lambda net, batch: net(x),
            resume=tmp_path,
            progress=False,
        )

    run(batch)
    run(batch)
    with pytest.raises(ValueError, match="with other values of the batches; pass"):
        run(other)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"a new or empty one, got .* with other files"):
        torchquant.gptq_(decoder(1), CONFIG, tokens(1), resume=tmp_path)
    with pytest.raises(ValueError, match="resume must name a folder, got the file"):
        torchquant.gptq_(decoder(1), CONFIG, tokens(1), resume=tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_damaged_results_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    torchquant.gptq_(decoder(1), CONFIG, tokens(1), resume=tmp_path, progress=False)
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:100])
    model = decoder(1)
    with pytest.raises(ValueError, match=f"gptq_: the results in .*{path.name}.* be complete"):
        torchquant.gptq_(model, CONFIG, tokens(1), resume=tmp_path, progress=False)
    assert type(model.head) is torch.nn.Linear
    path.unlink()
    torchquant.gptq_(model, CONFIG, tokens(1), resume=tmp_path, progress=False)
    (tmp_path / "walk.json").write_text("{")
    with pytest.raises(ValueError, match=r"walk.json' must hold JSON, but it is damaged"):
        torchquant.gptq_(decoder(1), CONFIG, tokens(1), resume=tmp_path, progress=False)


def test_values_between_blocks_may_be_files(tmp_path: Path) -> None:
    expected, model = decoder(), decoder()
    torchquant.gptq_(expected, CONFIG, tokens(), progress=False)
    seen: list[int] = []
    model.layers[1].register_forward_hook(
        lambda *_: seen.append(len([*tmp_path.glob("*/*.values")]))
    )
    torchquant.gptq_(model, CONFIG, tokens(), offload=tmp_path, progress=False)
    assert max(seen) == 5, "a file for each batch"
    assert not [*tmp_path.iterdir()]
    assert_same([dict(model.state_dict())], [dict(expected.state_dict())])
