"""QATLinear in training: gradients of learned scales, the loss, memory, and torch's tools."""

import copy
import itertools

import pytest
import torch
from support import assert_same_bits
from support.qat_layers import CONFIGS, layer_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchquant import Dynamic, QATLinear, TrainingConfig, functional


def test_gradients_of_learned_steps_are_those_of_the_formula() -> None:
    for name in ("lsq", "lsq_w4a4", "lsq_unsigned_a2", "lsq_plus", "dynamic_lsq_w3"):
        layer = layer_of(name, activation="relu")
        config = layer.config
        learned_offset = getattr(config.activations, "zero_point", None) == "learned"
        x = (torch.randn(32, 40) + 0.2).requires_grad_()
        y = layer(x)
        grad = torch.randn(32, 24)
        y.backward(grad)
        input_range, weight_range = config.deployed().activations.range, config.weights.range
        deployed = layer.to_quantized()
        quantizer, weight_quantizer = layer.input_quantizer, layer.weight_quantizer
        rows = functional.quantize_rows(
            x.detach(),
            deployed.input_scale,
            deployed.input_zero_point,
            qmin=input_range[0],
            qmax=input_range[1],
        )
        channels = functional.quantize_pack(
            layer.weight.detach(),
            None if weight_quantizer is None else deployed.weight_scale,
            qmin=weight_range[0],
            qmax=weight_range[1],
        )
        want = functional.qat_linear_backward(
            grad.double(),
            y.detach(),
            x.detach(),
            layer.weight.detach(),
            rows,
            channels,
            input_range=input_range,
            weight_range=weight_range,
            static=not isinstance(config.activations, Dynamic),
            weight_given=weight_quantizer is not None,
            activation="relu",
            learned_offset=learned_offset,
            input_grad_factor=0.0 if quantizer is None else quantizer.grad_factor(x),
            weight_grad_factor=(
                0.0 if weight_quantizer is None else weight_quantizer.grad_factor(layer.weight)
            ),
        )

        def close(got: Tensor, wanted: Tensor | None, what: str, name: str = name) -> None:
            assert wanted is not None
            tolerance = 1e-5 * float(wanted.abs().max()) + 1e-6
            torch.testing.assert_close(
                got.double(), wanted, rtol=1e-5, atol=tolerance, msg=lambda m: f"{name} {what} {m}"
            )

        close(x.grad, want.input, "input")
        close(layer.weight.grad, want.weight, "weight")
        close(layer.bias.grad, want.bias, "bias")
        if quantizer is not None:
            close(quantizer.step.grad, want.input_scale, "step")
        if learned_offset:
            close(quantizer.offset.grad, want.input_offset, "offset")
        if weight_quantizer is not None:
            close(weight_quantizer.step.grad, want.weight_scale, "weight step")


def test_the_activation_steps_gradient_scale_does_not_depend_on_the_batch() -> None:
    layer = layer_of("lsq")
    x = torch.randn(4, 40)
    gradients = []
    for times in (1, 8):
        layer.zero_grad()
        layer(x.repeat(times, 1)).mean(0).sum().backward()
        gradients.append(layer.input_quantizer.step.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_a_step_that_training_reduced_to_zero_is_no_error() -> None:
    layer = layer_of("lsq")
    with torch.no_grad():
        layer.input_quantizer.step.fill_(-1.0)
        layer.weight_quantizer.step.fill_(0.0)
    layer(torch.randn(3, 40)).sum().backward()
    assert layer.to_quantized().input_scale.item() == 2.0**-126


def mlp(config: TrainingConfig) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        QATLinear(16, 32, config=config, activation="relu"), QATLinear(32, 8, config=config)
    )


@pytest.mark.parametrize("config", ["dynamic", "static", "lsq_w4a4", "lsq_plus"])
def test_training_lowers_the_loss(config: str) -> None:
    model = mlp(CONFIGS[config])
    x = torch.randn(64, 16)
    target = torch.sin(x[:, :8] * 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("config", ["dynamic", "static", "lsq"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(config: str, reentrant: bool) -> None:
    x = torch.randn(8, 16)
    results = []
    for wrapped in (False, True):
        model = mlp(CONFIGS[config])
        inside = x.clone().requires_grad_()
        y = checkpoint(model, inside, use_reentrant=reentrant) if wrapped else model(inside)
        y.sum().backward()
        state = [p.grad for p in model.parameters()] + [inside.grad] + list(model.buffers())
        results.append([y.detach(), *state])
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("config", ["dynamic", "static", "lsq_w4a4", "lsq_plus"])
def test_a_compiled_training_step(config: str) -> None:
    x = torch.randn(8, 16)
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = mlp(CONFIGS[config])
        model(x)  # initialises steps and ranges
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        outputs = []
        for _ in range(2):
            y = step(x)
            model.zero_grad()
            y.square().sum().backward()
            outputs.append(y.detach())
        results.append([*outputs, *(p.grad for p in model.parameters()), *model.buffers()])
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)


def test_gradients_accumulate() -> None:
    model = mlp(CONFIGS["dynamic"])
    x = torch.randn(8, 16)
    model(x).sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in x.split(2):
        model(part).sum().backward()
    for got, want in zip((p.grad for p in model.parameters()), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_layer_used_twice_before_one_backward() -> None:
    """Its gradients are the sums of those of two layers, each used once."""
    for config in ("dynamic", "static", "lsq", "lsq_plus"):
        torch.manual_seed(0)
        layer = QATLinear(16, 16, config=CONFIGS[config], activation="relu")
        x, grad = torch.randn(4, 16), torch.randn(4, 16)
        first = copy.deepcopy(layer)
        middle = first(x)
        second = copy.deepcopy(first)  # with the ranges and steps that the first call left
        want = second(middle)
        want.backward(grad)
        got = layer(layer(x))
        got.backward(grad)
        assert_same_bits(got.detach(), want.detach(), config)
        both = zip(first.named_parameters(), second.parameters(), strict=True)
        wanted = {name: one.grad + two.grad for (name, one), two in both if one.requires_grad}
        assert "weight" in wanted
        for name, parameter in layer.named_parameters():
            assert_same_bits(parameter.grad, wanted[name], (config, name))
        assert float(wanted["weight"].abs().max()) > 0


def test_saved_activations_take_a_third_of_the_memory_of_float_activations() -> None:
    batch, sizes = 128, (256, 512, 512, 256)

    def saved(layers: list[nn.Module]) -> int:
        model, seen = nn.Sequential(*layers), {}
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(batch, sizes[0])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
        return sum(seen.values())

    pairs = list(itertools.pairwise(sizes))
    float_layers: list[nn.Module] = []
    for k, n in pairs:
        float_layers += [nn.Linear(k, n), nn.ReLU()]
    for config in ("dynamic", "static"):
        ours = saved(
            [
                QATLinear(k, n, config=CONFIGS[config], activation="relu" if i < 2 else "none")
                for i, (k, n) in enumerate(pairs)
            ]
        )
        assert ours <= 0.35 * saved(float_layers[:-1])
