"""Which modules compute what ``nn.Linear`` computes, although they are of another class.

transformers' Conv1D and FalconLinear are such modules. They are recognised by what they compute,
not by their names: a copy of the module with other values runs on a few rows, and its outputs and
gradients are compared with those of ``F.linear``. A module with further parameters, buffers,
children, state or arguments is refused without being run.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from torchquant.graph.purity import may_run

_PLAIN = (int, float, str, type(None), torch.dtype, torch.device)
_ERROR = 1e-5  # of a float32 result, divided by the sum of the absolute products
_LOW_PRECISION_ERROR = 2e-2  # of a bfloat16 result
_PLAIN_FORM, _TRANSPOSED, _OTHER = "plain", "transposed", "other"
_NOTES = "_torchquant_"  # begins the names of attributes in which verbs keep what they found
_known: dict[Hashable, str] = {}


def other_class(module: nn.Module) -> str | None:
    """The reason why a module that is not exactly an ``nn.Linear`` does not count as one, or None.

    Example:
        >>> class Doubled(nn.Linear):
        ...     def forward(self, input):
        ...         return 2 * super().forward(input)
        >>> other_class(Doubled(4, 4)), other_class(nn.Linear(4, 4))
        ('it does not compute x @ weight.T + bias', None)
    """
    if type(module) is nn.Linear:
        return None
    reason = _structure(module)
    if reason is None and _form(module) == _OTHER:
        return "it does not compute x @ weight.T + bias"
    return reason


def is_transposed(module: nn.Module) -> bool:
    """True if a module computes a linear layer whose weight is ``[inputs, outputs]``.

    Example:
        >>> is_transposed(nn.Linear(4, 2))
        False
    """
    if type(module) is nn.Linear or _structure(module) is not None:
        return False
    return _form(module) == _TRANSPOSED


def _structure(module: nn.Module) -> str | None:
    """The reason why the structure of a module rules it out, or None."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if any(is_lazy(parameter) for parameter in (weight, bias) if parameter is not None):
        return "its parameters have no values yet"
    if weight is None or weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        return "it has no weight of two dimensions"
    if "bias" not in module._parameters:
        return "it has no parameter with the name bias, not even None"
    further = [name for name in module._parameters if name not in ("weight", "bias")]
    further += [*module._buffers, *module._modules]
    further += [name for name, value in _attributes(module) if not _is_plain(value)]
    if further:
        return f"it has more than weight and bias: {', '.join(further)}"
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__:
        return "its class defines __call__"
    try:
        arguments = list(inspect.signature(kind.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return "its forward has no signature"
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(arguments) != 1 or arguments[0].kind not in positional:
        plain = [argument.replace(annotation=inspect.Parameter.empty) for argument in arguments]
        names = ", ".join(map(str, plain))
        return f"its forward takes ({names}) instead of one tensor"
    if not may_run(module):
        return "its forward may do more than compute"
    return None


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of the class and of users, without the notes of verbs."""
    own = nn.Module().__dict__
    return [
        (name, value)
        for name, value in module.__dict__.items()
        if name not in own and not name.startswith(_NOTES)
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _form(module: nn.Module) -> str:
    """What a module of suitable structure computes, from a run that is done once per structure."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    key = (type(module), tuple(weight.shape), bias is None, repr(_attributes(module)))
    if key not in _known:
        try:
            with (
                torch.device("cpu"),
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.random.fork_rng(devices=[]),
                torch.autocast("cpu", enabled=False),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                _known[key] = _probed(module)
        except Exception:  # it is no function of one tensor
            _known[key] = _OTHER
    return _known[key]


def _probed(module: nn.Module) -> str:
    weight = module._parameters["weight"]
    assert weight is not None
    generator = torch.Generator("cpu").manual_seed(0)
    rows, columns = weight.shape
    drawn = torch.randn(2 * rows + columns, generator=generator, dtype=torch.float32)
    # Few values make a weight of any size, and the weight is not symmetric.
    values = drawn.as_strided((rows, columns), (2, 1)).contiguous()
    for form in (_PLAIN_FORM, _TRANSPOSED):
        try:
            if _has_form(module, form, values, generator):
                return form
        except Exception:  # the shapes of the other form
            continue
    return _OTHER


def _has_form(module: nn.Module, form: str, weight: Tensor, generator: torch.Generator) -> bool:
    matrix = weight if form == _PLAIN_FORM else weight.t()
    outputs, inputs = matrix.shape
    terms = torch.randn(outputs, generator=generator, dtype=torch.float32)
    bias = None if module._parameters["bias"] is None else terms
    copy = _with_values(module, weight, bias)
    x = torch.randn(2, 2, inputs, generator=generator, dtype=torch.float32)
    if not _agrees(copy, x[0], matrix, bias):
        return False
    return all(
        _agrees(copy.train(training), rows, matrix, bias)
        for training in (False, True)
        for rows in (x, x[0, 0], x[0, :0], x.bfloat16())
    )


def _with_values(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of a module with other parameters; the module itself does not change."""
    copy = type(module).__new__(type(module))
    nn.Module.__init__(copy)
    copy.__dict__.update(_attributes(module))
    copy.register_parameter("weight", nn.Parameter(weight))
    copy.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return copy


def _agrees(module: nn.Module, x: Tensor, matrix: Tensor, bias: Tensor | None) -> bool:
    """True if a module computes F.linear with these parameters, and its gradients."""
    error = _ERROR
    if x.dtype != torch.float32:
        error, matrix = _LOW_PRECISION_ERROR, matrix.to(x.dtype).float()
        bias = None if bias is None else bias.to(x.dtype).float()
        low = [p.detach().to(x.dtype) for p in module.parameters()]
        module = _with_values(module, low[0], None if bias is None else low[1])
    own = x.clone().requires_grad_()
    got = module(own)
    wanted = F.linear(x.float(), matrix, bias)
    bound = F.linear(x.float().abs(), matrix.abs(), None if bias is None else bias.abs())
    if type(got) is not Tensor or got.dtype != x.dtype or got.shape != wanted.shape:
        return False
    if not bool(((got.detach().float() - wanted).abs() <= error * (bound + 1)).all()):
        return False
    parameters = list(module.parameters())
    if not got.requires_grad:
        return False
    gradients = torch.autograd.grad(got.float().sum(), [own, *parameters], allow_unused=True)
    if any(gradient is None for gradient in gradients):
        return False
    rough = matrix.sum(0).expand(x.shape)
    allowed = error * (matrix.abs().sum(0) + 1)
    return bool(((gradients[0].float() - rough).abs() <= allowed).all())


__all__ = ["is_transposed", "other_class"]
