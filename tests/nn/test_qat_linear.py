"""QATLinear gives the output of the converted layer, in every mode, on every instruction set."""

import copy
import itertools
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import FLOATS, NOT_FINITE, assert_same_bits, check_everywhere, floats, sprinkle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchquant import (
    Dynamic,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    IntxActivationIntxWeightConfig,
    LSQQuantizer,
    ObservedQuantizer,
    QATConfig,
    QATLinear,
    TrainingConfig,
    functional,
)
from torchquant.nn import QuantizedLinear
from torchquant.training.configuration import training_config

CONFIGS = {
    "dynamic": QATConfig(),
    "dynamic_symmetric": QATConfig(activation_symmetric=True),
    "dynamic_w4": QATConfig(weight_bits=4),
    "dynamic_w2a4": QATConfig(weight_bits=2, activation_bits=4),
    "dynamic_a3_symmetric": QATConfig(activation_bits=3, activation_symmetric=True),
    "dynamic_weight_zero_points": QATConfig(weight_symmetric=False),
    "dynamic_w5_zero_points": QATConfig(weight_bits=5, weight_symmetric=False),
    "dynamic_lsq_w3": QATConfig(weight_bits=3, learned_weights=True),
    "dynamic_lsq_w8": QATConfig(learned_weights=True),
    "static": QATConfig(activations="static"),
    "static_symmetric": QATConfig(activations="static", activation_symmetric=True),
    "static_w4a6": QATConfig(weight_bits=4, activation_bits=6, activations="static"),
    "lsq": QATConfig(activations="static", learned_weights=True, learned_activations=True),
    "lsq_w4a4": QATConfig(4, 4, "static", learned_weights=True, learned_activations=True),
    "lsq_unsigned": QATConfig(
        activations="static", learned_activations=True, activation_signed=False
    ),
    "lsq_unsigned_a2": QATConfig(
        2, 2, "static", learned_weights=True, learned_activations=True, activation_signed=False
    ),
    "lsq_plus": QATConfig(
        activation_bits=4, activations="static", learned_activations=True, learned_offset=True
    ),
}
STATIC = [name for name, config in CONFIGS.items() if not isinstance(config.activations, Dynamic)]


def layer_of(
    config: TrainingConfig | str,
    out_features: int = 24,
    in_features: int = 40,
    activation: str = "none",
    bias: bool = True,
    seed: int = 0,
) -> QATLinear:
    """A layer whose ranges and steps were initialised by a batch."""
    torch.manual_seed(seed)
    if isinstance(config, str):
        config = CONFIGS[config]
    layer = QATLinear(in_features, out_features, bias, config, activation)
    layer(torch.randn(16, in_features) + 0.3)
    return layer


def frozen(layer: QATLinear) -> QATLinear:
    if isinstance(layer.input_quantizer, ObservedQuantizer):
        layer.input_quantizer.freeze()
    return layer


def inputs(in_features: int = 40) -> Iterator[Tensor]:
    for dtype in FLOATS:
        yield sprinkle(floats(9, in_features, seed=1, dtype=dtype), NOT_FINITE, seed=1)
    yield floats(2, 3, in_features, seed=2)
    yield floats(in_features, seed=3)
    yield torch.empty(0, in_features)
    yield torch.empty(2, 0, in_features)


# ---------------------------------------------------------------- the bits of the deployed layer


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("config", CONFIGS)
def test_evaluation_training_and_deployed_give_the_same_bits(config: str, activation: str) -> None:
    layer = frozen(layer_of(config, activation=activation))
    deployed = layer.to_quantized()
    for x in inputs():
        want = deployed(x).detach()
        for mode in (True, False):
            layer.train(mode)
            check_everywhere(
                lambda x=x: layer(x).detach(), want, counts=(1, 2), what=(mode, x.shape)
            )
            with torch.no_grad():
                check_everywhere(lambda x=x: layer(x), want, counts=(1, 2), what=(mode, x.shape))
        check_everywhere(lambda x=x: layer.to_quantized()(x).detach(), want, what=x.shape)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(config: str, dtype: torch.dtype) -> None:
    layer = frozen(layer_of(config, activation="relu"))
    deployed = layer.to_quantized()
    x = floats(9, 40)
    with torch.autocast("cpu", dtype):
        want, got = deployed(x), layer(x)
        with torch.no_grad():
            assert_same_bits(layer(x), want.detach())
    assert want.dtype == dtype
    assert_same_bits(got.detach(), want.detach())
    got.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_of_low_precision_parameters(dtype: torch.dtype) -> None:
    for config in ("dynamic", "static", "lsq_w4a4"):
        layer = frozen(layer_of(config).to(dtype))
        x = floats(9, 40, dtype=dtype)
        assert_same_bits(layer(x).detach(), layer.to_quantized()(x).detach())
        layer(x).float().sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("config", ["dynamic", "dynamic_w4", "dynamic_weight_zero_points"])
def test_to_quantized_is_from_float(config: str) -> None:
    layer = layer_of(config)
    other = QuantizedLinear.from_float(layer.to_float(), layer.config.deployed())
    for (name, got), (_, want) in zip(
        layer.to_quantized().state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert_same_bits(got, want, name)


@pytest.mark.parametrize("config", CONFIGS)
def test_deployed_integers_are_in_their_ranges(config: str) -> None:
    layer = layer_of(config)
    deployed = layer.to_quantized()
    qmin, qmax = layer.config.weights.range
    assert qmin <= int(deployed.qweight.min())
    assert int(deployed.qweight.max()) <= qmax
    assert deployed.config == layer.config.deployed()
    if deployed.input_zero_point is not None:
        low, high = deployed.config.activations.range
        assert low <= int(deployed.input_zero_point) <= high


@pytest.mark.parametrize("config", CONFIGS)
def test_the_simulation_differs_by_rounding_only(config: str) -> None:
    layer = frozen(layer_of(config, activation="relu"))
    x = torch.randn(32, 40)
    layer(x).sum().backward()
    exact = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer.simulate = True
    y = layer(x)
    layer.simulate = False
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == (name in exact)
        if name in exact:
            torch.testing.assert_close(parameter.grad, exact[name], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- gradients of learned scales


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


# ---------------------------------------------------------------- ranges


def test_ranges_are_updated_in_training_mode_only() -> None:
    layer = layer_of("static")
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, ObservedQuantizer)
    before = quantizer.qparams()[0].clone()
    layer.eval()(torch.randn(4, 40) * 100)
    assert_same_bits(quantizer.qparams()[0], before)
    layer.train()(torch.randn(4, 40) * 100)
    assert float(quantizer.qparams()[0]) > float(before)
    quantizer.freeze()
    before = quantizer.qparams()[0].clone()
    layer(torch.randn(4, 40) * 1e4)
    assert_same_bits(quantizer.qparams()[0], before)


@pytest.mark.parametrize("config", ["dynamic", "static", "lsq"])
def test_the_first_stage_computes_in_float_and_observes(config: str) -> None:
    torch.manual_seed(0)
    layer = QATLinear(40, 24, config=CONFIGS[config], activation="relu").enable_quantization(False)
    x = torch.randn(8, 40)
    want = torch.relu(nn.functional.linear(x, layer.weight, layer.bias))
    assert_same_bits(layer(x).detach(), want.detach())
    assert ", in float" in repr(layer)
    if layer.input_quantizer is not None:
        scale, _ = layer.input_quantizer.qparams()
        assert bool(torch.isfinite(scale))
    layer.enable_quantization()
    assert_same_bits(frozen(layer)(x).detach(), layer.to_quantized()(x).detach())


def test_static_without_a_range_is_refused() -> None:
    layer = QATLinear(8, 4, config=CONFIGS["static"])
    with pytest.raises(RuntimeError, match="there is no range yet"):
        layer.to_quantized()
    with pytest.raises(RuntimeError, match="there is no range yet"):
        layer.eval()(torch.randn(2, 8))
    lsq = QATLinear(8, 4, config=CONFIGS["lsq"])
    with pytest.raises(RuntimeError, match="not initialised"):
        lsq.to_quantized()


# ---------------------------------------------------------------- training


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


# ---------------------------------------------------------------- copies, state, configurations


@pytest.mark.parametrize("config", CONFIGS)
def test_copies_and_state_dicts(config: str) -> None:
    layer = layer_of(config, activation="relu")
    layer.enable_quantization(False).enable_quantization()
    frozen(layer)
    x = torch.randn(5, 40)
    want = layer(x).detach()
    assert_same_bits(copy.deepcopy(layer)(x).detach(), want)
    assert_same_bits(pickle.loads(pickle.dumps(layer))(x).detach(), want)
    other = QATLinear(40, 24, config=CONFIGS[config], activation="relu").enable_quantization(False)
    other.load_state_dict(layer.state_dict())
    assert_same_bits(other(x).detach(), want)


def test_from_float_shares_the_parameters() -> None:
    linear = nn.Linear(8, 4).eval()
    layer = QATLinear.from_float(linear, activation="relu")
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    back = layer.to_float()
    assert type(back) is nn.Linear
    assert back.weight is linear.weight
    assert not QATLinear.from_float(nn.Linear(8, 4, bias=False)).to_float().bias


def test_quantizers_follow_the_configuration() -> None:
    assert QATLinear(8, 4).input_quantizer is None
    assert QATLinear(8, 4).weight_quantizer is None
    layer = QATLinear(8, 4, config=CONFIGS["lsq_unsigned_a2"])
    assert isinstance(layer.input_quantizer, LSQQuantizer)
    assert (layer.input_quantizer.qmin, layer.input_quantizer.qmax) == (0, 3)
    assert layer.input_quantizer.num_features == 8
    assert layer.weight_quantizer.step.shape == (4,)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, QATConfig()),
        (
            Int8DynamicActivationInt8WeightConfig(True, False),
            QATConfig(activation_symmetric=True, weight_symmetric=False),
        ),
        (Int8StaticActivationInt8WeightConfig(), QATConfig(activations="static")),
        (IntxActivationIntxWeightConfig(3, 5), QATConfig(3, 5)),
        (
            IntxActivationIntxWeightConfig(4, 8, True, True),
            QATConfig(4, activations="static", activation_symmetric=True),
        ),
    ],
)
def test_configurations_to_deploy_can_be_trained(config: Any, expected: TrainingConfig) -> None:
    assert training_config("x", config) == expected
    if config is not None:
        assert training_config("x", config).deployed() == config


def test_errors() -> None:
    for call, error, message in (
        (
            lambda: QATLinear(8, 4, activation="gelu"),
            ValueError,
            "activation must be none or relu, got 'gelu'",
        ),
        (
            lambda: QATLinear(8, 4, config="int8"),
            TypeError,
            "QATLinear: config must be a torchquant configuration",
        ),
        (lambda: QATLinear.from_float(nn.ReLU()), TypeError, "must be a plain nn.Linear, got ReLU"),
        (
            lambda: QATLinear(
                8,
                4,
                config=Int8StaticActivationInt8WeightConfig(True, activation_narrow_range=False),
            ),
            ValueError,
            "config must leave activation_narrow_range at None",
        ),
        (lambda: QATLinear(8, 4)(torch.ones(2, 9)), ValueError, "in_features = 8, got [2, 9]"),
        (lambda: QATLinear(8, 4)([1.0]), TypeError, "QATLinear: input must be a tensor, got list"),
        (
            lambda: QATLinear(8, 4)(torch.ones(2, 8).int()),
            TypeError,
            "input must be float32, bfloat16 or float16",
        ),
        (
            lambda: QATLinear(8, 4)(torch.ones(2, 8, device="meta")),
            ValueError,
            "QATLinear: input must be on the layer's device cpu",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()
    layer = QATLinear(8, 4)
    with torch.no_grad():
        layer.weight[1, 2] = float("nan")
    assert layer(torch.ones(2, 8)).isnan().any()
    with pytest.raises(ValueError, match="the weight must be finite"):
        layer.to_quantized()
