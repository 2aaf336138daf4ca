"""parameter_groups: which parameters get weight decay."""

import torch
from torch import nn

from torchquant import LSQPlusQuantizer, LSQQuantizer, PACTQuantizer, parameter_groups


def test_parameter_groups() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "linear": shared,
            "again": shared,
            "norm": nn.LayerNorm((4, 4)),
            "embedding": nn.Embedding(3, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "weights": LSQQuantizer(4, True, True, 4),
            "inputs": LSQPlusQuantizer(4),
            "pact": PACTQuantizer(4),
            "prelu": nn.PReLU(),
        }
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert [names[id(p)] for p in decayed["params"]] == ["linear.weight", "embedding.weight"]
    assert [names[id(p)] for p in others["params"]] == [
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "weights.step",
        "inputs.step",
        "inputs.offset",
        "pact.alpha",
        "prelu.weight",
    ]
    torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)
