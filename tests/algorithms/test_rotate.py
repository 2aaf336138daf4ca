"""rotate_: the matrices, the streams that are rotated, and those that are left."""

import copy

import pytest
import torch
from support.fold_models import Block, Decoder, Experts, GainNorm, filled, rows, tokens
from torch import nn
from torch.nn import functional as F

import torchquant
from torchquant import rotate_
from torchquant.algorithms import find_streams, hadamard, output_difference, rotation_matrix
from torchquant.algorithms import rotation as rotation_file


def state(model):
    return copy.deepcopy(model.state_dict())


def same(model, before):
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# The matrices


@pytest.mark.parametrize("size", [1, 2, 6, 8, 12, 15])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("keeps_ones", [False, True])
def test_matrices_are_orthogonal(size, kind, keeps_ones):
    matrix = rotation_matrix(size, kind, 3, keeps_ones=keeps_ones)
    eye = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, eye, atol=1e-13)
    if keeps_ones:
        ones = torch.ones(size, dtype=torch.float64)
        assert torch.allclose(ones @ matrix, ones, atol=1e-13)
        assert torch.allclose(matrix @ ones, ones, atol=1e-13)


def test_matrices_follow_from_the_seed_and_spread_channels():
    one, other = rotation_matrix(64, seed=1), rotation_matrix(64, seed=2)
    assert torch.equal(one, rotation_matrix(64, seed=1))
    assert not torch.equal(one, other)
    assert torch.allclose(one.abs(), torch.full((64, 64), 0.125, dtype=torch.float64))
    assert rotation_matrix(576).abs().max() < 0.125 + 1e-12
    assert rotation_matrix(64, keeps_ones=True).abs().max() < 0.6


def test_random_rotations_are_uniformly_distributed():
    """QR alone gives matrices whose first element is never positive."""
    firsts = [float(rotation_matrix(3, "random", seed)[0, 0]) for seed in range(60)]
    assert 15 < sum(first > 0 for first in firsts) < 45


@pytest.mark.parametrize("size", [0, 3, 12])
def test_hadamard_matrices_have_powers_of_two(size):
    with pytest.raises(ValueError, match=f"size must be a power of two, got {size}"):
        hadamard(size)


def test_matrices_refuse():
    with pytest.raises(ValueError, match="kind must be"):
        rotation_matrix(4, "other")
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        rotation_matrix(0)


# Streams that are rotated


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm, nn.RMSNorm, GainNorm, lambda width: GainNorm(width, 1.0)],
    ids=["layer", "rms", "written", "offset"],
)
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_computes_the_same_on_other_batches(norm, kind, tied):
    model = filled(Decoder(norm, tied, positions=True))
    other = tokens(3, 7, seed=5)
    expected, embedding = model(other), model.embedding.weight.clone()
    report = rotate_(model, tokens(2, 9), kind=kind)
    assert output_difference([expected], [model(other)]) < 5e-6
    assert report.streams == ("embedding",)
    assert not torch.allclose(model.embedding.weight, embedding)
    assert {row.action for row in report} == {"rotated", "folded"}
    assert report["blocks.0.attention.q"].reason == "reads embedding"
    assert report["blocks.1.mlp.down"].reason == "writes embedding"
    assert report["norm"].action == "folded"
    assert (model.head.weight is model.embedding.weight) is False
    shared = "head.weight no longer shares the values of embedding.weight."
    assert (shared in report.notes) == tied


def test_an_outlier_channel_disappears():
    model = filled(Decoder())
    with torch.no_grad():
        model.embedding.weight[:, 3] += 50
    before = model.embedding.weight.abs().amax(0)
    rotate_(model, tokens(2, 9))
    after = model.embedding.weight.abs().amax(0)
    assert before.max() > 15 * before.median() and after.max() < 3 * after.median()


def test_gains_of_one_keep_a_shared_weight():
    """Embedding and head change in the same way, so they stay one parameter."""
    model = Decoder(nn.RMSNorm, tied=True).eval()
    expected = model(tokens(2, 9))
    report = rotate_(model, tokens(2, 9))
    assert report.notes == ("head.weight no longer shares the values of embedding.weight.",)
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 9, bias=False)).eval()
    model[1].weight = model[0].weight
    expected = model(torch.arange(9))
    report = rotate_(model, torch.arange(9))
    assert model[1].weight is model[0].weight
    assert report.notes == ()
    assert output_difference([expected], [model(torch.arange(9))]) < 5e-6


def test_biases_of_norms_move_into_later_biases():
    model = filled(Decoder(nn.LayerNorm))
    rotate_(model, tokens(2, 9))
    assert not model.blocks[0].norm1.bias.any()
    assert model.norm.bias.any()  # the head has no bias
    assert torch.equal(model.norm.weight, torch.ones(16))


def test_a_gain_of_zero_before_a_layer_without_a_bias():
    model = filled(Decoder(nn.LayerNorm))
    with torch.no_grad():
        model.norm.weight[2] = 0
    before = state(model)
    report = rotate_(model, tokens(2, 9))
    assert report.streams == () and same(model, before)
    expected = "the bias of norm cannot be moved, because its gain has zeros"
    assert report["head"].reason == f"embedding: {expected}"
    model.norm.bias.data.zero_()


def test_gains_of_zero_move_where_biases_follow():
    model = filled(Decoder(nn.LayerNorm))
    with torch.no_grad():
        model.blocks[0].norm1.weight[2] = 0
        model.blocks[0].norm1.weight[3] = -1
    expected = model(tokens(2, 9))
    assert rotate_(model, tokens(2, 9)).streams == ("embedding",)
    assert output_difference([expected], [model(tokens(2, 9))]) < 5e-6


def test_rows_of_zeros_and_experts():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.experts = nn.Linear(4, 16), Experts(modules=False)
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.norm(self.experts(self.first(x))))

    model = filled(Routed())
    x = rows(40, 4, seed=3)
    expected = model(x)
    report = rotate_(model, [rows(2, 4)])
    assert report.streams == ("first",)
    assert report["experts"].reason == "reads and writes first"
    assert output_difference([expected], [model(x)]) < 5e-6


def test_a_reader_without_rows_keeps_the_stream_as_it_is():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(4, 16), nn.LayerNorm(16)
            self.heads = nn.ModuleList(nn.Linear(16, 3) for _ in range(2))

        def forward(self, x):
            normed, chosen = self.norm(self.first(x)), x[:, 0] > 0
            return torch.cat([h(normed[chosen == bool(i)]) for i, h in enumerate(self.heads)])

    model = filled(Heads())
    x = rows(40, 4, seed=3)
    expected = model(x)
    assert rotate_(model, [x.abs()]).streams == ()
    assert output_difference([expected], [model(x)]) < 5e-6
    assert rotate_(model, [x.abs(), -x.abs()]).streams == ("first",)
    assert output_difference([expected], [model(x)]) < 5e-6


def test_patches_and_a_token_that_is_a_parameter():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 4, stride=4)
            self.token = nn.Parameter(torch.randn(1, 1, 16))
            self.positions = nn.Parameter(torch.randn(1, 5, 16))
            self.block, self.norm, self.head = (
                Block(nn.LayerNorm),
                nn.LayerNorm(16),
                nn.Linear(16, 3),
            )

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
            return self.head(self.norm(self.block(x)[:, 0]))

    model = filled(Patches())
    x = rows(2, 3, 8, 8)
    expected, token = model(x), model.token.clone()
    report = rotate_(model, [x])
    assert report.streams == ("patch",)
    assert report["patch"].reason == "writes patch"
    assert not torch.allclose(model.token, token)
    assert output_difference([expected], [model(x)]) < 5e-6


# Streams that are left


class Stream(nn.Module):
    """An embedding and a head, with a function of the test between."""

    def __init__(self, between):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 8), nn.Linear(8, 5)
        if "norm" in between.__code__.co_names:
            self.norm = nn.RMSNorm(8)
        if "fc" in between.__code__.co_names:
            self.fc = nn.Linear(8, 8)
        self.between = between

    def forward(self, x):
        return self.between(self, self.embedding(x))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda m, x: m.head(F.gelu(x)), "embedding: gelu reads it"),
        (lambda m, x: (x, m.head(x)), "embedding: the model returns it"),
        (lambda m, x: m.head(x * torch.arange(8.0)), "embedding: mul reads it"),
        (lambda m, x: m.head(x + torch.arange(8.0)), "it is added to a value that no layer writes"),
        (lambda m, x: m.head(x[..., 1:3].repeat(1, 1, 4)), "in another order"),
        (lambda m, x: m.head(x.flip(-1)), "in another order"),
        (lambda m, x: m.head(x * x), "linear reads the squares"),
        (lambda m, x: m.head(x) * x.pow(2).amax(-1, keepdim=True), "amax reads the squares"),
        (lambda m, x: m.head(x) * x.pow(3).mean(-1, keepdim=True), "pow reads it"),
        (lambda m, x: m.head(x) * x.abs().mean(-1, keepdim=True), "abs reads it"),
        (lambda m, x: m.head(x) * x.norm(p=1, dim=-1, keepdim=True), "norm reads it"),
        (lambda m, x: m.head(x) * torch.linalg.vector_norm(x, ord=1, dim=-1)[..., None], "norm"),
        (lambda m, x: m.head(m.norm(x) + x), "a norm's result is added to another value"),
        (lambda m, x: m.head(m.norm(m.norm(x))), "rms_norm reads it"),
        (lambda m, x: m.head(m.norm(x)) * m.norm(x).square().mean(), "square reads it"),
        (lambda m, x: m.head(m.norm(x) + 1.0), "it is added to a value that no layer writes"),
        (lambda m, x: m.head(m.fc(x)) + m.head(x), "reads other values in another call"),
        (lambda m, x: m.head(m.norm(x)) + m.head(x), "reads other values in another call"),
        (lambda m, x: m.head(x) + m.embedding.weight.mean(), "mean reads it"),
        (lambda m, x: m.head(x) + m.head.weight.mean(), "mean reads it"),
        (lambda m, x: m.head(x.unflatten(-1, (2, 4)).softmax(-1).flatten(-2)), "softmax reads it"),
        (lambda m, x: m.head(torch.cat([x, x], -1)[..., :8]), "cat reads it"),
        (lambda m, x: m.head(torch.where(x > 0, x, x)), "gt reads it"),
        (lambda m, x: m.head(x.masked_fill(torch.arange(8) > 4, 0.0)), "masked_fill reads it"),
        (lambda m, x: m.head(x + m.norm.weight.exp()), "it is added to a value that no layer"),
        (lambda m, x: m.head(x.clamp(-1, 1)), "clamp reads it"),
        (
            lambda m, x: m.head(x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)),
            "another order",
        ),
    ],
)
def test_what_breaks_a_stream(between, reason):
    model = filled(Stream(between))
    before = state(model)
    report = rotate_(model, tokens(2, 6))
    assert "embedding" not in report.streams
    assert same(model, before) or report.streams
    assert reason in str(find_streams(model, [tokens(2, 6)]).reasons), report


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: m.head(m.norm(x) * 3.0),
        lambda m, x: m.head(m.norm(x * 8**0.5)),
        lambda m, x: m.head(m.norm(x) * x.new_ones(2, 1, 1)),
        lambda m, x: m.head((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)),
        lambda m, x: m.head(F.layer_norm(x, (8,))),
        lambda m, x: m.head(F.normalize(x, dim=-1)),
        lambda m, x: m.head(x / x.norm(dim=-1, keepdim=True)),
        lambda m, x: m.head(m.norm((x + m.fc(m.norm(x))).mean(1))),
        lambda m, x: m.head(m.norm(torch.cat([x[:, :2], x[:, 2:]], 1))),
        lambda m, x: m.head(m.norm(torch.where(x.new_ones(2, 6, 1) > 0, x, x.flip(1)))),
        lambda m, x: m.head(m.norm(x.masked_fill(torch.arange(6)[:, None] > 3, 0.0))),
        lambda m, x: m.head(m.norm(x.new_ones(2, 6, 6).softmax(-1) @ x)),
        lambda m, x: m.head(m.norm(torch.zeros_like(x).index_add(1, torch.arange(6), x))),
        lambda m, x: m.head(m.norm(x + 2.0)),
        lambda m, x: m.head(x) + m.fc(m.norm(x))[..., :5],
    ],
)
def test_what_a_rotation_passes(between):
    model = filled(Stream(between))
    expected = model(tokens(2, 6))
    report = rotate_(model, tokens(2, 6))
    assert "embedding" in report.streams, find_streams(model, [tokens(2, 6)]).reasons
    assert output_difference([expected], [model(tokens(2, 6))]) < 5e-6


def test_norms_after_additions_are_left():
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
            self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            x = self.norm(self.embedding(x))
            return self.head(x + self.fc(x))

    model = filled(PostNorm())
    before = state(model)
    report = rotate_(model, tokens(2, 6))
    assert report.summary().startswith("0 streams rotated: 0 modules, 2 linear layers left;")
    assert "norm" in report["fc"].reason and same(model, before)


def test_a_stream_that_the_check_refuses_is_left():
    def hidden(m, x):
        with torch._C.DisableTorchFunction():
            seen = torch.from_numpy(x.numpy().copy()).max()
        return m.head(m.norm(x)) * seen + m.fc(m.norm(x))[..., :5]

    with torch.no_grad():
        model = filled(Stream(hidden))
        before = state(model)
        report = rotate_(model, tokens(2, 6))
    assert report.streams == () and same(model, before)
    assert report["head"].reason.startswith("the outputs of the model would change by")
    assert report.difference == 0


def test_a_layer_that_no_batch_reached_may_read_the_stream():
    model = filled(Decoder())
    model.extra = nn.Linear(16, 2)
    report = rotate_(model, tokens(2, 6))
    assert report.streams == ()
    assert report["head"].reason == "embedding: no batch reached extra, which may read it"


def test_a_constant_sinusoid_is_left():
    model = filled(Stream(lambda m, x: m.head(m.norm(x + m.table))))
    model.register_buffer("table", rows(6, 8))
    assert rotate_(model, tokens(2, 6))["head"].reason == "no stream reaches it beyond add"
    reasons = find_streams(model, [tokens(2, 6)]).reasons
    assert reasons["embedding"] == "embedding: it is added to a value that no layer writes"


# The verb


def test_bad_input_changes_nothing():
    model = filled(Decoder())
    before = state(model)
    with pytest.raises(TypeError, match=r"rotate_: model must be an nn\.Module, got str"):
        rotate_("model", tokens(1, 3))
    with pytest.raises(ValueError, match='kind must be "hadamard" or "random", got \'other\''):
        rotate_(model, tokens(1, 3), kind="other")
    with pytest.raises(ValueError, match="loader must have batches"):
        rotate_(model, [])
    with pytest.raises(ValueError, match="model must hold float linear layers, got none"):
        rotate_(nn.ReLU(), tokens(1, 3))
    assert same(model, before)


def test_an_interruption_restores_everything(monkeypatch):
    model = filled(Decoder(nn.LayerNorm, tied=True)).train()
    before, weight = state(model), model.head.weight
    model.config = type("Config", (), {"tie_word_embeddings": True})()
    calls = []

    def interrupted(self, parameter, values):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        write(self, parameter, values)

    write = rotation_file.Rotation._write
    monkeypatch.setattr(rotation_file.Rotation, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rotate_(model, tokens(2, 9))
    assert same(model, before) and model.training
    assert model.head.weight is weight and model.embedding.weight is weight
    assert model.config.tie_word_embeddings is True
    monkeypatch.undo()
    rotate_(model, tokens(2, 9))
    assert model.config.tie_word_embeddings is False and not same(model, before)


def test_a_failing_comparison_restores_the_streams_before(monkeypatch):
    model = filled(Decoder())
    before = state(model)
    outputs, calls = torchquant.algorithms.rotate.outputs_of, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return outputs(*args, **kwargs)

    monkeypatch.setattr(torchquant.algorithms.rotate, "outputs_of", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        rotate_(model, tokens(2, 9))
    assert same(model, before)


def test_bfloat16_models_are_compared_with_their_own_precision():
    model = filled(Decoder()).bfloat16()
    report = rotate_(model, tokens(2, 9))
    assert report.streams == ("embedding",)
    assert report.notes == ("The outputs of models of this data type may change by 6.2e-02.",)


def test_a_parameter_of_fewer_bits_elsewhere_allows_no_greater_change(monkeypatch):
    model = filled(Decoder())
    model.unused = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    before = state(model)
    outputs, calls = torchquant.algorithms.rotate.outputs_of, []

    def changed(*args, **kwargs):
        calls.append(1)
        return [one * (1 if len(calls) == 1 else 1.01) for one in outputs(*args, **kwargs)]

    monkeypatch.setattr(torchquant.algorithms.rotate, "outputs_of", changed)
    report = rotate_(model, tokens(2, 9))
    assert report.streams == () and report.notes == () and same(model, before)


def test_the_report_of_a_module_that_two_streams_pass():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(30, 16), nn.RMSNorm(16)
            self.down, self.up = nn.Linear(16, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.up(self.down(self.norm(self.embedding(x))))

    report = rotate_(filled(Two()), tokens(2, 6))
    assert report.streams == ("embedding", "down")
    assert report["down"].reason == "reads embedding, writes down"
