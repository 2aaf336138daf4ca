"""Which results of a record may share memory with others, and which are no tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torchquant.graph.trace import Call, Trace

# Functions and methods whose result is always new memory.
_FRESH = frozenset(
    (
        *("add", "sub", "mul", "div", "truediv", "true_divide", "divide", "multiply", "subtract"),
        *("floordiv", "floor_divide", "mod", "fmod", "remainder", "pow", "rsub", "neg", "negative"),
        *("matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "bilinear", "outer", "dot"),
        *("addcmul", "addcdiv", "lerp", "maximum", "minimum", "fmax", "fmin", "where", "hypot"),
        *("abs", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt"),
        *("square", "reciprocal", "sign", "sin", "cos", "tan", "erf", "floor", "ceil", "round"),
        *("clamp", "clamp_min", "clamp_max", "clip", "nan_to_num", "masked_fill", "logit"),
        *("relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "mish", "hardswish", "hardtanh"),
        *("hardsigmoid", "leaky_relu", "rrelu", "prelu", "sigmoid", "logsigmoid", "tanh", "glu"),
        *("softplus", "softsign", "softmin", "softmax", "log_softmax", "threshold", "_threshold"),
        *("hardshrink", "softshrink", "tanhshrink", "gumbel_softmax", "normalize"),
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"),
        *("local_response_norm", "scaled_dot_product_attention", "embedding"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("max_pool1d_with_indices", "max_pool2d_with_indices", "lp_pool1d", "lp_pool2d"),
        *("interpolate", "upsample", "pad"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "repeat", "tile", "clone"),
        *("flip", "roll", "gather", "index_select", "one_hot", "cumsum", "cumprod", "grid_sample"),
        *("mean", "sum", "prod", "max", "min", "amax", "amin", "var", "std", "norm", "logsumexp"),
        *("argmax", "argmin", "topk", "sort", "argsort", "any", "all", "count_nonzero"),
        *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"),
        *("isnan", "isinf", "isfinite", "zeros_like", "ones_like", "full_like", "empty_like"),
        *("rand_like", "randn_like", "new_zeros", "new_ones", "new_full", "new_empty", "bernoulli"),
    )
)
DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
# Modules of torch.nn whose result may be their argument, or a view of it.
_VIEWS = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.ChannelShuffle, nn.Fold, nn.Unfold, *DROPOUTS),
)
_SIZES = ("size", "dim", "ndimension", "numel", "nelement", "stride", "item", "tolist")
_SIZE_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda")
_ARITHMETIC = frozenset(
    (
        *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "pos"),
        *("iadd", "isub", "imul", "ifloordiv", "itruediv", "imod", "ipow", "abs"),
        *("eq", "ne", "lt", "le", "gt", "ge", "floor", "ceil", "sqrt", "log", "log2", "exp"),
    )
)


def name_of(call: Call) -> str:
    """The name of a function or a method without its module.

    Example:
        >>> name_of(Call("function", "torch.nn.functional:relu"))
        'relu'
    """
    name = call.target.rpartition(":")[2] if call.kind == "function" else call.target
    return name.rpartition(".")[2]


def numbers(trace: Trace) -> frozenset[int]:
    """The calls whose results are numbers or tuples of numbers, such as sizes, and no tensors.

    Example:
        >>> from torchquant.graph.trace import Ref
        >>> size = Call("method", "size", (Ref(0), 0))
        >>> record = Trace((Call("input", "x"), size), Ref(1), ("x",), {}, ())
        >>> numbers(record)
        frozenset({1})
    """
    found: set[int] = set()
    for index, call in enumerate(trace.calls):
        name = name_of(call)
        if call.kind == "method":
            number = name in _SIZES
        elif name == "getattr":
            number = call.args[1] in _SIZE_ATTRIBUTES
        else:
            number = bool(call.reads()) and found.issuperset(call.reads())
            number = number and call.kind == "function" and name in _ARITHMETIC
        if number:
            found.add(index)
    return frozenset(found)


def shared(
    call: Call, module: nn.Module | None, results: Sequence[frozenset[int]]
) -> frozenset[int]:
    """The results with which the result of a call may share memory.

    Args:
        call: the call.
        module: the module that it calls, or None.
        results: the same for the calls before, with the call itself.

    Example:
        >>> from torchquant.graph.trace import Ref
        >>> shared(Call("method", "view", (Ref(0), -1)), None, [frozenset({0})])
        frozenset({0})
    """
    fresh = name_of(call) in _FRESH if module is None else not isinstance(module, _VIEWS)
    if fresh:
        return frozenset()
    return frozenset().union(*(results[read] for read in call.reads()))
