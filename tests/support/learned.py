"""The learned quantizers by name, and their gradients."""

from collections.abc import Callable

from torch import Tensor, nn

from torchquant import LSQPlusQuantizer, LSQQuantizer, PACTQuantizer

QUANTIZERS: dict[str, Callable[[], nn.Module]] = {
    "lsq": lambda: LSQQuantizer(4),
    "lsq_unsigned": lambda: LSQQuantizer(3, signed=False),
    "lsq_channels": lambda: LSQQuantizer(2, True, True, 4),
    "lsq_plus": lambda: LSQPlusQuantizer(4),
    "lsq_plus_channels": lambda: LSQPlusQuantizer(3, True, 8, axis=-1),
    "pact": lambda: PACTQuantizer(4, alpha=2.0),
}
LSQ = {name: make for name, make in QUANTIZERS.items() if name != "pact"}


def gradients(module: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The gradients of the input ("input") and of every parameter, by name."""
    module.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    module(leaf).backward(upstream)
    assert leaf.grad is not None
    result = {"input": leaf.grad}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        result[name] = parameter.grad.clone()
    return result
