"""AWQ: scales, the search of their exponent, and the verb on models."""

import copy
import math

import pytest
import torch
from torch import nn

import torchquant
from torchquant import IntxWeightOnlyConfig, Weights, awq_
from torchquant.algorithms.awq_inputs import Calls, LayerInputs, copied, watch
from torchquant.algorithms.awq_scaling import awq_scales, scaled_rounding, search_scales
from torchquant.algorithms.awq_search import AWQSearch
from torchquant.algorithms.inputs import columns
from torchquant.algorithms.integer_weight import nearest
from torchquant.convert.adjustment import is_adjusted

CONFIG = IntxWeightOnlyConfig(3, group_size=32)


class Attention(nn.Module):
    """Two heads; keeps what it is called with in a cache that the caller gives."""

    def __init__(self, size):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.o = nn.Linear(size, size)

    def forward(self, x, cache=None):
        q, k, v = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if cache is not None:
            cache.append(k)
            assert len(cache) == 1, "a cache that is called twice has two entries"
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, size=64):
        super().__init__()
        self.before, self.attention = nn.LayerNorm(size), Attention(size)
        self.after, self.up, self.gate = (
            nn.LayerNorm(size),
            nn.Linear(size, 96),
            nn.Linear(size, 96),
        )
        self.down = nn.Linear(96, size)

    def forward(self, x):
        x = x + self.attention(self.before(x), cache=[])
        y = self.after(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def model_and_data(blocks=1, batches=3, tokens=20):
    """Blocks whose norms have a few large channels."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks))).eval()
    with torch.no_grad():
        for block in model:
            block.before.weight[::9] *= 20
            block.after.weight[::7] *= 20
    return model, [torch.randn(2, tokens, 64) for _ in range(batches)]


def error_of(model, expected, data):
    with torch.no_grad():
        return sum(
            float((model(x) - y).square().sum()) for x, y in zip(data, expected, strict=True)
        )


# ---------------------------------------------------------------- pure functions


def test_scales_are_powers_with_a_range_around_1():
    importance = torch.tensor([0.01, 1.0, 3.0, 10.0])
    for exponent in (0.0, 0.3, 1.0):
        scales = awq_scales(importance, exponent)
        assert float(scales.max() * scales.min()) == pytest.approx(1.0)
        ratio = scales / scales[1]
        torch.testing.assert_close(ratio, importance**exponent)
    assert torch.equal(awq_scales(importance, 0.0), torch.ones(4))
    assert awq_scales(torch.tensor([0.0, 1.0]), 1.0).tolist() == pytest.approx([1e-2, 1e2])


def test_search_takes_both_ends_of_the_grid():
    importance = torch.tensor([1.0, 4.0])
    seen = []

    def error(scales):
        seen.append(scales)
        return float(scales[1])

    assert search_scales(importance, error, steps=4).exponent == 0
    assert [float(one[1]) for one in seen] == pytest.approx([1, 4**0.125, 4**0.25, 4**0.375, 2])
    found = search_scales(importance, lambda scales: -float(scales[1]), steps=4)
    assert found.exponent == 1
    torch.testing.assert_close(found.scales, torch.tensor([0.5, 2.0]))
    assert found.errors == pytest.approx([-(4 ** (r / 8)) for r in range(5)])
    assert search_scales(importance, lambda scales: 1.0).exponent == 0, "equal errors"
    nan = iter([math.nan, 2.0, 1.0, math.nan, 3.0])
    assert search_scales(importance, lambda scales: next(nan), steps=4).exponent == 0.5


def test_scaled_rounding_rounds_the_scaled_weight():
    weight, scales = torch.randn(4, 32), torch.rand(32) + 0.5
    part = Weights(3)
    found = scaled_rounding(weight, scales, part)
    assert torch.equal(found, nearest(weight * scales, part).dequantize() / scales)
    assert torch.equal(
        scaled_rounding(weight, torch.ones(32), part), nearest(weight, part).dequantize()
    )


def test_bad_arguments_of_the_search():
    with pytest.raises(ValueError, match="importance must be finite"):
        search_scales(torch.tensor([math.inf]), lambda scales: 0.0)
    for steps in (0, True, 2.0):
        with pytest.raises(ValueError, match="steps must be a positive integer"):
            search_scales(torch.ones(2), lambda scales: 0.0, steps=steps)


# ---------------------------------------------------------------- what it sees


def test_importance_is_the_mean_magnitude_over_all_batches():
    layer = nn.Linear(3, 2)
    inputs = LayerInputs(layer, 2)
    first, second = torch.randn(5, 3), torch.randn(2, 700, 3)
    spoiled = torch.cat([first, torch.full((1, 3), math.nan)])
    watch("verb", nn.Sequential(layer), [spoiled, second], None, {"0": inputs}, [])
    whole = torch.cat([first, second.flatten(0, 1)])
    torch.testing.assert_close(inputs.importance, whole.abs().mean(0))
    assert inputs.count == 1405
    assert inputs.rows.shape == (5 + 256, 3)


def test_a_convolution_of_large_images_counts_a_part_of_the_places(monkeypatch):
    torch.manual_seed(0)
    layer, images = nn.Conv2d(4, 8, 3, padding=1), torch.randn(6, 4, 40, 40)
    images[:, 2] *= 30
    sizes, unfold = [], nn.functional.unfold

    def seen(input, *args):
        sizes.append(len(input))
        return unfold(input, *args)

    monkeypatch.setattr(nn.functional, "unfold", seen)
    inputs, alone = LayerInputs(layer, 1), LayerInputs(layer, 1)
    inputs.see(images)
    alone.see(images[0])
    assert set(sizes) == {1} and len(sizes) == 7
    assert (inputs.count, alone.count) == (6 * 128, 128)
    assert inputs.rows.shape == (512, 36) and len(inputs.rows.unique(dim=0)) == 512
    whole = columns(layer, images)[0].t().abs().mean(0)
    torch.testing.assert_close(inputs.importance, whole, rtol=0.15, atol=0.0)


def test_calls_are_repeated_with_their_own_copies_of_caches():
    model, data = model_and_data()
    calls = Calls(model[0].attention)
    watch("verb", model, data, None, {}, [calls])
    assert calls.repeats() and calls.error() < 1e-12
    with torch.no_grad():
        model[0].attention.q.weight.mul_(1.1)
    assert calls.error() > 1e-9
    assert not calls.repeats()


def test_copies_of_objects_share_tensors():
    class Cache:
        def __init__(self):
            self.keys, self.nested, self.itself = [torch.ones(1)], {"a": (torch.ones(1),)}, self

    cache = Cache()
    other = copied((cache, cache))[0]
    assert other is not cache and other.itself is other
    assert other.keys is not cache.keys and other.keys[0] is cache.keys[0]
    assert other.nested["a"][0] is cache.nested["a"][0]


# ---------------------------------------------------------------- the verb


def test_scales_and_ranges_lower_the_error_of_the_model():
    model, data = model_and_data()
    with torch.no_grad():
        expected = [model(x) for x in data]
    plain, unclipped = copy.deepcopy(model), copy.deepcopy(model)
    torchquant.quantize_(plain, CONFIG)
    awq_(unclipped, CONFIG, data, search_clip=False)
    report = awq_(model, CONFIG, data)
    errors = [error_of(one, expected, data) for one in (model, unclipped, plain)]
    assert errors[0] < errors[1] < 0.6 * errors[2]
    actions = {row.name: row.action for row in report.rows}
    assert actions.pop("0.attention.o") == "clipped", "its exponent is 0"
    assert set(actions.values()) == {"scaled"} and len(actions) == 6
    for name in ("0.attention.q", "0.gate"):
        row = report[name]
        assert 0 < row.exponent <= 1 and row.error < 0.7 * row.nearest_error
    assert "scales after 0.before" in report["0.attention.k"].reason
    assert report.summary().startswith("6 scaled, 1 clipped, 0 rounded, 0 left; ")
    assert report.difference < 1e-5


def test_the_error_is_that_of_the_module_that_holds_the_group(monkeypatch):
    """Not of weights, nor of each layer alone: attention hides an error that all keys share."""
    seen = []
    error = Calls.error
    monkeypatch.setattr(Calls, "error", lambda self: seen.append(self.module) or error(self))
    model, data = model_and_data()
    attention = model[0].attention
    awq_(model, CONFIG, data, steps=4)
    assert sum(module is attention for module in seen) == 5 + 1
    assert sum(type(module) is Block for module in seen) == 5 + 1


def test_only_the_scales():
    model, data = model_and_data()
    with torch.no_grad():
        expected = [model(x) for x in data]
    weight = model[0].gate.weight.clone()
    report = awq_(model, CONFIG, data, quantize=False)
    assert report.quantization is None
    assert all(row.error > 0 for row in report.rows)
    assert report["0.gate"].error < report["0.gate"].nearest_error
    assert all(type(layer) is not torchquant.QuantizedIntxLinear for layer in model.modules())
    assert not any(is_adjusted(layer) for layer in model.modules())
    assert not torch.equal(model[0].gate.weight, weight)
    with torch.no_grad():
        for x, y in zip(data, expected, strict=True):
            torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    rest = copy.deepcopy(model)
    torchquant.quantize_(rest, CONFIG)
    again = model_and_data()[0]
    awq_(again, CONFIG, data, search_clip=False)
    assert torch.equal(rest(data[0]), again(data[0]))


def test_layers_without_a_producer_get_ranges_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Embedding(96, 64))
    x = torch.randn(200, 64)
    x[:, 5] *= 30
    report = awq_(
        model, CONFIG, [x], forward=lambda model, batch: model[2](model[1](model[0](batch)))
    )
    assert [(row.name, row.action) for row in report.rows] == [
        ("0", "clipped"),
        ("2", "clipped"),
        ("3", "rounded"),
    ]
    assert "no norm and no linear layer" in report["0"].reason
    again = nn.Sequential(nn.Linear(64, 64))
    report_of_scales = awq_(again, CONFIG, [x], quantize=False)
    assert [row.action for row in report_of_scales.rows] == ["left"]
    assert report["0"].error < report["0"].nearest_error


@pytest.mark.parametrize("quantize", [True, False])
def test_layers_that_no_scales_improve_are_not_scaled(quantize):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(64))  # its nearest integers have no error
    report = awq_(model, CONFIG, [torch.randn(40, 64)], quantize=quantize, search_clip=False)
    row = report["1"]
    assert row.action == ("rounded" if quantize else "left") and row.exponent == 0
    assert row.reason.endswith("no scales after 0 lower its error")
    assert torch.equal(model[0].weight, torch.ones(64))


def test_a_model_in_training_mode_is_searched_in_evaluation_mode():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.first, self.second = (
                nn.LayerNorm(64),
                nn.Linear(64, 64),
                nn.Linear(64, 64),
            )
            self.dropout, self.norm = nn.Dropout(), nn.BatchNorm1d(64)

        def forward(self, x):
            x = self.before(x)
            return self.norm(self.dropout(self.first(x) * self.second(x)))

    torch.manual_seed(0)
    model, data = nn.Sequential(Normed(), nn.ReLU()), [torch.randn(40, 64)]
    evaluated = copy.deepcopy(model).eval()
    report, wanted = (awq_(one, CONFIG, data) for one in (model, evaluated))
    assert report.rows == wanted.rows
    assert torch.equal(model[0].first.packed, evaluated[0].first.packed)
    for name, value in evaluated[0].norm.state_dict().items():
        assert torch.equal(model[0].norm.state_dict()[name], value), name
    assert model.training and model[0].dropout.training and model[0].norm.training


def test_a_tied_head_keeps_the_weight_of_its_table():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(96, 64), nn.LayerNorm(64), nn.Linear(64, 96, bias=False))
    model[2].weight = model[0].weight
    data = [torch.randint(0, 96, (2, 20))]
    report = awq_(model, IntxWeightOnlyConfig(4, group_size=32), data)
    assert model[0].packed is model[2].packed
    assert report["0"].action == report["2"].action == "rounded"
    assert report["2"].reason.endswith("shares its weight with 0")
    assert report["2"].error == report["2"].nearest_error > 0
    assert any(note.startswith("One quantized weight for tied layers") for note in report.notes)


def test_a_convolution_and_grouped_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1, groups=2))
    config = torchquant.IntxActivationIntxWeightConfig(4)
    report = awq_(model, config, [torch.randn(2, 64, 5, 5)], filter_fn="*")
    assert [row.action for row in report.rows] == ["clipped", "rounded"]


def test_few_tokens_are_enough():
    model, data = model_and_data(batches=1, tokens=3)
    report = awq_(model, CONFIG, data)
    assert {row.action for row in report.rows} == {"scaled"}


def test_half_types_get_powers_of_two():
    model, data = model_and_data()
    report = awq_(model.bfloat16(), CONFIG, [x.bfloat16() for x in data], quantize=False)
    assert {row.action for row in report.rows if row.exponent} == {"scaled"}
    assert [row.name for row in report.rows if not row.exponent] == ["0.attention.o"]
    assert any("powers of two" in note for note in report.notes)


def test_nn_multihead_attention_without_quantizing():
    """Its projections are parts of one parameter, which the scales must not half reach."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 2, 128, norm_first=True, batch_first=True).eval()
    with torch.no_grad():
        model.norm1.weight[::9] *= 20
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = model(x)
    awq_(model, CONFIG, [x], quantize=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", [2, 20, 25, 34])
def test_an_exception_leaves_the_model_as_it_was(monkeypatch, place, error):
    model, data = model_and_data()
    state = copy.deepcopy(model.state_dict())
    calls = []
    plain = nearest

    def stop(weight, weights):
        calls.append(weight)
        if len(calls) == place:
            raise error
        return plain(weight, weights)

    monkeypatch.setattr("torchquant.algorithms.awq_scaling.nearest", stop)
    monkeypatch.setattr("torchquant.algorithms.awq_search.nearest", stop)
    with pytest.raises(error):
        awq_(model, CONFIG, data, steps=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not is_adjusted(module)
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_last_comparison_leaves_the_model_as_it_was(monkeypatch, error):
    model, data = model_and_data()
    state = copy.deepcopy(model.state_dict())
    plain, search = AWQSearch.check, []

    def stop(self):
        search.append(self)
        monkeypatch.setattr("torchquant.algorithms.awq_search.outputs_of", fail)
        plain(self)

    def fail(*args):
        raise error

    monkeypatch.setattr(AWQSearch, "check", stop)
    with pytest.raises(error):
        awq_(model, CONFIG, data, steps=2, quantize=False)
    assert search
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_failure_while_layers_are_replaced_leaves_a_model_that_works(monkeypatch):
    """The layers before it have scales in their integers, so the norms keep theirs."""
    model, data = model_and_data()
    expected = model(data[0])
    made = []
    plain = torchquant.QuantizedIntxLinear.from_float.__func__

    def stop(cls, *arguments, **options):
        made.append(cls)
        if len(made) == 3:
            raise MemoryError
        return plain(cls, *arguments, **options)

    monkeypatch.setattr(torchquant.QuantizedIntxLinear, "from_float", classmethod(stop))
    with pytest.raises(MemoryError):
        awq_(model, IntxWeightOnlyConfig(8, group_size=32), data)
    kinds = [type(layer).__name__ for layer in model.modules()]
    assert kinds.count("QuantizedIntxLinear") == 2
    error = (model(data[0]) - expected).square().mean() / expected.square().mean()
    assert float(error) < 0.02, float(error)
    assert not any(is_adjusted(module) for module in model.modules())


def test_bad_arguments_leave_the_model_as_it_was():
    model, data = model_and_data()
    state = copy.deepcopy(model.state_dict())
    for arguments, options, error, message in (
        ((CONFIG, []), {}, ValueError, "awq_: loader must have batches, got none"),
        ((4, data), {}, TypeError, "awq_: config must be a torchquant configuration"),
        ((CONFIG, data), {"steps": 0}, ValueError, "awq_: steps must be a positive integer, got 0"),
        ((CONFIG, [3]), {}, TypeError, "awq_: a batch must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            awq_(model, *arguments, **options)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
