"""Batches that take another path than the first one count as well."""

import pytest
import torch
from torch import nn

import torchquant
from torchquant.algorithms.two_models import TwoModels


class Sometimes(nn.Module):
    """Some batches reach a layer twice, and another layer at all."""

    def __init__(self):
        super().__init__()
        self.fc, self.rare = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, again=False):
        x = torch.relu(self.fc(x))
        if again:
            x = self.rare(self.fc(x))
        return x


def run(model, batch):
    return model(*batch)


@pytest.fixture
def prepared():
    torch.manual_seed(0)
    model = Sometimes().eval()
    batches = [(torch.randn(32, 64), again) for again in (False, True)]
    torchquant.prepare_(model)
    torchquant.calibrate(model, batches, forward=run)
    return model, batches


def test_all_calls_of_all_batches_are_seen(prepared):
    models = TwoModels("verb", *prepared, None, run)
    assert models.order == ["fc", "rare"] and models.left == []
    assert [len(list(models.inputs(name))) for name in models.order] == [3, 1]


@pytest.mark.parametrize("verb", ["correct_bias_", "adaround_"])
def test_layers_that_the_first_batch_does_not_reach(verb, prepared):
    model, batches = prepared
    options = {"iterations": 10} if verb == "adaround_" else {}
    report = getattr(torchquant, verb)(model, batches, forward=run, **options)
    assert [row.action for row in report] == [
        "corrected" if verb == "correct_bias_" else "rounded"
    ] * 2


def test_quantized_values_that_take_another_path_are_an_error(prepared):
    model, batches = prepared
    count = [0]

    def differs(net, batch):
        count[0] += 1
        return net(batch[0], again=count[0] % 2 == 0)

    models = TwoModels("verb", model, batches, None, differs)
    with pytest.raises(ValueError, match=r"verb: model must call its layers in the same way"):
        list(models.inputs("fc"))
