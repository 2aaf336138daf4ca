"""Modules of other classes that compute a linear layer, such as GPT-2's Conv1D and FalconLinear."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import outcome
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.nn import QATLinear, QuantizedLinear
from torchquant.nn.float_linear import looks_linear, refusal
from torchquant.nn.kinds import LINEAR, kind_of
from torchquant.nn.linear_probe import is_transposed, other_class


class Transposed(nn.Module):
    """transformers' Conv1D: the weight is ``[inputs, outputs]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(floats(nx, nf))
        self.bias = nn.Parameter(floats(nf, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class Falcon(nn.Linear):
    """transformers' FalconLinear."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Marked(nn.Linear):
    pass


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class NearlyEqual(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.001


class OnlyInEvaluation(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return F.dropout(output, 0.5) if self.training else output


class Detached(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.detach(), self.bias)


class AlwaysFloat(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), self.bias.float())


class Counting(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        raise AssertionError("it must not be run")


class Scaling(nn.Linear):
    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(input) * scale


class LoRA(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.lora_A = nn.Parameter(torch.zeros(2, sizes[0]))

    def forward(self, input: Tensor) -> Tensor:
        raise AssertionError("it must not be run")


class WithFunction(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.function = torch.relu


class Attended(nn.Module):
    """A weight of two dimensions, but no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(floats(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).softmax(-1)


TAKEN = {
    "transposed": lambda: Transposed(96, 64),
    "square": lambda: Transposed(64, 64),
    "falcon": lambda: Falcon(64, 96),
    "without bias": lambda: Falcon(64, 96, bias=False),
    "marked": lambda: Marked(64, 96),
}
OTHER = "it does not compute x @ weight.T + bias"
REFUSED: dict[str, tuple[Any, str]] = {
    "doubled": (Doubled, OTHER),
    "nearly": (NearlyEqual, OTHER),
    "evaluation": (OnlyInEvaluation, OTHER),
    "detached": (Detached, OTHER),
    "dtype": (AlwaysFloat, OTHER),
    "counting": (Counting, "its forward may do more than compute"),
    "argument": (Scaling, "its forward takes (input, scale=1.0) instead of one tensor"),
    "lora": (LoRA, "it has more than weight and bias: lora_A"),
    "function": (WithFunction, "it has more than weight and bias: function"),
}


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_module_that_computes_a_linear_layer_is_taken(make: Any, dtype: torch.dtype) -> None:
    module = make().to(dtype)
    state = torch.random.get_rng_state()
    assert kind_of(module) is LINEAR and other_class(module) is None
    assert is_transposed(module) == isinstance(module, Transposed)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = floats(3, 64, dtype=dtype)
    model = nn.Sequential(module).eval()
    report = torchquant.quantize_(model)
    assert outcome(report) == {"0": "quantized"}
    assert report.layers[0].shape == LINEAR.weight_shape(module)
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    weight = module.weight.detach()
    matrix = weight.T.contiguous() if isinstance(module, Transposed) else weight
    plain = QuantizedLinear.from_tensors(matrix, module.bias, layer.config)
    assert_same_bits(layer(x).detach(), plain(x).detach())
    assert layer.weight.shape == module.weight.shape
    assert (layer.weight - weight).abs().max() < 0.01 * weight.abs().max()
    if isinstance(module, Transposed):
        assert (layer.nf, layer.nx) == (module.nf, module.nx)
        assert_same_bits(layer.weight.t() + 0, plain.weight + 0)
    torchquant.to_float_(model)
    back = model[0]
    assert type(back) is type(module) and back.bias is module.bias
    assert {k: v.shape for k, v in back.state_dict().items()} == {
        k: v.shape for k, v in module.state_dict().items()
    }
    assert back.__dict__.keys() == module.__dict__.keys()
    error = (back(x) - module(x)).abs().max()
    assert 0 < error < 0.05 * module(x).abs().max()
    torchquant.quantize_(model)
    if dtype == torch.float32:
        assert_same_bits(model(x).detach(), plain(x).detach())


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("learned", [False, True])
def test_training_it(make: Any, learned: bool) -> None:
    module = make()
    weight, x = module.weight, floats(5, 64)
    model = nn.Sequential(module)
    torchquant.prepare_qat_(model, torchquant.QATConfig(weight_bits=4, learned_weights=learned))
    assert isinstance(model[0], QATLinear) and model[0].weight is weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert weight.grad is not None and weight.grad.shape == weight.shape
        optimizer.step()
    restored = copy.deepcopy(model)
    torchquant.to_float_(restored)
    assert type(restored[0]) is type(module)
    trained = copy.deepcopy(model.eval())
    torchquant.convert_(model)
    assert torchquant.verify(trained, model, [x]).exact
    torchquant.to_float_(model)
    assert type(model[0]) is type(module)
    assert model[0].weight.shape == weight.shape


def test_simulated_training_of_a_transposed_layer() -> None:
    model, x = nn.Sequential(Transposed(96, 64)), floats(5, 64)
    torchquant.prepare_qat_(model, torchquant.QATConfig(weight_bits=4, simulate=True))
    model(x).sum().backward()
    assert model[0].weight.grad.shape == (64, 96)
    expected = model(x).detach()
    torchquant.convert_(model)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("meta", [False, True])
def test_copies_and_files(tmp_path: Path, make: Any, meta: bool) -> None:
    model, x = nn.Sequential(make()), floats(3, 64)
    cls = type(model[0])
    torchquant.quantize_(model)
    expected = model(x).detach()
    torchquant.save(model, tmp_path / "file")
    other = nn.Sequential(make())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for copied in (
        torchquant.load(tmp_path / "file", other.to("meta") if meta else other),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        assert_same_bits(copied(x).detach(), expected)
        assert type(copied[0].to_float()) is cls
        assert copied[0].weight.shape == model[0].weight.shape
        if cls is Transposed:
            assert copied[0].nf == model[0].nf


@pytest.mark.parametrize(("cls", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_module_that_differs_is_refused(cls: Any, reason: str) -> None:
    module = cls(64, 64)
    assert looks_linear(module)
    assert refusal(module) == f"{cls.__name__} (subclass of nn.Linear: {reason})"
    with pytest.raises(TypeError, match=r"must be a plain nn\.Linear, got"):
        QuantizedLinear.from_float(module)


def test_other_modules_with_a_matrix_are_no_linear_layers() -> None:
    for module in (Attended(), nn.PReLU()):
        assert kind_of(module) is None
    tables = [kind_of(table(64, 64)) for table in (nn.Embedding, nn.EmbeddingBag)]
    assert [kind and kind.name for kind in tables] == ["embedding", "embedding_bag"]
    with_hook = Transposed(64, 64)
    with_hook.forward = lambda x: x  # type: ignore[method-assign]
    assert refusal(with_hook) == "forward replaced on the instance"
