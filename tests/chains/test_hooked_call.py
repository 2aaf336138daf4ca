"""Hooks around a function that stands for a module's forward: as in a call of the module."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.chains import CONFIG
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

import torchquant
from torchquant.chains.hooked_call import run_as

Seen = list[Any]


class Doubling(nn.Module):
    def forward(self, x: Tensor, offset: float = 0.0) -> Tensor:
        return 2 * x + offset


def forward_hook(seen: Seen) -> Any:
    return lambda module, args, output: seen.append((module, args, output))


def changes_output(seen: Seen) -> Any:
    return lambda module, args, output: output * 3


def pre_hook(seen: Seen) -> Any:
    return lambda module, args: (args[0] + 1, *args[1:])


def pre_hook_of_one(seen: Seen) -> Any:
    return lambda module, args: args[0] + 1


def pre_hook_with_kwargs(seen: Seen) -> Any:
    return lambda module, args, kwargs: (args, {"offset": kwargs.get("offset", 0.0) + 5})


def hook_with_kwargs(seen: Seen) -> Any:
    return lambda module, args, kwargs, output: seen.append((module, args, kwargs, output))


def backward_hook(seen: Seen) -> Any:
    return lambda module, grads_in, grads_out: seen.append((module, grads_in, grads_out))


def backward_pre_hook(seen: Seen) -> Any:
    return lambda module, grads_out: (grads_out[0] * 7,)


REGISTER: dict[str, Callable[[nn.Module, Seen], Any]] = {
    "forward": lambda m, s: m.register_forward_hook(forward_hook(s)),
    "changing": lambda m, s: m.register_forward_hook(changes_output(s)),
    "prepended": lambda m, s: (
        m.register_forward_hook(forward_hook(s)),
        m.register_forward_hook(changes_output(s), prepend=True),
    ),
    "pre": lambda m, s: m.register_forward_pre_hook(pre_hook(s)),
    "pre, one value": lambda m, s: m.register_forward_pre_hook(pre_hook_of_one(s)),
    "pre with kwargs": lambda m, s: m.register_forward_pre_hook(
        pre_hook_with_kwargs(s), with_kwargs=True
    ),
    "with kwargs": lambda m, s: m.register_forward_hook(hook_with_kwargs(s), with_kwargs=True),
    "backward": lambda m, s: m.register_full_backward_hook(backward_hook(s)),
    "before backward": lambda m, s: m.register_full_backward_pre_hook(backward_pre_hook(s)),
    "old backward": lambda m, s: m.register_backward_hook(backward_hook(s)),
    "of all": lambda m, s: nn.modules.module.register_module_forward_hook(forward_hook(s)),
    "before all": lambda m, s: nn.modules.module.register_module_forward_pre_hook(pre_hook(s)),
    "backward of all": lambda m, s: nn.modules.module.register_module_full_backward_hook(
        backward_hook(s)
    ),
}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first is second or first == second)


@pytest.mark.parametrize("hooks", [*REGISTER, "pre, changing, backward, with kwargs"])
def test_hooks_run_as_in_a_call(hooks: str) -> None:
    module, results = Doubling(), []
    seen: Seen = []
    names = [hooks] if hooks in REGISTER else hooks.split(", ")
    handles = [REGISTER[name](module, seen) for name in names]
    try:
        for call in (module, lambda *a, **k: run_as(module, Doubling().forward, a, k)):
            seen.clear()
            x = torch.tensor([1.0, 2.0], requires_grad=True)
            y = call(x, offset=0.5)
            y.sum().backward()
            results.append((y, x.grad, list(seen)))
    finally:
        for handle in handles:
            for one in handle if isinstance(handle, tuple) else (handle,):
                one.remove()
        global_hooks._global_is_full_backward_hook = None
    assert same(*results)
    assert "forward" not in module.__dict__


def test_hooks_that_are_always_called() -> None:
    module = Doubling()
    seen: Seen = []
    module.register_forward_hook(forward_hook(seen), always_call=True)
    module.register_forward_hook(changes_output(seen))
    with pytest.raises(ZeroDivisionError):
        run_as(module, lambda x: 1 / 0, (torch.ones(1),), {})
    assert len(seen) == 1 and seen[0][2] is None


def test_a_wrong_result_of_a_hook() -> None:
    module = Doubling()
    module.register_forward_pre_hook(lambda *_: 5, with_kwargs=True)
    with pytest.raises(RuntimeError, match="forward pre-hook must return None or a tuple"):
        run_as(module, torch.neg, (torch.ones(1),), {})


def test_threads_call_a_hooked_region_and_its_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
    ).eval()
    x = torch.randn(2, 8, 6, 6)
    torchquant.prepare_(model, CONFIG, filter_fn=lambda module, name: True)
    torchquant.calibrate(model, [x])
    torchquant.convert_(model)
    for module in (model[0], model[0][1], model[1]):
        module.register_forward_hook(lambda *_: None)
    wrong: list[str] = []
    with torch.no_grad():
        whole, part, act = model(x), model[0](x), model[0][1](x)

    def run(call: Callable[[Tensor], Tensor], wanted: Tensor, name: str) -> None:
        with torch.no_grad():
            for _ in range(60):
                if not torch.equal(call(x), wanted):
                    wrong.append(name)

    jobs = [(model, whole, "region"), (model[0], part, "inner"), (model[0][1], act, "leaf")]
    threads = [threading.Thread(target=run, args=job) for job in [*jobs, *jobs]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
