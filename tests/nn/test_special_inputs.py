"""Nested tensors, and the proxies of torch.fx: what tools do with a float model works here too."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import torchquant
from torchquant import Fusion, Int8StaticActivationInt8WeightConfig
from torchquant.nn import Activation


def plain() -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()


def dynamic() -> nn.Module:
    model = plain()
    torchquant.quantize_(model, fusion=Fusion(activations=False))
    return model


def prepared() -> nn.Module:
    model = plain()
    torchquant.prepare_qat_(model, Int8StaticActivationInt8WeightConfig())
    model.train()(torch.randn(32, 64))
    return model.eval()


def static() -> nn.Module:
    model = prepared()
    torchquant.convert_(model)
    return model


MODELS = {"dynamic": dynamic, "static": static, "prepared": prepared}
make_all = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
Make = Callable[[], nn.Module]


@make_all
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(make: Make, layout: torch.layout) -> None:
    model = make()
    parts = [torch.randn(rows, 64) for rows in (3, 1, 5)]
    input = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    output = model(input)
    assert output.is_nested and output.layout is layout
    for got, part in zip(output.unbind(), parts, strict=True):
        assert torch.equal(got, model(part))
    (output + input).unbind()[0].sum()  # the structure is the same object
    torch.nested.to_padded_tensor(output, 0.0).sum().backward()
    for got, part in zip(input.grad.unbind(), parts, strict=True):
        alone = part.clone().requires_grad_()
        model(alone).sum().backward()
        torch.testing.assert_close(got, alone.grad)


@make_all
def test_jagged_tensors_with_gaps_and_more_dimensions(make: Make) -> None:
    """nn.Linear refuses tensors whose rows do not follow each other in memory."""
    model = make()
    lengths = torch.tensor([3, 2, 5])
    gaps = torch.nested.narrow(
        torch.randn(3, 7, 64), 1, torch.tensor([0, 1, 2]), lengths, layout=torch.jagged
    )
    for got, part in zip(model(gaps).unbind(), gaps.unbind(), strict=True):
        assert torch.equal(got, model(part))
    deep = torch.nested.nested_tensor(
        [torch.randn(2, rows, 64) for rows in (3, 5)], layout=torch.jagged
    )
    for input in (deep, deep.transpose(1, 2)):
        output = model(input)
        assert output.shape == input.shape
        for got, part in zip(output.unbind(), input.unbind(), strict=True):
            assert torch.equal(got, model(part.contiguous()))


def test_a_nested_tensor_of_another_size_is_refused() -> None:
    layer = dynamic()[0]
    for layout in (torch.jagged, torch.strided):
        input = torch.nested.nested_tensor([torch.randn(3, 32)], layout=layout)
        with pytest.raises(ValueError, match=r"input must be \[\.\.\., in_features\]"):
            layer(input)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_activations_take_nested_tensors(layout: torch.layout) -> None:
    input = torch.nested.nested_tensor([torch.randn(3, 64), torch.randn(2, 64)], layout=layout)
    module = Activation("gelu")
    for got, part in zip(module(input).unbind(), input.unbind(), strict=True):
        assert torch.equal(got, module(part))
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    torchquant.quantize_(model)
    for got, part in zip(model(input).unbind(), input.unbind(), strict=True):
        torch.testing.assert_close(got, model(part))


@make_all
def test_hooks_run_once_around_a_nested_tensor(make: Make) -> None:
    model = make()
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    parts = [torch.randn(rows, 64) for rows in (3, 5)]
    output = model(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for got, part in zip(output.unbind(), parts, strict=True):
        assert torch.equal(got, model(part))


@make_all
def test_a_traced_layer_is_one_node(make: Make) -> None:
    model = make()
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert [name for name in called if name != "1"] == ["0", "2"]
    x = torch.randn(4, 64)
    assert torch.equal(traced(x), model(x))
    assert traced.get_submodule("0") is model[0]


@pytest.mark.parametrize("make", [dynamic, static])
def test_hooks_run_once_in_a_traced_model(make: Make) -> None:
    model = make()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(4, 64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_prepared_layer_with_hooks_cannot_be_traced() -> None:
    """Its hooks run on proxies, so its forward must too, and that branches on the input."""
    model = prepared()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)


def test_a_traced_layer_without_a_model() -> None:
    for layer in (dynamic()[0], static()[0]):
        x = torch.randn(4, 64)
        assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))


def test_feature_extraction() -> None:
    vision = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = dynamic(), torch.randn(4, 64)
    assert vision.get_graph_node_names(model)[1] == vision.get_graph_node_names(plain())[1]
    found = vision.create_feature_extractor(model, ["0", "1", "2"])(x)
    assert torch.equal(found["0"], model[0](x))
    assert torch.equal(found["1"], torch.relu(model[0](x)))
    assert torch.equal(found["2"], model(x))


@make_all
def test_flops_are_those_of_the_float_model(make: Make) -> None:
    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(4, 64))
        return counter.get_total_flops()

    assert flops(make()) == flops(plain()) > 0


@pytest.mark.parametrize("make", [dynamic, static])
def test_gradients_of_torch_func(make: Make) -> None:
    model, x = make(), torch.randn(4, 64)

    def loss(x: Tensor) -> Tensor:
        output: Tensor = model(x).square().sum()
        return output

    ours = x.clone().requires_grad_()
    loss(ours).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), ours.grad)


@make_all
def test_compiled_and_copied_models_take_nested_tensors(make: Make) -> None:
    model = make()
    parts = [torch.randn(3, 64), torch.randn(5, 64)]
    input = torch.nested.nested_tensor(parts, layout=torch.jagged)
    wanted = model(input).values()
    assert torch.equal(copy.deepcopy(model)(input).values(), wanted)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(input).values(), wanted)
