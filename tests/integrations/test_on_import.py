"""Other libraries are extended when the program imports them, and torchquant imports none."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.ahead import NewFolder, Processes, Run, Selection
from support.scripts import run_python

from torchquant.integrations import peft as peft_integration
from torchquant.integrations.extend import extend, is_extended
from torchquant.integrations.on_import import _FINDER, when_imported

LATER = """
import sys, torchquant, torch
from torch import nn
assert not {"peft", "transformers", "diffusers", "huggingface_hub"} & sys.modules.keys()
model = nn.Sequential(nn.Linear(64, 64))
torchquant.quantize_(model)
import importlib.util
assert importlib.util.find_spec("peft") is not None  # only a question: peft is not imported
import peft
from transformers import BertModel
"""
EARLIER = """
import peft
from transformers import BertModel
import torch, torchquant
from torch import nn
model = nn.Sequential(nn.Linear(64, 64))
torchquant.quantize_(model)
"""
THEN = """
import warnings
warnings.simplefilter("error")
adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
adapted(torch.randn(2, 64)).sum().backward()
assert BertModel.save_pretrained._torchquant_extends
import inspect
assert "merge" in inspect.getsource(peft.tuners.lora.layer.LoraLayer)
print("works")
"""


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[str]]:
    environment = dict(os.environ)
    return (
        lambda first: run_python(first + THEN, environment=environment),
        tests.values("first") if importlib.util.find_spec("peft") else [],
    )


@pytest.mark.parametrize("first", [LATER, EARLIER], ids=["later", "earlier"])
def test_the_order_of_imports_does_not_matter(
    first: str, request: pytest.FixtureRequest, processes: Processes
) -> None:
    pytest.importorskip("peft")
    run = processes.result(request.module, first)
    assert run.stdout.strip() == "works", run.stderr


@pytest.fixture
def module_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "watched_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("watched_module", None)
    return "watched_module"


def test_a_function_runs_once_after_the_import(module_on_disk: str) -> None:
    seen: list[int] = []
    when_imported(module_on_disk, lambda module: seen.append(module.value))
    assert importlib.util.find_spec(module_on_disk) is not None
    assert not seen
    importlib.import_module(module_on_disk)
    assert seen == [1]
    importlib.reload(sys.modules[module_on_disk])
    assert seen == [1]
    when_imported(module_on_disk, lambda module: seen.append(2))
    assert seen == [1, 2]
    assert module_on_disk not in _FINDER.waiting


def test_an_extension_that_fails_leaves_the_library_usable(module_on_disk: str) -> None:
    def fail(module: ModuleType) -> None:
        raise AttributeError("no such method")

    when_imported(module_on_disk, fail)
    with pytest.warns(UserWarning) as warned:
        assert importlib.import_module(module_on_disk).value == 1
    assert str(warned[0].message) == (
        "torchquant cannot extend watched_module: AttributeError: no such method; install a "
        "version that torchquant supports"
    )


def test_a_missing_module_is_still_missing() -> None:
    when_imported("no_such_module_at_all", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_at_all")
    del _FINDER.waiting["no_such_module_at_all"]


def test_extending_twice_changes_nothing() -> None:
    class Base:
        def double(self, value: int) -> int:
            return 2 * value

        @staticmethod
        def half(value: int) -> int:
            return value // 2

    class Derived(Base):
        def double(self, value: int) -> int:
            return 20 * value

    for _ in range(2):
        extend(Base, "double", lambda original, self, value: original(self, value) + 1)
        extend(Base, "half", lambda original, value: original(value) + 1)
    assert (Base().double(2), Base().half(4), Base.half(4)) == (5, 3, 3)
    assert Derived().double(2) == 40
    assert is_extended(Base, "double") and not is_extended(Derived, "double")
    with pytest.raises(AttributeError):
        extend(Base, "missing", lambda original: None)


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    method = peft.tuners.lora.layer.Linear.merge
    peft_integration.register()
    assert peft.tuners.lora.layer.Linear.merge is method, "further calls change nothing"
    monkeypatch.delattr(peft.tuners.tuners_utils, "_maybe_include_all_linear_layers")
    with pytest.raises(ImportError, match=r"^register: peft must be a version that torchquant can"):
        peft_integration.register()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"^register: peft must be installed, .*pip install peft"):
        peft_integration.register()
