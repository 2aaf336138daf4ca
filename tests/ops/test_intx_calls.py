"""The operators on weights of 2 to 8 bits as torch and Python call them."""

import io

import numpy
import pytest
import torch
from support import FLOATS, Shape, assert_same_bits, floats
from support.intx_layers import Layer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from torchquant import ops
from torchquant._extension import load

N, K = 20, 70
LAYER = Layer(Shape(6, N, K), 4, 32, True, bias=True)
PACKED, X = LAYER.packed, LAYER.input()
ONE, SEVEN = torch.tensor([0.02]), torch.tensor([-7], dtype=torch.int32)
CALLS = {
    "dynamic": lambda x, **options: ops.linear_dynamic_intx(x, **PACKED, **options),
    "static": lambda x, **options: ops.linear_static_intx(x, ONE, SEVEN, **PACKED, **options),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


class Network(nn.Module):
    """Both operators, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        second = Layer(Shape(6, K, N), 3, 20)
        self.register_buffer("first", PACKED["packed"])
        self.register_buffer("second", second.packed["packed"])
        self.sizes = {**second.packed, "packed": None}

    def forward(self, x: Tensor) -> Tensor:
        x = ops.linear_dynamic_intx(x, **{**PACKED, "packed": self.first}, activation="gelu")
        rest = {name: value for name, value in self.sizes.items() if name != "packed"}
        return ops.linear_static_intx(x, ONE, SEVEN, self.second, **rest)


def test_a_dynamic_batch_is_compiled_once():
    torch._dynamo.reset()
    network = Network()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    torch._dynamo.mark_dynamic(x := floats(5, K), 0)
    assert_same_bits(compiled(x), network(x))
    for rows in (2, 3, 17, 100):
        assert_same_bits(compiled(floats(rows, K)), network(floats(rows, K)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_has_the_bits_of_eager(strict):
    network, batch = Network(), torch.export.Dim("batch")
    program = torch.export.export(
        network, (floats(5, K),), dynamic_shapes=({0: batch},), strict=strict
    )
    targets = [node.target for node in program.graph.nodes]
    namespace = torch.ops.torchquant
    for operator in (namespace.linear_dynamic_intx, namespace.linear_static_intx):
        assert targets.count(operator.default) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for rows in (5, 1, 2, 40):
        x = floats(rows, K, seed=rows)
        assert_same_bits(program.module()(x), network(x))
        assert_same_bits(loaded.module()(x), network(x))


def test_meta_tensors_give_shapes():
    meta = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in PACKED.items()}
    x = torch.empty(2, 3, K, device="meta").half()
    for y in (
        ops.linear_dynamic_intx(x, **meta),
        ops.linear_static_intx(
            x, ONE.to("meta"), SEVEN.to("meta"), **meta, output_dtype=torch.half
        ),
    ):
        assert y.is_meta and y.shape == (2, 3, N) and y.dtype == torch.half
    weight, scale, zero = ops.unpack_intx_weight(
        meta["packed"], N, K, bits=4, group_size=32, has_zero_point=True
    )
    assert (weight.shape, scale.shape, zero.shape) == ((N, K), (N, 3), (N, 3))
    again = ops.pack_intx_weight(weight, scale, zero, bits=4, group_size=32)
    assert again.is_meta and again.shape == PACKED["packed"].shape


def test_output_dtype_is_inputs_or_the_one_asked_for():
    for dtype in FLOATS:
        assert CALLS["dynamic"](X.to(dtype)).dtype == dtype
        assert CALLS["static"](X.to(dtype)).dtype == torch.float32
        for output in FLOATS:
            for call in CALLS.values():
                assert call(X.to(dtype), output_dtype=output).dtype == output


@EVERY_CALL
def test_results_do_not_alias_the_arguments(call):
    before = PACKED["packed"].clone()
    for t in ops.unpack_intx_weight(
        PACKED["packed"], N, K, bits=4, group_size=32, has_zero_point=True
    ):
        t.fill_(0)
    call(X).fill_(0)
    assert torch.equal(PACKED["packed"], before)


@EVERY_CALL
def test_views_with_the_negative_bit(call):
    x = torch._neg_view(X)
    assert x.is_neg()
    assert_same_bits(call(x), call(-X))


@EVERY_CALL
def test_other_kinds_of_tensors_raise(call):
    for x in (X.to_sparse(), X.to_mkldnn()):
        with pytest.raises(NotImplementedError, match=r"torchquant::linear_\w+_intx"):
            call(x)


def test_a_scale_of_nan_stays_visible():
    nan = torch.tensor([float("nan")])
    assert ops.linear_static_intx(X, nan, None, **PACKED).isnan().all()


@EVERY_CALL
def test_flops_are_those_of_the_float_layer(call):
    with FlopCounterMode(display=False) as counter:
        call(X)
    assert counter.get_total_flops() == 2 * 6 * N * K


def test_entries_past_torch_ops():
    sizes = (PACKED["bias"], numpy.int64(N), 4, 32, True)
    dynamic = load().linear_dynamic_intx(X, PACKED["packed"], *sizes, True, "silu", 8)
    assert torch.equal(dynamic, CALLS["dynamic"](X, activation="silu"))
    rest = ("silu", torch.float16, -100, 90)
    static = load().linear_static_intx(X, ONE, SEVEN, PACKED["packed"], *sizes, *rest)
    limits = {"input_qmin": -100, "input_qmax": 90, "output_dtype": torch.float16}
    assert torch.equal(static, CALLS["static"](X, activation="silu", **limits))
    slow = torch.ops.torchquant.linear_static_intx.default
    assert torch.equal(static, slow(X, ONE, SEVEN, PACKED["packed"], *sizes, *rest))
    with pytest.raises(TypeError, match="static_intx: argument 9 must be a bool, got int"):
        load().linear_static_intx(X, ONE, SEVEN, PACKED["packed"], None, N, 4, 32, 1, *rest)
    with pytest.raises(TypeError, match="static_intx: expected 13 positional arguments, got 4"):
        load().linear_static_intx(X, ONE, SEVEN, PACKED["packed"])


def test_inside_autocast_the_entry_has_autocasts_type():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sizes = (PACKED["bias"], N, 4, 32, True)
        y = load().linear_dynamic_intx(X, PACKED["packed"], *sizes, True, "none", 8)
    assert_same_bits(y, CALLS["dynamic"](X, output_dtype=torch.bfloat16))
