"""FLOPs of the operators in torch.utils.flop_counter, against those of the float layers."""

from collections.abc import Callable

import pytest
import torch
from cases import NAMESPACE, cases
from support import Shape, floats, integers, positive
from support.scripts import run_python
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from torchquant import PackedWeight, functional, ops, quantize_, quantized_linear
from torchquant.ops import _flops

M, N, K = 6, 20, 70
PACKED, SCALE = ops.pack_weight(integers(N, K)), positive(N)
ONE = torch.tensor([0.1])


def count(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def float_layer(outputs: int = N, *shape: int) -> int:
    layer = nn.Linear(K, outputs)
    return count(lambda: layer(torch.zeros(*(shape or (M,)), K)))


@pytest.mark.parametrize("shape", [(M,), (2, 3), ()], ids=str)
def test_linear_operators_count_as_the_float_layer(shape: tuple[int, ...]) -> None:
    x, q = floats(*shape, K), integers(*shape, K)
    expected = float_layer(N, *(shape or (1,)))
    assert expected > 0
    calls: dict[str, Callable[[], object]] = {
        "int8_mm": lambda: ops.int8_mm(q, PACKED, N),
        "dynamic": lambda: ops.linear_dynamic(x, PACKED, SCALE, out_features=N),
        "static": lambda: ops.linear_static(x, ONE, None, PACKED, SCALE, out_features=N),
        "of integers": lambda: ops.linear_static(q, ONE, None, PACKED, SCALE, out_features=N),
        "past torch.ops": lambda: quantized_linear(
            q, PackedWeight(PACKED, N, K), input_scale=0.1, weight_scale=SCALE
        ),
        "qat": lambda: ops.qat_linear(x, floats(N, K)),
    }
    for name, call in calls.items():
        assert count(call) == expected, name


@pytest.mark.parametrize("spatial", [1, 2])
def test_convolutions_count_as_the_float_layer(spatial: int) -> None:
    kernel, stride, padding, dilation = ((3, 2)[:spatial] for _ in range(4))
    layer = (nn.Conv1d, nn.Conv2d)[spatial - 1](4, 6, kernel, stride, padding, dilation, groups=2)
    x, weight = floats(5, 4, *(19, 17)[:spatial]), integers(6, 2, *kernel)
    packed, options = ops.pack_conv_weight(weight, 2), {"weight_shape": list(weight.shape)}
    options |= {"stride": list(stride), "dilation": list(dilation), "groups": 2}
    options["padding"] = [n for n in padding for _ in range(2)]
    expected = count(lambda: layer(x))
    assert expected > 0
    calls: dict[str, Callable[[], object]] = {
        "dynamic": lambda: ops.conv_dynamic(x, packed, positive(6), **options),
        "static": lambda: ops.conv_static(x, ONE, None, packed, positive(6), **options),
    }
    for name, call in calls.items():
        assert count(call) == expected, name


def test_split_counts_as_its_layers() -> None:
    both = torch.cat([PACKED, ops.pack_weight(integers(7, K))])
    options = {"out_features": [N, 7]}
    got = count(lambda: ops.linear_dynamic_split(floats(M, K), both, positive(N + 7), **options))
    assert got == float_layer(N) + float_layer(7)


def test_gradients_count_as_the_float_layers() -> None:
    weight = floats(N, K)

    def backward(call: Callable[[Tensor, Tensor], Tensor], frozen: bool) -> int:
        leaves = floats(M, K).requires_grad_(), weight.clone().requires_grad_(not frozen)
        return count(lambda: call(*leaves).sum().backward())

    def dynamic(x: Tensor, w: Tensor) -> Tensor:
        return ops.linear_dynamic(x, PACKED, SCALE, out_features=N)

    for frozen, ours in ((True, dynamic), (False, ops.qat_linear)):
        assert backward(ours, frozen) == backward(nn.functional.linear, frozen)
    assert backward(dynamic, True) == 2 * float_layer()
    assert backward(ops.qat_linear, False) == 3 * float_layer()


def test_product_with_a_fake_quantized_weight() -> None:
    grad, weight = floats(M, N), floats(N, K)
    got = count(lambda: ops.mm_fake_quantized(grad, weight, SCALE))
    assert got == count(lambda: functional.mm_fake_quantized(grad, weight, SCALE)) > 0


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_counts_as_torchs(groups: int) -> None:
    query, key, value = floats(2, 4, 5, 8), floats(2, groups, 7, 8), floats(2, groups, 7, 8)
    wide = [tensor.repeat_interleave(4 // groups, 1) for tensor in (key, value)]
    with sdpa_kernel(SDPBackend.MATH):  # torch counts its fused kernel on CPUs as nothing
        expected = count(lambda: scaled_dot_product_attention(query, *wide))
    assert count(lambda: ops.attention(query, key, value)) == expected > 0


@pytest.mark.parametrize("operator", sorted(_flops.FORMULAS))
def test_the_formulas_fit_every_case(operator: str) -> None:
    """Whichever arguments are given by position or by name, and on the meta device."""
    assert getattr(NAMESPACE, operator) in flop_registry
    for case in cases(operator, Shape(M, N, K)):
        values = case.arguments(gradients=False)
        on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in values.items()}
        call = getattr(NAMESPACE, operator).default
        assert count(lambda c=call, v=values: c(**v)) == count(lambda c=call, v=on_meta: c(**v))


def test_a_quantized_model_counts_as_the_float_one() -> None:
    model = nn.Sequential(nn.Linear(K, 128), nn.ReLU(), nn.Linear(128, N)).eval()
    x = floats(M, K)
    expected = count(lambda: model(x))
    quantize_(model, filter_fn=lambda module, name: True)
    with torch.no_grad():
        assert count(lambda: model(x)) == expected


SCRIPT = """
import importlib.util
import sys
{first}
importlib.util.find_spec("torch.utils.flop_counter")  # looking for it is not importing it
{second}
counter = sys.modules["torch.utils.flop_counter"]
import torch
assert torch.ops.torchquant.linear_dynamic in counter.flop_registry
assert not any(type(finder).__name__ == "_WhenImported" for finder in sys.meta_path)
assert counter.__spec__.loader is counter.__loader__
assert type(counter.__loader__).__name__ == "SourceFileLoader"
"""
IMPORTS = "import torch.utils.flop_counter", "import torchquant"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["counter_first", "torchquant_first"])
def test_either_may_be_imported_first(order: tuple[int, int]) -> None:
    done = run_python(SCRIPT.format(first=IMPORTS[order[0]], second=IMPORTS[order[1]]))
    assert done.returncode == 0, done.stderr


def test_the_import_of_torchquant_does_not_import_the_counter() -> None:
    script = "import sys, torchquant; assert 'torch.utils.flop_counter' not in sys.modules"
    done = run_python(script)
    assert done.returncode == 0, done.stderr
