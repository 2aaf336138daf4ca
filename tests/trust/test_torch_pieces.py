"""The pieces of torch on which the guard of a call relies; another version may change them.

If a test here fails, layers may have lost the fast path, or found another caller than theirs: read
torchquant/nn/call_guard.py before anything else.
"""

import dis
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from torchquant.nn import caller

WHERE = "torchquant/nn/caller.py and csrc/caller.cpp rely on it"


class Spy(nn.Module):
    """Keeps the names of the functions that call its forward."""

    def forward(self, x: Tensor) -> Tensor:
        frame: Any = sys._getframe(1)
        self.names = []
        self.found = caller.calling_frame(frame)
        while frame is not None and len(self.names) < 6:
            self.names.append(frame.f_code.co_name)
            frame = frame.f_back
        return x


def called(spy: Spy) -> list[str]:
    spy(torch.ones(1))
    return spy.names


def test_a_call_of_a_module_has_two_frames() -> None:
    spy = Spy()
    names = called(spy)
    assert names[:3] == ["_call_impl", "_wrapped_call_impl", "called"], WHERE
    assert spy.found is not None and spy.found.f_code is called.__code__, WHERE


@pytest.mark.parametrize(
    "register",
    [
        *("register_forward_hook", "register_forward_pre_hook"),
        *("register_full_backward_hook", "register_full_backward_pre_hook"),
    ],
)
def test_a_hook_hides_the_caller(register: str) -> None:
    spy = Spy()
    handle = getattr(spy, register)(lambda *args: None)
    called(spy)
    assert spy.found is None, WHERE
    handle.remove()
    called(spy)
    assert spy.found is not None


@pytest.mark.parametrize(
    "register",
    [
        *("register_module_forward_hook", "register_module_forward_pre_hook"),
        *("register_module_full_backward_hook", "register_module_full_backward_pre_hook"),
    ],
)
def test_a_global_hook_hides_the_caller(register: str) -> None:
    spy = Spy()
    handle = getattr(torch_modules, register)(lambda *args: None)
    try:
        called(spy)
        assert spy.found is None, WHERE
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_hides_the_caller() -> None:
    spy, holder = Spy(), nn.Sequential()
    holder.append(spy)
    torch.jit.trace(lambda x: spy(x), torch.ones(1), check_trace=False)
    assert spy.found is None, WHERE


def test_the_forward_of_a_sequential() -> None:
    code = nn.Sequential.forward.__code__
    assert code.co_varnames == ("self", "input", "module"), WHERE
    used = [i.argval for i in dis.get_instructions(code) if i.opname.startswith("STORE")]
    assert sorted(used) == ["input", "module"], WHERE
    assert not code.co_names, "Sequential.forward reads attributes or globals: " + WHERE


def test_the_order_of_a_sequential() -> None:
    assert nn.Sequential.__iter__.__code__.co_names[:3] == ("iter", "_modules", "values"), WHERE


def test_attributes_of_modules() -> None:
    """Parameters and buffers come before modules; a module is found only if nothing else is."""
    names = nn.Module.__getattr__.__code__.co_consts
    order = [n for n in names if n in ("_parameters", "_buffers", "_modules")]
    assert order == ["_parameters", "_buffers", "_modules"], WHERE
    assert nn.Module.__getattribute__ is object.__getattribute__, WHERE


def test_dictionaries_of_hooks() -> None:
    names = {name for name in vars(nn.Module()) if "hooks" in name and "state" not in name}
    read = {
        *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
        # These belong to others.
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
        "_forward_pre_hooks_with_kwargs",
    }
    assert {n for n in names if not n.startswith("_load")} == read, WHERE


def test_stacks_of_modes() -> None:
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._len_torch_dispatch_stack() == 0
    with torch.overrides.BaseTorchFunctionMode():
        assert torch._C._len_torch_function_stack() == 1, WHERE
    with torch.device("cpu"):  # a mode as well; layers lose speed there
        assert torch._C._len_torch_function_stack() == 1


def test_a_tensor_keeps_attributes_until_the_next_module() -> None:
    """A view or a copy of a marked tensor is another object without the mark."""
    x = torch.ones(2)
    x._activated_for = 1  # type: ignore[attr-defined]
    for other in (x.view(2), x.detach(), x.clone(), x + 0, x[:]):
        assert "_activated_for" not in other.__dict__


def test_versions_count_changes_in_place() -> None:
    x = torch.ones(2)
    before = x._version
    x[:1].add_(1)
    assert x._version > before, "torchquant/nn/projections.py relies on it"
