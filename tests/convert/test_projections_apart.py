"""Layers on one tensor are computed separately wherever one product is not permitted."""

import gc
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.projections import Attention, Calls, Decoder, GatedMLP, X, both, lines
from torch import Tensor
from torch.nn import functional as F

import torchquant.nn.projections as projections


def test_with_gradients(shared: Calls) -> None:
    plain, model, _ = both(Attention())
    results = []
    for net in (plain, model):
        x = X.clone().requires_grad_()
        net(x).sum().backward()
        assert x.grad is not None
        results.append(x.grad)
    assert_same_bits(results[1], results[0])
    assert shared == []


def test_autocast(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Attention())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(model(X), plain(X))
    assert shared == []


def test_vmap_and_functional_call(shared: Calls) -> None:
    plain, model, _ = both(GatedMLP())
    with torch.no_grad():
        state = {"up.qweight_scale": model.up.weight_scale * 2}
        got, expected = (torch.func.functional_call(net, state, (X,)) for net in (model, plain))
        assert_same_bits(got, expected)
        assert shared == []
        assert_same_bits(model(X), plain(X))
        assert shared == [2]


def test_compile_and_export(shared: Calls) -> None:
    plain, model, _ = both(GatedMLP())
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_same_bits(compiled(X), plain(X))
        exported = torch.export.export(model, (X,)).module()
        assert_same_bits(exported(X), plain(X))
        traced = torch.jit.trace(model, (X,), check_trace=False)
        assert_same_bits(traced(X), plain(X))
        assert shared == []


def test_members_called_by_other_code(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Attention())
    for name in ("v", "q", "k", "q", "v", "k"):
        assert_same_bits(getattr(model, name)(X), getattr(plain, name)(X))
    assert shared == []


def test_a_forward_called_with_few_frames_on_the_stack() -> None:
    """The call stack has no frame four levels up."""
    script = """
import torch, torchquant
net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
net.a, net.b = net[0], net[1]
del net._modules["0"], net._modules["1"]
net.__class__ = type("Net", (torch.nn.Module,), {"forward": lambda s, x: s.a(x) + s.b(x)})
print(torchquant.quantize_(net).fusions[0].action)
with torch.no_grad():
    print(net.a.forward(torch.ones(64)).shape)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.splitlines() == ["fused", "torch.Size([64])"], run.stderr


def test_a_change_in_place_between_calls_by_other_code(gradients_off: None) -> None:
    plain, model, _ = both(Attention())
    x = X.clone()
    model.q(x)
    x.mul_(3)
    assert_same_bits(model.k(x), plain.k(x))
    x.data.add_(1)
    assert_same_bits(model.v(x), plain.v(x))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_are_added_later(shared: Calls, gradients_off: None, register: str) -> None:
    plain, model, _ = both(Attention())
    for net in (plain, model):
        getattr(net.q, register)(lambda module, args, *rest: (args[0].mul_(2), None)[1])
    xs = [X.clone(), X.clone()]
    assert_same_bits(model(xs[1]), plain(xs[0]))
    assert shared == []


def test_an_input_that_does_not_fit(shared: Calls, gradients_off: None) -> None:
    _, model, _ = both(Attention())
    with pytest.raises(ValueError, match="QuantizedLinear: input must be"):
        model(torch.zeros(3, 65))
    with pytest.raises(TypeError):
        model(torch.zeros(3, 64, dtype=torch.float64))
    model(X)
    assert shared[-1] == 3


class CrossAttention(Attention):
    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:  # type: ignore[override]
        source = x if memory is None else memory
        q, k, v = self.q(x), self.k(source), self.v(source)
        return self.o(F.scaled_dot_product_attention(q, k, v))  # type: ignore[no-any-return]


def test_cross_attention(shared: Calls, gradients_off: None) -> None:
    """Queries of one tensor, keys and values of another: only the latter are one product."""
    plain, model, report = both(CrossAttention())
    assert lines(report) == ["fused: k, v: one product"]
    memory = floats(2, 7, 64, seed=1)
    for _ in range(5):
        assert_same_bits(model(X, memory), plain(X, memory))
        assert_same_bits(model(X), plain(X))
    assert shared == [2] * 10


def test_outputs_that_nobody_uses_dissolve_the_group(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Attention())
    for net in (plain, model):
        net.v = torch.nn.Linear(64, 64)
    with torch.no_grad():
        model.v.weight.copy_(plain.v.weight)
        model.v.bias.copy_(plain.v.bias)
    for _ in range(8):
        assert_same_bits(model(X), plain(X))
    assert len(shared) == 3
    assert model.q._group is None


def test_no_output_is_kept(gradients_off: None) -> None:
    _, model, _ = both(Attention())
    model.v = torch.nn.Linear(64, 64)
    group = model.q._group
    x = X.clone()
    model(x)  # the third output is not used
    outputs = [weakref.ref(output) for output in group._slot.kept.outputs if output is not None]
    assert len(outputs) == 1
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None
    assert [output() for output in outputs] == [None]


def test_outputs_are_released_with_their_users(
    monkeypatch: pytest.MonkeyPatch, gradients_off: None
) -> None:
    """Outputs are released although the input still exists, without the garbage collector."""
    split = projections._split
    references: list[weakref.ref[Tensor]] = []

    def noted(*arguments: Any) -> Any:
        outputs = split(*arguments)
        references.extend(map(weakref.ref, outputs))
        return outputs

    monkeypatch.setattr(projections, "_split", noted)
    _, model, _ = both(Attention())
    x = floats(2, 5, 64)
    gc.collect()
    gc.disable()
    try:
        model(x)
        assert len(references) == 3
        assert [reference() for reference in references] == [None, None, None]
    finally:
        gc.enable()


def test_an_error_between_the_calls(gradients_off: None) -> None:
    plain, model, _ = both(Attention())
    original = model.k.forward

    def fail(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model.k.forward = fail
    x = X.clone()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.k.forward = original
    x.mul_(2)
    assert_same_bits(model(x), plain(x))


def test_threads(gradients_off: None) -> None:
    plain, model, _ = both(Decoder())
    inputs = [floats(2, 3 + i, 64, seed=i) for i in range(4)]
    expected = [plain(x) for x in inputs]
    mode, errors = torch.is_inference_mode_enabled(), []

    def work(index: int) -> None:
        try:
            with torch.inference_mode(mode), torch.no_grad():
                for _ in range(30):
                    assert_same_bits(model(inputs[index]), expected[index])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
