"""Which groups are found in small models, and why others are not."""

import copy

import numpy as np
import pytest
import torch
from support.fold_models import Block, Experts, GainNorm, filled, rows
from torch import nn
from torch.nn import functional as F

from torchquant.algorithms import find_scaling_groups, fold, output_difference


def found(model, x, **options):
    """The groups as (layers, producer, kind), and the reasons; the model must stay as it is."""
    before = copy.deepcopy(model.state_dict())
    result = find_scaling_groups(model, [x], **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return [(group.layers, group.producer, group.kind) for group in result.groups], result.reasons


@torch.no_grad()
def folded_difference(model, x):
    """The change of the outputs when all groups are folded with factors from 1/8 to 8."""
    expected = model(x)
    generator = torch.Generator().manual_seed(2)
    for group in find_scaling_groups(model, [x]).groups:
        powers = torch.rand(group.count, generator=generator) * 6 - 3
        fold(model, group, group.free(torch.exp2(powers)[group.channels.clamp(min=0)]))
    return output_difference([expected], [model(x)])


class Function(nn.Module):
    """Two layers and a norm, with a function of the test as the forward."""

    def __init__(self, forward, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def function(forward):
    return filled(Function(forward))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, GainNorm, lambda w: GainNorm(w, 1.0)])
def test_a_norm_before_linear_layers(norm):
    model = filled(nn.Sequential(norm(8), nn.Linear(8, 8, bias=False)))
    groups, reasons = found(model, rows(5, 8))
    assert (groups, reasons) == ([(("1",), "0", "norm")], {})
    assert folded_difference(model, rows(5, 8)) < 1e-6


def test_a_gain_with_a_constant_is_divided_with_it():
    model = filled(nn.Sequential(GainNorm(4, 1.0), nn.Linear(4, 2)))
    gain = model[0].weight + 1
    (group,) = find_scaling_groups(model, [rows(3, 4)]).groups
    fold(model, group, torch.full((4,), 4.0))
    assert torch.allclose(model[0].weight + 1, gain / 4)


@pytest.mark.parametrize("how", ["repeat", "gqa", "manual", "einsum"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_block_of_a_decoder(how, fused):
    model = filled(Block(how=how, fused=fused))
    groups, reasons = found(model, rows(2, 5, 16))
    up = "mlp.gate_up" if fused else "mlp.up"
    assert groups == [
        (("attention.q", "attention.k", "attention.v"), "norm1", "norm"),
        (("attention.o",), "attention.v", "linear"),
        (("mlp.gate_up",) if fused else ("mlp.gate", "mlp.up"), "norm2", "norm"),
        (("mlp.down",), up, "linear"),
    ]
    assert reasons == {}
    assert folded_difference(model, rows(2, 5, 16)) < 1e-5


def test_grouped_heads_share_channels_of_the_values():
    (_, group) = find_scaling_groups(filled(Block()), [rows(2, 5, 16)]).groups[:2]
    expected = torch.arange(8).view(2, 1, 4).expand(2, 2, 4).flatten()
    assert torch.equal(group.channels, expected)
    assert (group.repeat, group.count) == (2, 8)


def test_half_of_a_fused_layer_is_read():
    model = filled(Block(fused=True))
    group = find_scaling_groups(model, [rows(2, 5, 16)]).groups[-1]
    assert torch.equal(group.channels, torch.arange(24, 48))
    gate = model.mlp.gate_up.weight[:24].clone()
    fold(model, group, torch.full((24,), 2.0))
    assert torch.equal(model.mlp.gate_up.weight[:24], gate)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.second(F.gelu(m.first(x))), "gelu stands before it"),
        (lambda m, x: m.second(m.first(x) + x), "an addition stands before it"),
        (lambda m, x: m.second(m.first(x) + 1.0), "an addition stands before it"),
        (lambda m, x: (lambda y: (y, m.second(y)))(m.first(x)), "the model returns it"),
        (lambda m, x: m.second(m.first(x)) + m.first.weight.sum(), "sum reads it"),
        (lambda m, x: m.second(m.first(x)) + m.second.weight.mean(), "mean reads it"),
        (lambda m, x: m.second(m.second(m.first(x))), "reads other channels in another call"),
        (lambda m, x: m.second(m.first(x)) + m.second(x), "reads other channels in another call"),
        (
            lambda m, x: m.second(m.first(x).flip(0) + m.first(x).flip(1)),
            "which scales do not pass",
        ),
        (lambda m, x: m.second(m.first(x).cumsum(-1)), "cumsum stands before it"),
        (lambda m, x: m.second(m.first(x) ** 2), "pow stands before it"),
        (lambda m, x: m.second(x / m.first(x)), "div stands before it"),
        (lambda m, x: m.second(m.first(x).masked_fill(x > 0, 1.0)), "masked_fill stands before"),
        (lambda m, x: m.second(F.pad(m.first(x)[1:], (0, 0, 1, 0), value=2.0)), "pad stands"),
        (lambda m, x: m.second(F.linear(m.first(x), m.first.weight)), "in several ways|other chan"),
    ],
)
def test_what_ends_a_group(forward, reason):
    groups, reasons = found(function(forward), rows(5, 8))
    assert [group for group in groups if group[0] == ("second",)] == []
    assert any(part in reasons["second"] for part in reason.split("|")), reasons["second"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.second(F.relu(m.first(x))),
        lambda m, x: m.second(F.leaky_relu(-m.first(x), 0.1) * 3 / x.abs().sum()),
        lambda m, x: m.second(m.first(x) * x.sigmoid()),
        lambda m, x: m.second(x.sigmoid() * m.first(x)),
        lambda m, x: m.second(m.first(x) / (1 + x.square())),
        lambda m, x: m.second((m.first(x) + m.first(x).flip(0)).mean(0, keepdim=True)),
        lambda m, x: m.second(m.first(x).t().reshape(2, 4, -1).flatten(0, 1).t()),
        lambda m, x: m.second(torch.cat([m.first(x)[:2], m.first(x)[2:]])),
        lambda m, x: m.second(torch.cat([x[:, :4], m.first(x)[:, :4]], -1)),
        lambda m, x: m.second(F.pad(m.first(x), (0, 0, 1, 2))),
        lambda m, x: m.second(m.first(x).masked_fill(x.sum(-1, keepdim=True) > 0, 0.0)),
        lambda m, x: m.second(F.dropout(m.first(x), 0.5, m.training)),
        lambda m, x: m.second(torch.zeros_like(x) + m.first(x)),
        lambda m, x: m.second(m.first(x).mul_(2.0)),
        lambda m, x: torch.addmm(m.second.bias, m.first(x), m.second.weight.t()),
        lambda m, x: torch.einsum("bi,oi->bo", m.first(x), m.second.weight),
        lambda m, x: m.second((x @ m.first.weight.t() + m.first.bias).double().float()),
        lambda m, x: m.second(m.first(x)[None].expand(3, -1, -1)),
    ],
)
def test_what_a_scale_passes(forward):
    model = function(forward)
    groups, _ = found(model, rows(5, 8))
    assert (("second",), "first", "linear") in groups
    assert folded_difference(model, rows(5, 8)) < 1e-5


def test_columns_of_other_values_keep_their_weights():
    model = function(lambda m, x: m.second(torch.cat([x[:, :4], m.first(x)[:, :4]], -1)))
    (group,) = find_scaling_groups(model, [rows(5, 8)]).groups
    assert group.channels.tolist() == [-1, -1, -1, -1, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="1 for columns that read none"):
        fold(model, group, torch.full((8,), 2.0))


def test_layers_that_read_other_halves_are_groups_of_their_own():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            first, second = self.norm(x).chunk(2, -1)
            return self.first(first) + self.second(second)

    model = filled(Halves())
    groups, _ = found(model, rows(5, 8))
    assert groups == [(("first",), "norm", "norm"), (("second",), "norm", "norm")]
    assert folded_difference(model, rows(5, 8)) < 1e-5


def test_layers_that_read_in_different_orders_are_left():
    model = function(lambda m, x: (lambda y: m.first(y) + m.second(y.flip(-1)))(m.norm(x)))
    groups, reasons = found(model, rows(5, 8))
    assert groups == []
    assert reasons["first"] == "it reads norm, and layers read it in different orders"


def test_what_no_torch_function_shows_is_found_by_the_check():
    def forward(m, x):
        y = m.norm(x)
        with torch._C.DisableTorchFunction():
            hidden = torch.from_numpy(y.numpy().copy())
        return m.second(m.first(y) + hidden)

    groups, reasons = found(function(forward), rows(5, 8))
    assert groups == []
    assert reasons["first"].startswith("the outputs of the model would change by")


def test_numpy_ends_a_group():
    def forward(m, x):
        y = m.norm(x)
        return m.first(y) + torch.from_numpy(np.asarray(y.numpy()))

    groups, reasons = found(function(forward), rows(5, 8))
    assert groups == []
    assert reasons["first"] == "it reads norm, and numpy reads it"


def test_a_view_that_is_changed_in_place_ends_a_group():
    def forward(m, x):
        y = m.norm(x)
        y[:, :2].add_(1.0)
        return m.first(y)

    groups, reasons = found(function(forward), rows(5, 8))
    assert groups == []
    assert "norm" in reasons["first"]


def test_a_group_fails_without_the_others():
    """One group that the check refuses does not take others with it."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = Block(), function(hidden)

        def forward(self, x):
            return self.good(x) + self.bad(x[..., :8]).sum()

    def hidden(m, x):
        y = m.norm(x)
        with torch._C.DisableTorchFunction():
            seen = torch.from_numpy(y.numpy().copy())
        return m.second(m.first(y) + seen)

    groups, reasons = found(filled(Both()), rows(2, 5, 16))
    assert len(groups) == 4 and all(group[1].startswith("good.") for group in groups)
    assert "would change" in reasons["bad.first"]


def test_tied_weights_are_left():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
            self.head = nn.Linear(8, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.norm(self.embedding(x)))

    groups, reasons = found(filled(Tied()), torch.arange(5)[None])
    assert groups == []
    assert reasons == {"head": "it shares its weight with another module"}


def test_experts_in_one_parameter_are_scaled_with_those_that_no_token_chose():
    model = filled(Experts(modules=False))
    groups, reasons = found(model, rows(1, 16))
    assert groups == [(("router", ""), "norm", "norm")]
    assert reasons == {}
    expected = model(rows(40, 16, seed=3))
    (group,) = find_scaling_groups(model, [rows(1, 16)]).groups
    fold(model, group, torch.linspace(0.5, 2, 16))
    assert output_difference([expected], [model(rows(40, 16, seed=3))]) < 1e-5


@pytest.mark.parametrize("every", [False, True])
def test_an_expert_that_no_token_chose_ends_the_group(every):
    model = filled(Experts(modules=True, every=every))
    groups, reasons = found(model, rows(1, 16))
    assert groups == []
    assert "no batch reached experts." in reasons["router"]
    groups, _ = found(model, rows(40, 16))
    assert groups == [(("router", "experts.0", "experts.1", "experts.2"), "norm", "norm")]


def test_experts_without_rows_in_some_batches_are_scaled():
    model = filled(Experts(modules=True, every=True))
    whole = rows(40, 16)
    groups = find_scaling_groups(model, [*whole.split(1)]).groups
    assert len(groups) == 1
    assert {*groups[0].layers} == {"router", "experts.0", "experts.1", "experts.2"}
    expected = model(whole)
    fold(model, groups[0], torch.linspace(0.5, 2, 16))
    assert output_difference([expected], [model(whole)]) < 1e-5


def test_all_batches_are_watched():
    model = function(lambda m, x: m.first(m.norm(x)) if len(x) < 3 else m.second(m.norm(x) + 1))
    batches = [rows(2, 8), rows(4, 8)]
    assert find_scaling_groups(model, batches).groups == ()


def test_modes_hooks_and_threads_of_an_interrupted_forward():
    def interrupted(m, x):
        m.first(m.norm(x))
        raise KeyboardInterrupt

    model = function(interrupted)
    model.train()
    with pytest.raises(KeyboardInterrupt):
        find_scaling_groups(model, [rows(2, 8)])
    assert model.training
    assert torch.overrides._get_current_function_mode_stack() == []


def test_factors_must_fit():
    model = filled(Block())
    groups = find_scaling_groups(model, [rows(2, 5, 16)]).groups
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"shape \[16\] of the group's columns, got \[3\]"):
        fold(model, groups[0], torch.ones(3))
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            fold(model, groups[0], torch.full((16,), value))
    with pytest.raises(ValueError, match="equal for columns that read the same channel"):
        fold(model, groups[1], torch.arange(1.0, 17.0))
    shared = groups[1].largest(torch.arange(1.0, 17.0))
    fold(model, groups[1], shared).restore()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_powers_of_two_keep_every_bit():
    model = filled(Block())
    x = rows(2, 5, 16)
    expected = model(x)
    for group in find_scaling_groups(model, [x]).groups:
        powers = torch.arange(group.count) % 5 - 2
        fold(model, group, torch.exp2(powers.float())[group.channels])
    assert torch.equal(model(x), expected)


def test_a_failure_in_the_middle_of_a_fold_changes_nothing(monkeypatch):
    model = filled(Block())
    group = find_scaling_groups(model, [rows(2, 5, 16)]).groups[0]
    before = copy.deepcopy(model.state_dict())
    copied = []

    def copy_(self, other):
        copied.append(self)
        if len(copied) == 3:
            raise KeyboardInterrupt
        return original(self, other)

    original = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    with pytest.raises(KeyboardInterrupt):
        fold(model, group, torch.full((16,), 3.0))
    monkeypatch.undo()
    assert len(copied) > 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_differences_of_outputs():
    one = torch.tensor([1.0, -4.0])
    nan = torch.tensor([float("nan"), 1.0])
    assert output_difference([one], [one + 1]) == 0.25
    assert output_difference([nan], [nan]) == 0
    assert output_difference([one], [nan]) == float("inf")
    assert output_difference([one], []) == float("inf")
    assert output_difference([torch.tensor([1])], [torch.tensor([2])]) == float("inf")
    assert output_difference([torch.zeros(2)], [torch.ones(2)]) == float("inf")
    assert output_difference([one, one * 100], [one, one * 100 + 1]) == 0.0025


def test_a_parameter_whose_shape_alone_is_read_is_not_reached():
    def forward(m, x):
        return m.first(m.norm(x).to(m.second.weight.dtype)[:, : m.second.weight.shape[0]])

    groups, reasons = found(function(forward), rows(5, 8))
    assert groups == []
    assert reasons["first"] == "it reads norm, and no batch reached second, which may read it"
    assert reasons["second"] == "no batch reached it"
