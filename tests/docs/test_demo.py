"""The demo: its data, its model, its measurements, its proof, its tables."""

import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.ahead import NewFolder, Run, Selection
from support.demo import (
    IMAGES,
    NETWORK_CALIBRATION,
    NETWORK_IMAGES,
    NETWORK_STEPS,
    NETWORK_VERIFIED,
    SAMPLED_ROWS,
    TRAINING_STEPS,
    VERIFIED_IMAGES,
)
from torch import nn

import torchquant
from torchquant import cpu, demo
from torchquant.data import digits as digits_data
from torchquant.data import files
from torchquant.demo import exactness, tables
from torchquant.demo.exactness import Check, count_differing
from torchquant.demo.steps import Steps
from torchquant.models import DigitsTransformer, digits, load_digits_data, load_digits_model
from torchquant.nn import QuantizedLinear

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(torchquant.__file__).resolve().parent / "data"
INT8_LAYERS = 8


# Data and model


def test_data_is_what_scikit_learn_has():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(DATA / digits_data.DATA_FILE) as file:
        assert np.array_equal(file["images"], source.images)
        assert np.array_equal(file["labels"], source.target)
        parts = np.concatenate([file["train_indices"], file["test_indices"]])
    assert np.array_equal(np.sort(parts), np.arange(1797)), "a partition: each image exactly once"


def test_loaded_data_types_and_ranges():
    data = load_digits_data()
    for images, labels, count in ((*data[:2], 1347), (*data[2:], 450)):
        assert images.shape == (count, 8, 8)
        assert images.dtype == torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert labels.shape == (count,)
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(10))


def test_data_folder_names_source_and_licences():
    text = (DATA / "README.md").read_text()
    for part in ("UCI", "CC BY 4.0", "scikit-learn", "BSD"):
        assert part in text
    data, model = load_digits_data(), load_digits_model()
    with torch.inference_mode():
        right = (model(data.test_images).argmax(dim=1) == data.test_labels).double().mean().item()
    assert right >= 0.975
    assert f"{100 * right:.2f} %" in text, "the accuracy in the README is that of the checkpoint"


def test_checkpoint_is_small_and_complete():
    assert (DATA / digits.CHECKPOINT_FILE).stat().st_size < 2e6
    model = load_digits_model()
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_loading_the_model_draws_no_random_numbers():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load_digits_model()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("load", [load_digits_data, load_digits_model])
def test_missing_file_is_named(load, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    with pytest.raises(FileNotFoundError, match=r"file data/digits\S+ is missing; reinstall"):
        load()


@pytest.mark.parametrize("shape", [(8, 8), (3, 64), (3, 28, 28), (3, 1, 8, 8)])
def test_wrong_image_shape_is_refused(shape):
    model = DigitsTransformer(width=16, depth=1, heads=2, hidden=32)
    with pytest.raises(ValueError, match=r"images must be \[batch, 8, 8\], got \[.*reshape"):
        model(torch.zeros(shape))


def test_no_images_and_strided_images():
    model = load_digits_model()
    assert model(torch.zeros(0, 8, 8)).shape == (0, 10)
    images = load_digits_data().test_images[:4]
    strided = images.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(model(strided), model(images))


def test_patches_are_two_by_two_squares():
    image = torch.arange(64.0).reshape(1, 8, 8)
    tokens = digits._patches(image)
    assert tokens.shape == (1, 16, 4)
    assert tokens[0, 0].tolist() == [0, 1, 8, 9]
    assert tokens[0, 5].tolist() == [18, 19, 26, 27]


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"width must be a multiple of heads, got width = 30 and"):
        DigitsTransformer(width=30, heads=4)


# The demo as a whole


@pytest.fixture
def result(small_demo):
    """The demo on some of the images; on all of them it runs as its docstring's example."""
    return small_demo[0]


@pytest.fixture
def steps(small_demo):
    """Description and fraction of each step of it."""
    return small_demo[1]


def test_demo_restores_instruction_set_and_threads(result):
    before = cpu.active_isa(), torch.get_num_threads()
    with exactness.forced_isa("scalar"), exactness.torch_threads(before[1] + 1):
        assert torch.get_num_threads() == before[1] + 1
    assert (cpu.active_isa(), torch.get_num_threads()) == before
    assert (result.isa, result.threads, result.compared_threads) == ("scalar", 1, 2)


def test_demo_is_exact_everywhere(result):
    assert result.failures == []
    isas = set(cpu.available_isas())
    for name in exactness.CHECKS:
        found = {check.isa for check in result.checks if check.name == name}
        if name == "file":
            assert len(found) == 1
        else:
            assert found == (isas - {"scalar"} if name in ("logits", "layers") else isas)


def test_demo_compares_all_it_says(result):
    outputs = {384: 2, 128: 4, 512: 2}  # out_features: layers
    per_row = sum(width * layers for width, layers in outputs.items())
    values = {
        "logits": IMAGES * 10,
        "file": IMAGES * 10,
        "layers": IMAGES * 16 * per_row,
        "threads": IMAGES * 16 * per_row,
        "rows": SAMPLED_ROWS * per_row,
        "specification": SAMPLED_ROWS * per_row,
        "training": VERIFIED_IMAGES * (16 * per_row + 10),
    }
    for check in result.checks:
        if check.name != "networks":
            assert check.values == values[check.name], check
    logits = 2 * NETWORK_VERIFIED * 10
    layers = {"VGG": 16 * 2 * 32 * 32, "ResNet": 16 * 3 * 32 * 32}  # of the largest images
    compared = [check.values for check in result.checks if check.name == "networks"]
    assert len(compared) == 2 * len(cpu.available_isas())
    for values, least in zip((compared[0], compared[-1]), layers.values(), strict=True):
        assert values > logits + NETWORK_VERIFIED * least


def test_demo_networks(result):
    assert [network.name for network in result.networks] == ["VGG", "ResNet"]
    for network in result.networks:
        assert network.test_images == NETWORK_IMAGES
        assert network.float_correct >= NETWORK_IMAGES - 2
        assert abs(network.float_correct - network.static_correct) <= 1
        assert abs(network.float_correct - network.trained_correct) <= 1
        assert 3 < network.float_bytes / network.int8_bytes < 4
        assert [latency.batch for latency in network.latencies] == [1, 16]
        assert (network.calibration_images, network.steps) == (
            32 * NETWORK_CALIBRATION,
            NETWORK_STEPS,
        )


def test_demo_accuracy_size_and_report(result):
    assert result.test_images == IMAGES
    assert result.float_correct >= 0.95 * IMAGES
    assert abs(result.float_correct - result.int8_correct) <= 1
    assert result.same_answers >= IMAGES - 1
    assert 3.5 < result.float_bytes / result.int8_bytes < 4
    actions = {layer.name: layer.action for layer in result.report.layers}
    assert actions["patch_embedding"] == actions["head"] == "skipped"
    assert list(actions.values()).count("quantized") == INT8_LAYERS
    assert [latency.batch for latency in result.latencies] == [1, 64]
    assert all(latency.float_ms > 0 and latency.int8_ms > 0 for latency in result.latencies)


def test_demo_trains_what_it_ships(result):
    assert result.training.weight_bits == 2
    assert result.training.differing_bits == 0
    trained = [check.values for check in result.checks if check.name == "training"]
    assert result.training.values == sum(trained)
    assert result.training.steps == TRAINING_STEPS
    assert 0.8 * IMAGES < result.training.rounded_correct < result.float_correct
    assert result.training.trained_correct > result.training.rounded_correct - 3


def test_demo_steps_go_from_none_to_all(result, steps):
    fractions = [done for _, done in steps]
    assert fractions[0] == 0
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1 - 1 / len(steps)), "as many steps as announced"
    assert all(description for description, _ in steps)


def test_demo_result_as_json(result):
    data = json.loads(json.dumps(result.to_dict()))
    assert data["exact"] is True
    assert data["bytes"]["int8"] == result.int8_bytes
    assert data["accuracy"]["float"] == result.float_correct / IMAGES
    assert len(data["layers"]) == INT8_LAYERS + 2
    assert data["training"]["differing_bits"] == 0
    assert {check["name"] for check in data["checks"]} == set(exactness.CHECKS)
    assert [network["name"] for network in data["networks"]] == ["VGG", "ResNet"]


# The proof finds what it should find


@pytest.mark.parametrize(
    ("actual", "expected", "differing"),
    [
        pytest.param([1.0, 2.0], [1.0, 2.0], 0, id="equal"),
        pytest.param([1.0, 0.0], [1.0, -0.0], 1, id="sign of zero"),
        pytest.param([1.0, float("nan")], [1.0, float("nan")], 0, id="same NaN"),
        pytest.param([1.0, 1.0 + 2**-23], [1.0, 1.0], 1, id="last bit"),
        pytest.param([1.0], [1.0, 2.0], 2, id="shape"),
        pytest.param([], [], 0, id="empty"),
    ],
)
def test_count_differing(actual, expected, differing):
    assert count_differing(torch.tensor(actual), torch.tensor(expected)) == differing


def test_count_differing_refuses_other_types():
    ones = torch.ones(3)
    assert count_differing(ones.double(), ones) == 3
    assert count_differing(ones.bfloat16(), ones.bfloat16()) == 3
    assert count_differing(torch.ones(2, 3).T, torch.ones(3, 2)) == 0, "strides do not matter"


def test_a_check_that_compared_nothing_has_not_passed():
    assert not Check("rows", "scalar").passed
    assert Check("rows", "scalar", values=1).passed
    assert not Check("rows", "scalar", values=2, differing=1).passed


class OneBitOff(QuantizedLinear):
    """A layer whose last output has a wrong last bit when ``wrong()`` says so."""

    wrong = staticmethod(lambda input: False)

    def forward(self, input):
        output = super().forward(input)
        if self.wrong(input):
            output[-1, -1] = torch.nextafter(output[-1, -1], torch.tensor(9e9))
        return output


def one_layer_model():
    layer = QuantizedLinear.from_float(nn.Linear(64, 48))
    layer.__class__ = OneBitOff
    return nn.Sequential(layer).eval()


def failed_checks(wrong, monkeypatch):
    monkeypatch.setattr(OneBitOff, "wrong", staticmethod(wrong))
    with torch.inference_mode():
        rows = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
        checks = exactness.check_layers(one_layer_model(), rows, 2, Steps(1))
    return {(check.name, check.isa, check.differing) for check in checks if not check.passed}


def test_proof_passes_a_right_layer(monkeypatch):
    assert failed_checks(lambda input: False, monkeypatch) == set()


def test_proof_finds_a_layer_that_depends_on_threads(monkeypatch):
    failed = failed_checks(lambda input: torch.get_num_threads() == 1, monkeypatch)
    assert failed == {("threads", isa, 1) for isa in cpu.available_isas()}


def test_proof_finds_a_layer_that_depends_on_the_batch(monkeypatch):
    failed = failed_checks(lambda input: len(input) == 1, monkeypatch)
    sampled = exactness.SAMPLED_ROWS
    assert failed == {("rows", isa, sampled) for isa in cpu.available_isas()}


def test_proof_finds_an_instruction_set_that_differs(monkeypatch):
    best = cpu.available_isas()[0]
    if best == "scalar":
        pytest.skip("needs a second instruction set")
    failed = failed_checks(lambda input: cpu.active_isa() == best and len(input) > 1, monkeypatch)
    assert failed == {("layers", best, 1), ("specification", best, 1), ("rows", best, 1)}


def test_proof_finds_what_no_kernel_agrees_with(monkeypatch):
    failed = failed_checks(lambda input: len(input) > 1, monkeypatch)
    assert {name for name, _, _ in failed} == {"specification", "rows"}


def test_proof_refuses_an_instruction_set_that_did_not_run(monkeypatch):
    monkeypatch.setattr(cpu, "use_isa", nullcontext)
    message = rf"use_isa\('other'\) had no effect: '{cpu.active_isa()}' is active"
    with pytest.raises(RuntimeError, match=message), exactness.forced_isa("other"):
        pass


# Tables


def text_of(renderable, width):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(result, width):
    text = text_of(tables.render(result), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text, "nothing is cut off"
    for isa in cpu.available_isas():
        assert f"\n{isa} " in text
    assert f"{result.float_correct / IMAGES:.2%}" in text
    assert f"same answer for {result.same_answers} of {IMAGES}" in text
    assert f"all {10 * IMAGES} logits the same" in text
    assert "none differs" in text
    assert "0 differing bits in" in text


def test_tables_show_failures(result):
    worse = demo.DemoResult(
        **{**vars(result), "checks": [Check("rows", "scalar", 20, 3), Check("file", "scalar")]}
    )
    text = text_of(tables.render(worse), 80)
    assert "NOT EXACT" in text
    assert "DIFFER" in text
    assert "logits the same" not in text
    described = tables.describe_failures(worse)
    assert "scalar: 3 of 20 values differ: rows of the int8 layers, alone" in described
    assert "scalar: nothing was compared: the logits" in described


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(3.94, "3.9 times faster"), (1.0, "1.0 times faster"), (0.5, "2.0 times slower")],
)
def test_speed_in_words(ratio, words):
    assert tables.speed(ratio) == words


def test_counts_in_words():
    assert (tables.plural(1, "image"), tables.plural(64, "image")) == ("1 image", "64 images")


# The script that makes the files


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[str]]:
    environment = dict(os.environ)
    script = str(ROOT / "examples" / "train_digits.py")
    return (
        lambda option: subprocess.run(
            [sys.executable, script, option], env=environment, capture_output=True, text=True
        ),
        ["--smoke"] if tests.has(test_training_script_runs_in_small) else [],
    )


BEFORE = {path.name: path.read_bytes() for path in DATA.iterdir()}


def test_training_script_runs_in_small(request, processes):
    pytest.importorskip("sklearn")
    done = processes.result(request.module, "--smoke")
    assert done.returncode == 0, done.stderr
    for line in ("accuracy on 450 test images", digits_data.DATA_FILE, digits.CHECKPOINT_FILE):
        assert line in done.stdout
    assert {path.name: path.read_bytes() for path in DATA.iterdir()} == BEFORE, "writes elsewhere"
