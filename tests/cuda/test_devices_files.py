"""Files and verify between devices, on a machine that pretends to have a GPU."""

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import assert_same_bits, floats
from support.devices import (
    HOST,
    Net,
    on_cuda,
)
from support.pretend import CUDA, pretended_cuda, values
from torch import Tensor, nn

from torchquant import (
    QATConfig,
    convert_,
    load,
    prepare_qat_,
    quantize_,
    save,
    verify,
)

verify_module = sys.modules[
    "torchquant.analysis.verify"
]  # the name in the package is the function's


def test_a_file_is_loaded_onto_the_gpu(tmp_path: Path) -> None:
    model = Net().eval()
    quantize_(model)
    save(model, tmp_path / "file")
    x = floats(3, 64)
    with torch.no_grad(), pretended_cuda() as cuda:
        with torch.device("meta"):
            empty = Net().eval()
        loaded = load(tmp_path / "file", empty, device=cuda)
        assert {t.device for t in (*loaded.parameters(), *loaded.buffers())} == {CUDA}
        output = loaded(on_cuda(x))
        save(loaded, tmp_path / "again")
        assert not any(module._state_dict_hooks for module in loaded.modules())
        load(tmp_path / "file", loaded)  # the CPU, as ever
    assert {t.device for t in (*loaded.parameters(), *loaded.buffers())} == {HOST}
    assert_same_bits(values(output), model(x).detach())
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(
    ("device", "text"),
    [("meta", "device must hold values, got 'meta'"), ("gpu", "one of torch's devices, got 'gpu'")],
)
def test_devices_that_no_file_is_loaded_onto(tmp_path: Path, device: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load(tmp_path / "no file", Net(), device=device)


@pytest.mark.parametrize("kind", ["converted", "prepared", "quantized"])
@pytest.mark.parametrize("to_cuda", ["first", "second", "both"])
def test_verify_between_devices(monkeypatch: pytest.MonkeyPatch, kind: str, to_cuda: str) -> None:
    monkeypatch.setattr(verify_module, "_cuda_generators", lambda devices: [])
    torch.manual_seed(0)
    first: nn.Module = Net()
    if kind == "quantized":
        quantize_(first.eval())
    else:
        prepare_qat_(first, QATConfig(activations="static"))
        first(floats(8, 64))
    second = copy.deepcopy(first)
    if kind == "converted":
        convert_(second)
    batches = [floats(3, 64), (floats(2, 64),), {"x": floats(4, 64), "scale": torch.ones(1)}]
    with pretended_cuda() as cuda:
        for model, name in ((first, "first"), (second, "second")):
            if to_cuda in (name, "both"):
                model.to(cuda)
        if to_cuda == "both" and kind != "converted":
            with pytest.raises(ValueError, match="verify: q"):
                verify(first, second, batches)
            return
        report = verify(first, second, batches)
    assert report.exact
    assert [layer.values for layer in report.layers] == [9 * 128, 9 * 64]
    places = {"first": ("cuda:0", "cpu"), "second": ("cpu", "cuda:0"), "both": ("cuda:0", "cuda:0")}
    assert report.devices == places[to_cuda]
    line = f"Devices: {report.devices[0]} (trained) and {report.devices[1]} (converted)"
    assert (line in str(report)) == (to_cuda != "both")


def test_verify_finds_a_difference_between_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_cuda_generators", lambda devices: [])
    first = Net().eval()
    quantize_(first)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.down.bias[3] += 1
    with pretended_cuda() as cuda:
        pairs = [(first, copy.deepcopy(second).to(cuda)), (copy.deepcopy(first).to(cuda), second)]
        for models in pairs:
            report = verify(*models, [floats(3, 64)])
            assert (report.layers[0].bits, report.layers[1].differing) == (0, 3)
            assert report.first_difference is not None
            assert report.first_difference.index == (0, 3)


def test_a_prepared_model_in_its_first_stage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_cuda_generators", lambda devices: [])
    first = Net()
    prepare_qat_(first)
    second = copy.deepcopy(first)
    second.up.enable_quantization(False)
    with pretended_cuda() as cuda, pytest.raises(ValueError, match=r"stage 'observe' \(up\)"):
        verify(first, second.to(cuda), [floats(3, 64)])


class Sample(NamedTuple):
    x: Tensor
    rows: list[Tensor]
    name: str


def test_batches_of_all_kinds_are_moved() -> None:
    x = floats(2, 3)
    batch = {"sample": Sample(x, [x, x], "text"), "rest": (x, 3)}
    assert verify_module._moved(batch, {HOST}) is batch, "nothing to move"
    assert verify_module._moved(batch, {HOST, CUDA}) is batch, "the model has several devices"
    with pretended_cuda():
        moved = verify_module._moved(batch, {CUDA})
    assert type(moved["sample"]) is Sample
    assert moved["sample"].name == "text"
    assert moved["rest"][1] == 3
    tensors = [moved["sample"].x, *moved["sample"].rows, moved["rest"][0]]
    assert all(tensor.device == CUDA and torch.equal(values(tensor), x) for tensor in tensors)


def test_generators_of_both_models() -> None:
    devices = [torch.device(name) for name in ("cuda:1", "cpu", "cuda:0", "meta")]
    assert verify_module._cuda_generators(devices) == [0, 1]
