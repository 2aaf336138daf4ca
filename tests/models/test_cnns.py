"""The convolutional networks of the package, their checkpoints, and the script that trains them."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchquant
from torchquant.data import digit_images, files
from torchquant.models import SmallResNet, SmallVGG, load_digits_resnet, load_digits_vgg
from torchquant.models.checkpoint import load_checkpoint, save_checkpoint
from torchquant.models.resnet import RESNET_FILE, RESNET_KEY
from torchquant.models.vgg import VGG_FILE

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(torchquant.__file__).resolve().parent / "data"
LOADS = {VGG_FILE: load_digits_vgg, RESNET_FILE: load_digits_resnet}


@pytest.mark.parametrize("cls", [SmallVGG, SmallResNet])
@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 32), (3, 48)])
def test_shapes(cls, channels, size):
    model = cls(channels=channels, classes=7).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)
    assert model(torch.zeros(0, channels, size, size)).shape == (0, 7)
    assert cls(**model.config).config == model.config


@pytest.mark.parametrize("cls", [SmallVGG, SmallResNet])
def test_networks_can_be_traced(cls):
    model = cls().eval()
    traced = torch.fx.symbolic_trace(model)
    images = torch.rand(3, 1, 32, 32)
    assert torch.equal(traced(images), model(images))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_resnet_has_the_layers_that_its_name_counts(blocks):
    model = SmallResNet(blocks=blocks)
    in_order = [
        m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "short" not in n
    ]
    assert len(in_order) + 1 == 6 * blocks + 2
    shapes = [m.out_channels for m in in_order]
    assert shapes[0] == shapes[1] == 16
    assert shapes[-1] == 64


def test_vgg_has_a_norm_for_each_convolution():
    model = SmallVGG(stages=[[8, 8], [16]])
    kinds = [type(module).__name__ for module in model.features]
    layer = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds == [*layer, *layer, "MaxPool2d", *layer, "MaxPool2d"]


@pytest.mark.parametrize("stages", [[], [[8], []]])
def test_empty_stages_are_refused(stages):
    with pytest.raises(ValueError, match=r"SmallVGG: stages must hold at least one stage"):
        SmallVGG(stages=stages)


@pytest.mark.parametrize("arguments", [{"blocks": 0}, {"widths": []}])
def test_resnet_without_layers_is_refused(arguments):
    with pytest.raises(ValueError, match=r"blocks must be at least 1 and widths must hold"):
        SmallResNet(**arguments)


# Checkpoints


@pytest.mark.parametrize("file", LOADS)
def test_checkpoint_is_small_complete_and_as_accurate_as_documented(file):
    assert (DATA / file).stat().st_size < 300_000
    model = LOADS[file]()
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    data = digit_images()
    with torch.inference_mode():
        answers = torch.cat([model(part).argmax(dim=1) for part in data.test_images.split(300)])
    found = (answers == data.test_labels).double().mean().item()
    lines = (DATA / "README.md").read_text().splitlines()
    line = next(line for line in reversed(lines) if file in line)
    documented = float(line.rpartition("|")[0].rpartition("|")[2].replace("%", ""))
    assert found > 0.99
    # Other processors interpolate the augmented images with other bits.
    assert abs(100 * found - documented) < 0.1


@pytest.mark.parametrize("load", LOADS.values())
def test_loading_draws_no_random_numbers(load):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("load", LOADS.values())
def test_missing_checkpoint_is_named(load, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    with pytest.raises(FileNotFoundError, match=r"data/digits_\S+ is missing; .*train_cnn.py"):
        load()


def test_half_precision_is_stored_and_float_is_loaded(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, "key", {"a": [1, 2]}, torch.float16)
    config, state = load_checkpoint(path, "key")
    assert config == {"a": [1, 2]}
    assert state["1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(state["0.weight"], model[0].weight.half().float())
    model.load_state_dict(state)


# The script


@pytest.fixture
def script(monkeypatch):
    """The script's main(), which takes the arguments of the command line."""
    path = ROOT / "examples" / "train_cnn.py"
    spec = importlib.util.spec_from_file_location("train_cnn", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_cnn", module)
    spec.loader.exec_module(module)
    module.RECIPES["digits"] = dataclasses.replace(module.RECIPES["digits"], digits=64)
    threads = torch.get_num_threads()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        module.main()

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("data", ["digits", "photographs"])
def test_training_script_runs_in_small(data, script, capsys):
    pytest.importorskip("sklearn")
    before = {path.name: path.read_bytes() for path in DATA.glob("*.safetensors")}
    script("--smoke", "--data", data)
    printed = capsys.readouterr().out
    for line in (f"{data}_vgg.safetensors", f"{data}_resnet.safetensors", "test images correct"):
        assert line in printed
    after = {path.name: path.read_bytes() for path in DATA.glob("*.safetensors")}
    assert before == after, "writes elsewhere"


def test_training_script_writes_what_the_package_loads(script, tmp_path):
    script("--model", "resnet", "--epochs", "0", "--output", str(tmp_path))
    config, state = load_checkpoint(tmp_path / RESNET_FILE, RESNET_KEY)
    SmallResNet(**config).load_state_dict(state)
    assert [path.name for path in tmp_path.iterdir()] == [RESNET_FILE]


def test_training_script_wants_a_folder_for_photographs(script, capsys):
    with pytest.raises(SystemExit):
        script("--data", "photographs")
    assert "--output must name a folder" in capsys.readouterr().err
