"""Calls of a record that draw random numbers."""

from __future__ import annotations

from torchquant.graph.sharing import name_of
from torchquant.graph.trace import Call, Ref

_ALWAYS = frozenset(
    (
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
        *("bernoulli", "normal", "multinomial", "poisson", "binomial", "gumbel_softmax"),
        *("bernoulli_", "normal_", "uniform_", "exponential_", "geometric_", "random_"),
        *("cauchy_", "log_normal_", "fractional_max_pool2d", "fractional_max_pool3d"),
    )
)
_DROPOUTS = ("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d")
# Functions that are random if an argument says so: its place, its name and its default.
_IN_TRAINING: dict[str, tuple[int, str, object]] = {
    **dict.fromkeys(
        ("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d"), (2, "training", True)
    ),
    "alpha_dropout": (2, "training", False),
    "feature_alpha_dropout": (2, "training", False),
    "rrelu": (3, "training", False),
    "rrelu_": (3, "training", False),
    "scaled_dot_product_attention": (4, "dropout_p", 0.0),
}


def is_random(call: Call) -> bool:
    """True if a function or a method draws random numbers, or may do so.

    Example:
        >>> [is_random(Call("function", "torch.nn.functional:dropout", (Ref(0), 0.1, training)))
        ...  for training in (True, False)]
        [True, False]
    """
    if call.kind not in ("function", "method"):
        return False
    name = name_of(call)
    if name not in _IN_TRAINING:
        return name in _ALWAYS
    place, key, default = _IN_TRAINING[name]
    given = call.args[place] if place < len(call.args) else call.kwargs.get(key, default)
    return isinstance(given, Ref) or bool(given)
