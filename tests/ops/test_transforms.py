"""The operators under torch.func: grad, vjp, vmap and functionalize work, or refuse in one line."""

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats, integers, positive
from torch import Tensor
from torch.func import functionalize, grad, hessian, jacrev, jvp, vjp, vmap

from torchquant import ops

OPS = torch.ops.torchquant
B, M, N, K = 3, 5, 17, 40  # entries of a batch, rows, outputs, inputs
X, WEIGHT, BIAS = floats(M, K), integers(N, K), floats(N, seed=2)
PACKED, SCALE, STEP = ops.pack_weight(WEIGHT), positive(N), torch.tensor([0.05])
FLOAT_WEIGHT = floats(N, K, seed=3)
ZERO = torch.tensor([3], dtype=torch.int32)
QUERY = floats(2, 4, 6, 8, seed=4)
NO_SCALES = (None, None, None)
CONV_WEIGHT, CONV_SHAPE = integers(N, 2, 3), [N, 2, 3]
CONV, SAMPLES = ops.pack_conv_weight(CONV_WEIGHT, 1), floats(B, 2, M, seed=5)
SIZES = (CONV_SHAPE, [2], [1, 0], [1], 1)  # weight_shape, stride, padding, dilation, groups
FEW_BITS, GROUP_SCALE = WEIGHT >> 4, positive(N, 2, seed=7)  # 4 bits, groups of 32 inputs
INTX, INTX_SIZES = ops.pack_intx_weight(FEW_BITS, GROUP_SCALE, bits=4, group_size=32), (N, 4, 32)

Call = Callable[..., Any]

# Operators with gradients, as functions of the tensors that may have one.
DIFFERENTIABLE: dict[str, tuple[Call, tuple[Tensor, ...]]] = {
    "linear_dynamic": (
        lambda x, b: OPS.linear_dynamic(x, PACKED, SCALE, None, b, N, True, "gelu"),
        (X, BIAS),
    ),
    "linear_dynamic_split": (
        lambda x, b: torch.cat(
            OPS.linear_dynamic_split(
                x, torch.cat([PACKED, PACKED]), SCALE.repeat(2), None, b.repeat(2), [N, N], True, []
            ),
            -1,
        ),
        (X, BIAS),
    ),
    "linear_static": (
        lambda x, b: OPS.linear_static(x, STEP, ZERO, PACKED, SCALE, None, b, N, "silu"),
        (X, BIAS),
    ),
    "linear_dynamic_intx": (
        lambda x, b: OPS.linear_dynamic_intx(x, INTX, b, *INTX_SIZES, False, True, "gelu"),
        (X, BIAS),
    ),
    "linear_static_intx": (
        lambda x, b: OPS.linear_static_intx(x, STEP, ZERO, INTX, b, *INTX_SIZES, False, "silu"),
        (X, BIAS),
    ),
    "linear_intx": (
        lambda x, b: OPS.linear_intx(x, INTX, b, *INTX_SIZES, False, "gelu"),
        (X, BIAS),
    ),
    "conv_dynamic": (
        lambda x, b: OPS.conv_dynamic(x, CONV, SCALE, b, *SIZES, True, "gelu"),
        (SAMPLES, BIAS),
    ),
    "conv_static": (
        lambda x, b, r: OPS.conv_static(x, STEP, ZERO, CONV, SCALE, b, *SIZES, "silu", r),
        (SAMPLES, BIAS, floats(B, N, 2, seed=6)),
    ),
    "activation": (lambda x: OPS.activation(x, "gelu_tanh"), (X,)),
    "gated_activation": (lambda x, y: OPS.gated_activation(x, y, "silu"), (X, X.flip(0))),
    "rms_norm": (lambda x, w: OPS.rms_norm(x, w, 1e-6), (X, positive(K))),
    "layer_norm": (
        lambda x, w, b, r: OPS.layer_norm(x, w, b, 1e-5, r),
        (X, positive(K), floats(K), X.flip(0)),
    ),
    "attention": (
        lambda q, k, v: OPS.attention(q, k, v),
        (QUERY, QUERY[:, :2].flip(0), QUERY[:, 2:]),
    ),
    "fake_quantize": (lambda x: OPS.fake_quantize(x, STEP, ZERO, -8, 7), (X,)),
    "mask_gradient": (lambda x: OPS.mask_gradient(x, ops.positive(X)), (X,)),
}
# Their gradients cannot be differentiated, which torch.func.grad and vjp always allow for.
FIRST_ORDER: dict[str, tuple[Call, tuple[Tensor, ...]]] = {
    "fake_quantize_learned": (
        lambda x, s: OPS.fake_quantize_learned(x, s, None, -8, 7, 0.5),
        (X, STEP),
    ),
    "qat_linear": (
        lambda x, w: OPS.qat_linear(
            x, w, None, *NO_SCALES, -128, 127, False, None, -127, 127, True, "relu"
        ),
        (X, FLOAT_WEIGHT),
    ),
    "qat_linear_intx": (
        lambda x, w: OPS.qat_linear_intx(x, w, None, None, 32, -8, 7, activation="relu"),
        (X, FLOAT_WEIGHT),
    ),
}
# The rest, as functions of their first tensor.
CONSTANT: dict[str, tuple[Call, Tensor]] = {
    "quantize": (lambda x: OPS.quantize(x, STEP, ZERO, -128, 127), X),
    "dequantize": (lambda q: OPS.dequantize(q, STEP, ZERO), integers(M, K)),
    "quantize_per_token": (lambda x: OPS.quantize_per_token(x, False), X),
    "pack_weight": (OPS.pack_weight, WEIGHT),
    "unpack_weight": (lambda p: OPS.unpack_weight(p, N, K), PACKED),
    "pack_intx_weight": (
        lambda w: OPS.pack_intx_weight(w, GROUP_SCALE, FEW_BITS[:, :2], 4, 32),
        FEW_BITS,
    ),
    "unpack_intx_weight": (lambda p: OPS.unpack_intx_weight(p, N, K, 4, 32), INTX),
    "pack_conv_weight": (lambda w: OPS.pack_conv_weight(w, 1), CONV_WEIGHT),
    "unpack_conv_weight": (lambda p: OPS.unpack_conv_weight(p, CONV_SHAPE, 1), CONV),
    "int8_mm": (lambda q: OPS.int8_mm(q, PACKED, N), integers(M, K)),
    "fake_quantize_mask": (lambda x: OPS.fake_quantize_mask(x, STEP, None, -8, 7), X),
    "in_range": (lambda x: OPS.in_range(x, STEP, None, -8, 7), X),
    "positive": (OPS.positive, X),
    "minmax": (OPS.minmax, X),
    "quantize_rows": (lambda x: OPS.quantize_rows(x, None, None, -8, 7, True), X),
    "quantize_pack": (lambda w: OPS.quantize_pack(w, None, -8, 7, True), FLOAT_WEIGHT),
    "quantize_pack_intx": (
        lambda w: OPS.quantize_pack_intx(w, None, 4, 32, -8, 7, True),
        FLOAT_WEIGHT,
    ),
}
REFUSED: dict[str, tuple[Call, Tensor]] = {
    "mm_fake_quantized": (
        lambda g: OPS.mm_fake_quantized(g, FLOAT_WEIGHT, SCALE, None, -8, 7),
        floats(M, N),
    ),
    "fake_quantize_learned_backward": (
        lambda g: OPS.fake_quantize_learned_backward(g, X, STEP, None, -8, 7),
        X.flip(0),
    ),
}
OPERATORS = sorted(
    name.removeprefix("torchquant::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torchquant::")
)


def flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def everything() -> Iterator[tuple[str, Call, tuple[Tensor, ...]]]:
    for name, (call, arguments) in {**DIFFERENTIABLE, **FIRST_ORDER}.items():
        yield name, call, arguments
    for name, (call, argument) in {**CONSTANT, **REFUSED}.items():
        yield name, call, (argument,)


def batch_of(t: Tensor) -> Tensor:
    """Entries that differ."""
    return torch.stack([t.roll(i, 0) for i in range(B)])


def by_hand(call: Call, *batches: Tensor) -> tuple[Tensor, ...]:
    results = [flat(call(*entries)) for entries in zip(*batches, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def check(got: Any, expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(flat(got), expected, strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_every_operator_has_a_case() -> None:
    assert sorted(name for name, *_ in everything()) == OPERATORS


# ---------------------------------------------------------------- gradients


def gradients(call: Call, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [a.clone().requires_grad_() for a in arguments]
    return torch.autograd.grad((call(*leaves) ** 2).sum(), leaves)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_grad_and_vjp_give_backwards_gradients(name: str) -> None:
    call, arguments = DIFFERENTIABLE[name]
    expected = gradients(call, arguments)
    every = tuple(range(len(arguments)))
    check(grad(lambda *a: (call(*a) ** 2).sum(), argnums=every)(*arguments), expected)
    output, pull = vjp(call, *arguments)
    check(output, flat(call(*arguments)))
    check(pull(2 * output), expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_for_each_entry_of_a_batch(name: str) -> None:
    call, (first, *rest) = DIFFERENTIABLE[name]
    entries = batch_of(first)

    def loss(x: Tensor) -> Tensor:
        return (call(x, *rest) ** 2).sum()

    got = vmap(grad(loss))(entries)
    for entry, gradient in zip(entries, got, strict=True):
        torch.testing.assert_close(gradient, gradients(call, (entry, *rest))[0])


def test_jacobians() -> None:
    x = X[0]
    got = jacrev(lambda x: OPS.fake_quantize(x, STEP, None, -8, 7))(x)
    inside = torch.round(x / STEP).clamp(-8, 7) == torch.round(x / STEP)
    assert torch.equal(got, torch.diag(inside.float()))


def test_second_derivatives() -> None:
    def second(f: Call, x: float) -> Tensor:
        return grad(grad(f))(torch.tensor(x))

    assert torch.isclose(second(lambda x: OPS.activation(x, "tanh"), 0.3), second(torch.tanh, 0.3))
    assert second(lambda x: OPS.fake_quantize(x, STEP, None, -128, 127) * x, 0.3) == 2.0


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_gradients_that_cannot_be_differentiated_are_refused(name: str) -> None:
    call, arguments = FIRST_ORDER[name]
    message = (
        f"{name}: no gradient under torch.func.grad and vjp, which may differentiate it once more; "
        "call backward() or torch.autograd.grad on the result instead"
    )
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        grad(lambda x: call(x, *arguments[1:]).sum())(arguments[0])
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        vjp(call, *arguments)
    gradients(call, arguments)  # and after the refusal everything works as before


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *FIRST_ORDER])
def test_forward_mode_is_refused(name: str) -> None:
    call, arguments = {**DIFFERENTIABLE, **FIRST_ORDER}[name]
    message = (
        f"{name}: jvp is not implemented (torch.func.jvp, jacfwd, hessian, "
        "torch.autograd.forward_ad); use reverse mode: backward(), torch.func.grad, vjp or jacrev"
    )
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        jvp(call, arguments, arguments)
    gradients(call, arguments)


def test_hessian_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="activation: jvp is not implemented"):
        hessian(lambda x: OPS.activation(x, "gelu").sum())(X[0])


# ---------------------------------------------------------------- operators without gradients


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_results_require_no_gradient(name: str) -> None:
    call, argument = CONSTANT[name]
    if argument.is_floating_point():
        argument = argument.clone().requires_grad_()
    assert not any(result.requires_grad for result in flat(call(argument)))
    if argument.is_floating_point():
        zero = grad(lambda x: flat(call(x))[0].float().sum() + 0 * x.sum())(argument.detach())
        assert not zero.any()


def test_a_parameters_scale_is_constant() -> None:
    weight = torch.nn.Parameter(FLOAT_WEIGHT)
    assert not any(t.requires_grad for t in ops.quantize_pack(weight))
    assert not any(t.requires_grad for t in ops.quantize_rows(weight))


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_refuse_gradients(name: str) -> None:
    call, argument = REFUSED[name]
    expected = flat(call(argument))
    message = f"{name}: no gradients, but grad requires one; pass grad.detach(), or call it under "
    with pytest.raises(NotImplementedError, match=re.escape(message + "torch.no_grad()")):
        call(argument.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        grad(lambda g: flat(call(g))[0].sum())(argument)
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        jvp(call, (argument,), (argument,))
    with torch.no_grad():
        check(call(argument.clone().requires_grad_()), expected)
    check(call(argument.clone().requires_grad_().detach()), expected)


def test_mm_fake_quantized_names_the_argument() -> None:
    weight = FLOAT_WEIGHT.clone().requires_grad_()
    with pytest.raises(
        NotImplementedError, match=r"no gradients, but weight requires one; pass weight.detach\(\)"
    ):
        ops.mm_fake_quantized(floats(M, N), weight, SCALE)


@pytest.mark.parametrize("name", OPERATORS)
def test_atens_composition_has_no_gradients(name: str) -> None:
    registered = torch._C._dispatch_dump(f"torchquant_aten::{name}").splitlines()
    (line,) = [line for line in registered if line.startswith("Autograd[alias]")]
    assert "fallthrough" in line


# ---------------------------------------------------------------- vmap


@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_gives_the_bits_of_a_loop(name: str) -> None:
    call, arguments = next((call, a) for found, call, a in everything() if found == name)
    batches = [batch_of(a) for a in arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(vmap(call)(*batches), by_hand(call, *batches))
        for i in range(len(arguments)):  # only one of them has a batch, and not in front
            dims = tuple(-1 if j == i else None for j in range(len(arguments)))
            values = [
                batches[j].movedim(0, -1) if j == i else arguments[j] for j in range(len(arguments))
            ]
            entries = [
                batches[j] if j == i else arguments[j].expand(B, *arguments[j].shape)
                for j in range(len(arguments))
            ]
            check(vmap(call, in_dims=dims)(*values), by_hand(call, *entries))


def test_vmap_in_vmap() -> None:
    x = floats(2, B, M, K)
    for name in (
        *("linear_dynamic", "linear_static_intx", "activation", "quantize_per_token", "positive"),
    ):
        call, arguments = next((call, a) for found, call, a in everything() if found == name)
        got = vmap(vmap(lambda x, c=call, a=arguments: c(x, *a[1:])))(x)
        rows = [by_hand(lambda x, c=call, a=arguments: c(x, *a[1:]), entry) for entry in x]
        check(got, tuple(torch.stack(parts) for parts in zip(*rows, strict=True)))


def test_vmap_with_granularities() -> None:
    x, rows, columns = batch_of(X), positive(M), positive(K)
    groups = positive(M, 2)
    for call in (
        lambda x: OPS.quantize(x, rows, None, -8, 7, 0),
        lambda x: OPS.fake_quantize(x, columns, None, -8, 7, -1),
        lambda x: OPS.quantize(x, groups, None, -8, 7, None, 32),
        lambda x: OPS.fake_quantize(x, groups, None, -8, 7, None, 32),
        lambda x: OPS.minmax(x, 1),
    ):
        check(vmap(call)(x), by_hand(call, x))


def test_vmap_of_a_list_of_results() -> None:
    def call(x: Tensor) -> list[Tensor]:
        both = torch.cat([PACKED, PACKED])
        return OPS.linear_dynamic_split(x, both, SCALE.repeat(2), None, None, [N, N], True, [])

    x = batch_of(X)
    check(vmap(call)(x), by_hand(call, x))
    scales = batch_of(SCALE)

    def scaled(s: Tensor) -> list[Tensor]:  # not rows: one call for each entry
        return OPS.linear_dynamic_split(X, PACKED, s, None, None, [N], True, [])

    check(vmap(scaled)(scales), by_hand(scaled, scales))


def test_rows_are_one_call() -> None:
    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls += func.namespace == "torchquant"
            return func(*args, **(kwargs or {}))

    for name, calls in (
        *(("linear_dynamic", 1), ("linear_dynamic_intx", 1), ("linear_static_intx", 1)),
        *(("linear_intx", 1), ("rms_norm", 1), ("minmax", B)),
    ):
        call, arguments = next((call, a) for found, call, a in everything() if found == name)
        with Counted() as counted:
            vmap(lambda x, c=call, a=arguments: c(x, *a[1:]))(batch_of(arguments[0]))
        assert counted.calls == calls, name


def test_vmap_refuses_what_an_entry_would_refuse() -> None:
    with pytest.raises(ValueError, match="input must have at least 1 dimension"):
        vmap(lambda x: OPS.linear_dynamic(x, PACKED, SCALE, None, None, N))(torch.ones(K))
    with pytest.raises(ValueError, match=r"minmax: .* needs at least one entry, got a batch of 0"):
        vmap(OPS.minmax)(torch.empty(0, 3))


def test_backward_through_vmap() -> None:
    for name in ("linear_dynamic", "qat_linear", "qat_linear_intx", "fake_quantize_learned"):
        call, arguments = {**DIFFERENTIABLE, **FIRST_ORDER}[name]
        x = batch_of(X).requires_grad_()
        vmap(lambda x, c=call, a=arguments: c(x, *a[1:]))(x).sum().backward()
        y = x.detach().clone().requires_grad_()
        torch.stack([call(entry, *arguments[1:]) for entry in y]).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


# ---------------------------------------------------------------- functionalize


@pytest.mark.parametrize("name", OPERATORS)
def test_functionalize_changes_nothing(name: str) -> None:
    call, arguments = next((call, a) for found, call, a in everything() if found == name)
    check(functionalize(call)(*arguments), flat(call(*arguments)))
