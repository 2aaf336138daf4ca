"""Layers that are applied to one tensor: the same bits always, one call if it is permitted."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import CONFIGS
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant.nn.projections as projections
from torchquant import Fusion, QuantizationConfig, load, quantize_, save
from torchquant import QuantizationReport as Report
from torchquant.nn import QuantizedLinear

Calls = list[int]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The number of members of each product of several layers."""
    calls: Calls = []
    split = projections._split

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[5]))
        return split(*arguments)

    monkeypatch.setattr(projections, "_split", counted)
    return calls


class Attention(nn.Module):
    """Attention as in Hugging Face: views between the calls, and a branch on values after them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        shape = (*x.shape[:-1], -1, 16)
        q = self.q(x).view(shape).transpose(-3, -2)
        k = self.k(x).view(shape).transpose(-3, -2)
        v = self.v(x).view(shape).transpose(-3, -2)
        if q.shape[1] > 1 and mask is not None:
            k = k + mask
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(64), Attention(), nn.LayerNorm(64), GatedMLP()])
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm1, attention, norm2, mlp in self.layers:
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return x


X = floats(2, 5, 64)


def both(
    model: nn.Module, config: QuantizationConfig | None = None
) -> tuple[nn.Module, nn.Module, Report]:
    """The model converted without groups and with groups, and the lines of the report."""
    plain = copy.deepcopy(model.eval())
    quantize_(plain, config, fusion=Fusion(projections=False))
    report = quantize_(model, config)
    return plain, model, report


def lines(report: Report) -> list[str]:
    return [str(fusion) for fusion in report.fusions if fusion.kind == "projections"]


@pytest.fixture(params=["no_grad", "inference_mode"])
def gradients_off(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.no_grad() if request.param == "no_grad" else torch.inference_mode():
        yield


# ---------------------------------------------------------------- the same bits, in fewer calls


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_attention(
    shared: Calls, gradients_off: None, config: QuantizationConfig, bias: bool
) -> None:
    plain, model, report = both(Attention(bias), config)
    assert lines(report) == ["fused: q, k, v: one product"]
    for x in (X, X[0], X[:, :1], X.bfloat16(), X.half(), X.transpose(0, 1)):
        del shared[:]
        assert_same_bits(model(x), plain(x))
        assert shared == [3]


def test_a_gated_mlp(shared: Calls, gradients_off: None) -> None:
    plain, model, report = both(GatedMLP())
    assert [str(fusion) for fusion in report.fusions] == [
        "fused: gate with act (silu)",
        "fused: gate, up: one product",
    ]
    assert_same_bits(model(X), plain(X))
    assert shared == [2]


def test_a_decoder(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Decoder())
    for _ in range(3):
        del shared[:]
        assert_same_bits(model(X), plain(X))
        assert shared == [3, 2, 3, 2]


def test_some_layers_without_a_bias(shared: Calls, gradients_off: None) -> None:
    attention = Attention()
    attention.k = nn.Linear(64, 64, bias=False)
    plain, model, report = both(attention)
    assert lines(report) == ["fused: q, k, v: one product"]
    x = torch.cat([X, torch.zeros(1, 5, 64), -torch.zeros(1, 5, 64)])
    assert_same_bits(model(x), plain(x))
    with torch.no_grad():
        zeros = -torch.zeros(3, 64)
        assert_same_bits(model.k(zeros), plain.k(zeros))
    assert shared == [3]


def test_layers_of_different_widths(shared: Calls, gradients_off: None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(100, n) for n in (64, 208, 48, 80))
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.act(self.layers[0](x)), *(f(x) for f in self.layers[1:])], -1)

    plain, model, report = both(Net())
    x = floats(7, 100)
    assert_same_bits(model(x), plain(x))
    assert lines(report) == ["fused: layers.0, layers.1, layers.2, layers.3: one product"]
    assert shared == [4]


def test_groups_need_no_additional_memory() -> None:
    _, model, report = both(Attention())
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    assert sum(storages.values()) == report.bytes_after
    assert (
        model.q.packed.untyped_storage().data_ptr() == model.v.packed.untyped_storage().data_ptr()
    )


def test_the_parameters_stay_the_same_objects_and_trainable() -> None:
    plain, model, _ = both(Attention())
    bias = model.k.bias
    assert isinstance(bias, nn.Parameter)
    assert bias.is_leaf
    assert bias.requires_grad
    for net in (plain, model):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net(X).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert_same_bits(model(X), plain(X))


def test_values_changed_in_place_take_effect(shared: Calls) -> None:
    plain, model, _ = both(Attention())
    with torch.no_grad():
        model(X)
        for net in (plain, model):
            net.k.bias.add_(1)
            net.v.weight_scale.mul_(2)
        assert_same_bits(model(X), plain(X))
        for net in (plain, model):
            net.k.bias.data = net.k.bias.data + 1
        assert_same_bits(model(X), plain(X))
        for net in (plain, model):
            net.q.bias = nn.Parameter(torch.ones(64))
        assert_same_bits(model(X), plain(X))
    assert shared == [3, 3]


# ---------------------------------------------------------------- layers computed separately


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
        state = {"up.weight_scale": model.up.weight_scale * 2}
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
net.__class__ = type("Net", (torch.nn.Sequential,), {"forward": lambda s, x: s[0](x) + s[1](x)})
print(torchquant.quantize_(net).fusions[0].action)
with torch.no_grad():
    print(net[0].forward(torch.ones(64)).shape)
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


def test_cross_attention_dissolves_the_group(shared: Calls, gradients_off: None) -> None:
    plain, model, report = both(CrossAttention())
    assert lines(report) == ["fused: q, k, v: one product"]
    memory = floats(2, 7, 64, seed=1)
    for _ in range(8):
        assert_same_bits(model(X, memory), plain(X, memory))
    assert len(shared) == 3
    assert model.q._group is None


def test_occasional_cross_attention_keeps_the_group(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(CrossAttention())
    memory = floats(2, 7, 64, seed=1)
    for _ in range(5):
        assert_same_bits(model(X, memory), plain(X, memory))
        assert_same_bits(model(X), plain(X))
    assert len(shared) == 10


def test_no_output_is_kept(gradients_off: None) -> None:
    _, model, _ = both(CrossAttention())
    x = X.clone()
    model(x, floats(2, 7, 64))  # two outputs are not used
    kept = model.q._group._slot.kept
    outputs = [weakref.ref(output) for output in kept.outputs if output is not None]
    assert len(outputs) == 2
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None
    assert [output() for output in outputs] == [None, None]


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


# ---------------------------------------------------------------- copies and files


def test_a_deep_copy_has_its_own_groups(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Decoder())
    with torch.inference_mode(False):
        other = copy.deepcopy(model)
    assert_same_bits(other(X), plain(X))
    assert shared == [3, 2, 3, 2]
    mine, its = model.layers[0][1], other.layers[0][1]
    assert its.q._group is its.k._group is not mine.q._group
    assert its.q.packed.untyped_storage().data_ptr() != mine.q.packed.untyped_storage().data_ptr()


def test_a_copy_of_one_member_is_computed_alone(shared: Calls) -> None:
    plain, model, _ = both(Attention())
    for other in (copy.deepcopy(model.k), copy.copy(model.k), pickle.loads(pickle.dumps(model.k))):
        assert other._group is None
        other.packed.zero_()
        if other.bias is not model.k.bias:
            with torch.no_grad():
                other.bias.zero_()
    with torch.no_grad():
        assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_layers_of_a_pickled_model_are_computed_separately(
    shared: Calls, gradients_off: None
) -> None:
    plain, model, _ = both(Decoder())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert_same_bits(other(X), plain(X))
    assert shared == []


def test_state_dicts(shared: Calls) -> None:
    plain, model, _ = both(Attention())
    other_plain, other, _ = both(Attention())
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        assert_same_bits(other(X), plain(X))
        assert shared == [3]
        model.load_state_dict(other_plain.state_dict(), assign=True)
        assert_same_bits(model(X), other_plain(X))
        assert shared == [3]


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu"),
        lambda model: model.double(),
        lambda model: model.share_memory(),
        lambda model: model.apply(lambda module: None),
        lambda model: model.train().eval(),
    ],
)
def test_moves_keep_the_group(
    shared: Calls, gradients_off: None, move: Callable[[nn.Module], Any]
) -> None:
    plain, model, _ = both(Attention())
    move(model)
    assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_on_another_device_the_group_forms_again(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Attention())
    group, state = model.q._group, model.state_dict()
    model.to("meta")
    assert not group.active
    assert model.q._group is group
    model.to_empty(device="cpu")
    assert group.active
    model.load_state_dict(state)
    assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_a_moved_group_keeps_no_weights_on_the_old_device(gradients_off: None) -> None:
    _, model, _ = both(Attention())
    weights = weakref.ref(model.q._group.packed)
    model.to("meta")
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize("there", ["float", "grouped", "plain"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped_file", "plain_file"])
def test_files(shared: Calls, tmp_path: Any, grouped: bool, there: str) -> None:
    plain, model, _ = both(Decoder())
    save(model if grouped else plain, tmp_path / "file")
    other = Decoder()
    if there != "float":
        quantize_(other, fusion=Fusion(projections=there == "grouped"))
    load(tmp_path / "file", other)
    with torch.no_grad():
        assert_same_bits(other(X), plain(X))
    assert shared == ([3, 2, 3, 2] if grouped else [])
    save(other, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_member_that_is_replaced(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Attention())
    layer = nn.Linear(64, 64)
    for net in (plain, model):
        net.k = layer
    for _ in range(6):
        assert_same_bits(model(X), plain(X))
    assert len(shared) == 3
    for net in (plain, model):
        net.q = layer
    assert_same_bits(model(X), plain(X))


# ---------------------------------------------------------------- rejected groups, and reasons


def changed(body: Callable[[Any, Tensor], Tensor], **kw: Any) -> nn.Module:
    class Changed(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return body(self, x)

    return Changed(**kw)


def in_place(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    x.mul_(2)
    return q + net.k(x) + net.v(x)


def augmented(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    x += 1
    return q + net.k(x) + net.v(x)


def through_data(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    x.data.add_(1)
    return q + net.k(x) + net.v(x)


def through_a_view(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    y = x[..., :8]
    q = net.q(x)
    y.zero_()
    return q + net.k(x) + net.v(x)


def items(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    x[..., 0] = 5
    return q + net.k(x) + net.v(x)


def relu_in_place(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    F.relu(x, inplace=True)
    return q + net.k(x) + net.v(x)


def out(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    torch.add(x, 1, out=x)
    return q + net.k(x) + net.v(x)


def autocast_between(net: Any, x: Tensor) -> Tensor:
    q = net.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        k, v = net.k(x), net.v(x)
    return q + k + v


def gradients_between(net: Any, x: Tensor) -> Tensor:
    q = net.q(x)
    with torch.inference_mode():
        k, v = net.k(x), net.v(x)
    return q + k + v


def data_dependent(net: Any, x: Tensor) -> Tensor:
    q = net.q(x)
    if x.sum() > 1e9:
        x.zero_()
    return q + net.k(x) + net.v(x)


MUST_NOT = {
    "in_place": (in_place, "not fused: q, k, v: mul_ between them could change the tensor"),
    "augmented": (augmented, None),
    "through_data": (through_data, "not fused: q, k, v: add_ between them could change the tensor"),
    "through_a_view": (
        through_a_view,
        "not fused: q, k, v: zero_ between them could change the tensor",
    ),
    "items": (items, "TypeError"),
    "relu_in_place": (relu_in_place, "not fused: q, k, v: relu between them could change"),
    "out": (out, "not fused: q, k, v: add between them could change the tensor"),
    "autocast": (autocast_between, "not fused: q, k, v: torch's modes change between them"),
    "gradients": (gradients_between, "not fused: q, k, v: torch's modes change between them"),
    "data_dependent": (data_dependent, "could not be traced (TraceError: "),
}


@pytest.mark.parametrize("case", MUST_NOT)
def test_code_between_the_calls_that_changes_the_tensor(
    shared: Calls, gradients_off: None, case: str
) -> None:
    body, text = MUST_NOT[case]
    plain, model, report = both(changed(body))
    if text is not None:
        assert any(text in line for line in lines(report)), lines(report)
    assert model.q._group is None
    assert_same_bits(model(X), plain(X))
    assert_same_bits(model(X), plain(X))
    assert all(count == 2 for count in shared)


def test_a_change_of_the_outputs_is_permitted(shared: Calls, gradients_off: None) -> None:
    def scaled(net: Any, x: Tensor) -> Tensor:
        q = net.q(x)
        q *= 0.5
        q[..., 0].zero_()
        k = net.k(x).relu_()
        return q + k + net.v(x)  # type: ignore[no-any-return]

    plain, model, report = both(changed(scaled))
    assert lines(report) == ["fused: q, k, v: one product"]
    assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_norms_between_as_in_qwen(shared: Calls, gradients_off: None) -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.square().mean(-1, keepdim=True).sqrt()

    class Normed(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.norm(self.q(x)) + self.norm(self.k(x)) + self.v(x)  # type: ignore[no-any-return]

    plain, model, report = both(Normed())
    assert lines(report) == ["fused: q, k, v: one product"]
    assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_an_unknown_module_on_the_tensor_between_the_calls(
    shared: Calls, gradients_off: None
) -> None:
    class Evil(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    class Net(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.evil = Evil()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.q(x) + self.evil(x) + self.k(x)  # type: ignore[no-any-return]

    plain, model, report = both(Net())
    assert lines(report) == ["not fused: q, k: Evil (evil) between them could change the tensor"]
    assert_same_bits(model(X.clone()), plain(X.clone()))
    assert shared == []


def test_another_order_on_another_path() -> None:
    class Net(Attention):
        def forward(self, x: Tensor, swap: bool = False) -> Tensor:  # type: ignore[override]
            if swap:
                return self.k(x) + self.q(x)  # type: ignore[no-any-return]
            return self.q(x) + self.k(x)  # type: ignore[no-any-return]

    _, _, report = both(Net())
    assert lines(report)[0] == (
        "not fused: k, q: they are not called exactly once, in the same order, on every path"
    )


def test_layers_that_do_not_fit_together() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 72)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.a(x), self.b(x)), -1)

    assert lines(both(Net())[2]) == ["not fused: a, b: out_features must be a multiple of 16"]


def test_hooks_and_second_places() -> None:
    attention = Attention()
    attention.k.register_forward_hook(lambda *args: None)
    assert lines(both(attention)[2]) == [
        "not fused: q, k, v: hooks on a layer could change the tensor"
    ]
    attention = Attention()
    attention.again = attention.k
    assert lines(both(attention)[2]) == [
        "not fused: q, k, v: a layer is registered in more than one place"
    ]


def test_switched_off_and_the_default() -> None:
    model = Attention()
    assert quantize_(model, fusion=Fusion(projections=False)).fusions == ()
    assert isinstance(model.q, QuantizedLinear)
    assert model.q._group is None
    assert Fusion().projections
