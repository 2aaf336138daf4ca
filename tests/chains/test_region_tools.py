"""Tools that follow or copy a model see a region, and compute its values."""

import copy
import inspect
import pydoc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from support.chain_models import Functional
from support.chains import converted
from torch import Tensor, nn

Follow = Callable[[nn.Module, Tensor], Any]


@pytest.fixture(scope="module")
def made() -> Any:
    model, x, _ = converted(Functional)
    with torch.no_grad():
        return model, x, model(x)


TOOLS: dict[str, Follow] = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "export with any batch": lambda model, x: torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "jit.trace": lambda model, x: torch.jit.trace(model, x),
    "compile": lambda model, x: torch.compile(model, fullgraph=True, backend="eager"),
    "vmap": lambda model, x: lambda y: torch.func.vmap(lambda one: model(one[None])[0])(y),
    "vmap over batches": lambda model, x: lambda y: torch.func.vmap(model)(y[None])[0],
    "call of the forward": lambda model, x: lambda y: model.forward(y),
    "call by name": lambda model, x: lambda y: model.forward(x=y),
}


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_compute_the_same(made: Any, tool: str, nested: bool) -> None:
    model, x, wanted = made
    if nested:
        if "forward" in tool or tool == "call by name":
            return
        model = nn.Sequential(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert torch.equal(TOOLS[tool](model, x)(x), wanted)


def test_fx_records_a_region_below_the_root_as_one_call(made: Any) -> None:
    model, x, wanted = made
    traced = torch.fx.symbolic_trace(nn.Sequential(model, nn.ReLU()))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    with torch.no_grad():
        assert torch.equal(traced(x), wanted.relu())


def test_the_signature_is_that_of_the_class(made: Any) -> None:
    model = made[0]
    wanted = inspect.signature(Functional().forward)
    assert inspect.signature(model.forward) == wanted
    assert model.forward.__code__ is Functional.forward.__code__
    assert model.forward.__name__ == "forward"
    assert "Region" in pydoc.render_doc(model.forward)
    with pytest.raises(AttributeError, match="'RegionForward' object has no attribute 'missing'"):
        model.forward.missing  # noqa: B018


def test_stacked_models(made: Any) -> None:
    """torch.func.stack_module_state runs several models at once."""
    model, x, wanted = made
    parameters, buffers = torch.func.stack_module_state([model, model])

    def call(own: Any, state: Any) -> Any:
        return torch.func.functional_call(model, (own, state), (x,))

    with torch.no_grad():
        results = torch.func.vmap(call)(parameters, buffers)
    assert torch.equal(results[0], wanted) and torch.equal(results[1], wanted)


def test_gradients_of_samples(made: Any) -> None:
    model, x, _ = made
    grads = torch.func.vmap(torch.func.grad(lambda one: model(one[None]).sum()))(x)
    y = x.clone().requires_grad_()
    model(y).sum().backward()
    torch.testing.assert_close(grads, y.grad)


def test_a_changed_model_is_compiled_as_its_class_computes(made: Any) -> None:
    model, x, wanted = made
    model = copy.deepcopy(model)
    model.first.append(nn.Sigmoid())
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="a child of Sequential was changed"):
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        assert torch.equal(compiled, Functional.forward(model, x))
    assert not torch.equal(compiled, wanted)
