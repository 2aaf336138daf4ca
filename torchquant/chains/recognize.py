"""Recognises what the calls of a recorded forward compute.

Sizes are needed to tell, for example, a flattening from another change of shape; they are those of
the first batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from torchquant.chains.arguments import arguments_of
from torchquant.chains.operations import (
    Activate,
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    Add,
    AvgPool,
    Concat,
    Crop,
    Flatten,
    Layer,
    MaxPool,
    Mul,
    Operation,
    Other,
    Pad,
    PixelShuffle,
    Same,
    Shape,
    Upsample,
)
from torchquant.chains.steps import Pair
from torchquant.functional import ACTIVATIONS
from torchquant.graph.trace import Call, Ref, Trace
from torchquant.nn.kinds import weight_shape


def operation_of(
    call: Call,
    module: nn.Module | None,
    layer: str | None,
    shapes: Sequence[Shape],
    shape: Shape,
) -> Operation:
    """What a call computes.

    Args:
        call: the call.
        module: the module that it calls, or None.
        layer: the name of the kind if the module is a layer with static activations, or None.
        shapes: the shapes of the results of all calls before.
        shape: the shape of this call's result.

    Example:
        >>> call = Call("module", "1", (Ref(0),))
        >>> operation_of(call, nn.ReLU(), None, [(1, 4)], (1, 4))
        Activate(function='relu')
    """
    if call.kind == "input":
        return Other("an input of the region", quiet=True)
    if call.kind == "tensor":
        return Other(f"the tensor {call.target}", quiet=True)
    if layer is not None:
        plain = len(call.args) == 1 and isinstance(call.args[0], Ref) and not call.kwargs
        if not plain or module is None:
            return Other("a call with options")
        return Layer(call.target, layer == "linear", len(weight_shape(module)))
    name, arguments = arguments_of(call, module)
    reads = [shapes[index] for index in call.reads()]
    if arguments is None or shape is None or not reads or reads[0] is None:
        return Other(_words(call, module), quiet=shape is None)
    found = _KNOWN[name](arguments, reads, shape) if name in _KNOWN else None
    if found is not None:
        return found
    moves = name in MOVING and shape is not None
    return Other(_words(call, module), moves=moves, quiet=shape is None)


def depends_on_sizes(index: int, trace: Trace) -> bool:
    """True if a call may compute something else for a batch with other sizes.

    ``x.squeeze()`` flattens the means of several images; those of one image lose the dimension of
    the batch as well. ``x.view(x.size(0), -1)`` always flattens.

    Example:
        >>> calls = Call("input", "x"), Call("method", "squeeze", (Ref(0),))
        >>> depends_on_sizes(1, Trace(calls, Ref(1), ("x",), {}, ()))
        True
    """
    call = trace.calls[index]
    if call.kind not in ("function", "method"):
        return False
    name, arguments = arguments_of(call, None)
    if name not in ("view", "reshape", "squeeze"):
        return False
    wanted = (arguments or {}).get("shape", ())
    if len(wanted) != 2 or not isinstance(wanted[0], Ref) or wanted[1] != -1:
        return True
    return not _is_batch_of(call.args[0], wanted[0], trace)


def _is_batch_of(value: Any, size: Ref, trace: Trace) -> bool:
    """True if a number is ``value.size(0)`` or ``value.shape[0]``."""
    call = trace.calls[size.index]
    if call.kind == "method" and call.target == "size":
        return call.args == (value, 0)
    if call.target != "operator:getitem" or call.args[1] != 0:
        return False
    whole = trace.calls[call.args[0].index] if isinstance(call.args[0], Ref) else call
    if whole.kind == "method" and whole.target == "size":
        return whole.args == (value,)
    return whole.target == "builtins:getattr" and whole.args == (value, "shape")


Arguments = Mapping[str, Any]
Found = Operation | None
Recognizer = Callable[[Arguments, Sequence[Shape], Shape], Found]


def _activation(function: str) -> Recognizer:
    def found(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
        return Activate(function) if function in ACTIVATIONS and len(reads) == 1 else None

    return found


def _gelu(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    return Activate("gelu_tanh" if values.get("approximate", "none") == "tanh" else "gelu")


def _leaky_relu(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    plain = values.get("negative_slope", 0.01) == 0.01 and "leaky_relu" in ACTIVATIONS
    return Activate("leaky_relu") if plain else None


def _clamp(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    least = values.get("min", values.get("min_val", -1.0))
    greatest = values.get("max", values.get("max_val", None if "min_val" not in values else 1.0))
    if isinstance(least, Ref) or isinstance(greatest, Ref) or least != 0:
        return None
    if greatest is None:
        return Activate("relu")
    return Activate("relu6") if greatest == 6 and "relu6" in ACTIVATIONS else None


def _add(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    same = len(reads) == 2 and reads[0] == reads[1] == shape and values.get("alpha", 1) == 1
    return Add() if same and isinstance(values.get("other"), Ref) else None


def _mul(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    if len(reads) != 2 or shape is None or not isinstance(values.get("other"), Ref):
        return None
    channels = (*shape[:2], *[1] * (len(shape) - 2))
    whole = [read == shape for read in reads]
    fits = all(read in (shape, channels) for read in reads) and any(whole)
    return Mul(not whole[0]) if fits and len(shape) in (2, 3, 4) else None


def _batched(rank: int, recognizer: Recognizer) -> Recognizer:
    """For values of one rank only: a pool of two dimensions also takes one image [c, h, w]."""

    def found(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
        ranks = {0 if one is None else len(one) for one in (reads[0], shape)}
        return recognizer(values, reads, shape) if ranks == {rank} else None

    return found


def _max_pool(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    if values.get("return_indices"):
        return None
    kernel, stride, padding = _windows(values, shape)
    dilation = _pair(values.get("dilation", 1), shape, 1)
    if kernel is None or stride is None or padding is None or dilation is None:
        return None
    return MaxPool(kernel, stride, padding, dilation, bool(values.get("ceil_mode", False)))


def _avg_pool(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    kernel, stride, padding = _windows(values, shape)
    if kernel is None or stride is None or padding is None:
        return None
    include, divisor = values.get("count_include_pad", True), values.get("divisor_override")
    return AvgPool(
        kernel, stride, padding, bool(values.get("ceil_mode", False)), bool(include), divisor
    )


def _windows(values: Arguments, shape: Shape) -> tuple[Pair | None, Pair | None, Pair | None]:
    stride = values.get("stride")
    kernel = values.get("kernel_size")
    stride = kernel if stride is None or stride == [] else stride
    return _pair(kernel, shape, 1), _pair(stride, shape, 1), _pair(values.get("padding", 0), shape)


def _adaptive(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    size = values.get("output_size")
    if shape is None or len(shape) not in (3, 4) or _holds_ref(size):
        return None
    if len(shape) == 3:
        only = size[0] if isinstance(size, (tuple, list)) else size
        return AdaptiveAvgPool((1, only))
    first, second = size if isinstance(size, (tuple, list)) else (size, size)
    return AdaptiveAvgPool((first, second))


def _adaptive_max(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    found = None if values.get("return_indices") else _adaptive(values, reads, shape)
    return AdaptiveMaxPool(found.size) if isinstance(found, AdaptiveAvgPool) else None


def _mean(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    dims, given = values.get("dim"), reads[0] if len(reads) == 1 else None
    if given is None or dims is None or _holds_ref(dims) or len(given) not in (3, 4):
        return None
    wanted = sorted(dim % len(given) for dim in ([dims] if isinstance(dims, int) else dims))
    if wanted != list(range(2, len(given))):
        return None
    return AdaptiveAvgPool((1, 1), flat=not values.get("keepdim", False))


def _cat(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    tensors, dim = values.get("tensors"), values.get("dim", 0)
    if shape is None or not isinstance(tensors, (tuple, list)) or isinstance(dim, Ref):
        return None
    if not all(isinstance(item, Ref) for item in tensors) or len(shape) not in (2, 3, 4):
        return None
    ranks = {None if read is None else len(read) for read in reads}
    return Concat() if dim % len(shape) == 1 and ranks == {len(shape)} else None


def _interpolate(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    mode, size, factor = (values.get(key) for key in ("mode", "size", "scale_factor"))
    if mode not in (None, "nearest") or shape is None or len(shape) != 4 or len(reads) < 1:
        return None
    given = reads[0]
    if given is None:
        return None
    whole = shape[2] % given[2] == 0 and shape[3] % given[3] == 0
    if factor is not None and whole:
        pair = factor if isinstance(factor, (tuple, list)) else (factor, factor)
        if all(float(one) == int(one) for one in pair):
            return Upsample(None, (int(pair[0]), int(pair[1])))
    if size is not None and not _holds_ref(size):
        return Upsample(_pair(size, shape), None)
    return None  # the size of another result, which another batch may change


def _flatten(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    given = reads[0] if reads else None
    if given is None or shape is None or values.get("start_dim", 0) != 1:
        return None
    return _flat(given, shape)


def _view(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    given, wanted = reads[0], values.get("shape", ())
    if given is None or shape is None or len(wanted) != 2:
        return None
    rows = isinstance(wanted[0], Ref) or wanted[0] == -1
    columns = isinstance(wanted[1], int) and (wanted[1] == -1 or wanted[0] == -1)
    columns = columns or (isinstance(wanted[0], Ref) and isinstance(wanted[1], int))
    return _flat(given, shape) if rows and columns else None


def _squeeze(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    given = reads[0]
    if given is None or shape is None or len(given) < 3 or given[2:] != (1,) * (len(given) - 2):
        return None
    return _flat(given, shape)


def _flat(given: tuple[int, ...], shape: tuple[int, ...]) -> Found:
    if given == shape:
        return Same()
    size = 1
    for one in given[1:]:
        size *= one
    return Flatten() if len(given) in (3, 4) and shape == (given[0], size) else None


_END = 2**31 - 1  # of a slice without one


def _getitem(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    """A crop: rows and columns of an image, columns of a sequence."""
    given, index = reads[0], values.get("index")
    if given is None or shape is None or len(given) not in (3, 4) or not isinstance(index, tuple):
        return None
    if Ellipsis in index:
        place = index.index(Ellipsis)
        gap = len(given) - len(index) + 1
        index = (*index[:place], *[slice(None)] * gap, *index[place + 1 :])
    parts = [part for part in index if isinstance(part, slice) and part.step in (None, 1)]
    bounds = [part for one in parts for part in (one.start, one.stop)]
    plain = all(bound is None or type(bound) is int for bound in bounds)
    if len(parts) != len(index) or len(index) > len(given) or not plain:
        return None
    if any(part != slice(None) for part in parts[:2]):
        return None
    ends = [(part.start or 0, _END if part.stop is None else part.stop) for part in parts[2:]]
    rest = len(given) - 2 - len(ends)
    ends = [*ends, *[(0, _END)] * rest]
    ends = [(0, _END)] * (2 - len(ends)) + ends
    return Crop((ends[0][0], ends[1][0]), (ends[0][1], ends[1][1]))


def _pad(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    if values.get("mode", "constant") != "constant" or values.get("value") not in (None, 0):
        return None
    return _zero_pad({"padding": values.get("pad")}, reads, shape)


def _zero_pad(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    sizes: Any = values.get("padding")
    given = reads[0]
    if given is None or shape is None or len(given) not in (3, 4) or _holds_ref(sizes):
        return None
    sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,) * (2 * len(given) - 4)
    if len(sizes) > 2 * len(given) - 4 or len(sizes) % 2 or min(sizes) < 0:
        return None
    left, right, top, bottom = (*sizes, 0, 0, 0, 0)[:4]
    return Pad((top, left), (bottom, right))


def _pixel_shuffle(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    inverse = "downscale_factor" in values
    factor = values["downscale_factor" if inverse else "upscale_factor"]
    if shape is None or len(shape) != 4 or isinstance(factor, Ref):
        return None
    return PixelShuffle(factor, inverse)


def _same(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    return Same()


def _dropout(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    off = values.get("training", True) is False or values.get("p", 0.5) == 0
    return Same() if off else None


def _contiguous(values: Arguments, reads: Sequence[Shape], shape: Shape) -> Found:
    return Same()  # another memory format holds the same values


# They move elements without changing them.
MOVING = frozenset(
    (
        *("chunk", "split", "getitem", "view", "reshape", "transpose", "permute", "flatten"),
        *("squeeze", "unsqueeze", "contiguous", "narrow", "select", "unbind", "movedim", "flip"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unflatten", "swapaxes"),
    )
)

_KNOWN: dict[str, Recognizer] = {
    **{
        name: _activation(name)
        for name in ("relu", "relu6", "silu", "tanh", "sigmoid", "hardswish", "hardsigmoid")
    },
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "hardtanh": _clamp,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "add": _add,
    "mul": _mul,
    "max_pool1d": _batched(3, _max_pool),
    "max_pool2d": _batched(4, _max_pool),
    "avg_pool1d": _batched(3, _avg_pool),
    "avg_pool2d": _batched(4, _avg_pool),
    "adaptive_avg_pool1d": _batched(3, _adaptive),
    "adaptive_avg_pool2d": _batched(4, _adaptive),
    "adaptive_max_pool1d": _batched(3, _adaptive_max),
    "adaptive_max_pool2d": _batched(4, _adaptive_max),
    "mean": _mean,
    "getitem": _getitem,
    "pad": _pad,
    "zero_pad": _zero_pad,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_shuffle,
    "cat": _cat,
    "interpolate": _interpolate,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
    "squeeze": _squeeze,
    "identity": _same,
    "dropout": _dropout,
    "contiguous": _contiguous,
}


def _pair(value: Any, shape: Shape, before: int = 0) -> Pair | None:
    """An argument of a pooling in two dimensions; ``before`` is its value for the height in one."""
    if shape is None or len(shape) not in (3, 4) or _holds_ref(value) or value is None:
        return None
    if len(shape) == 3:
        return before, int(value[0] if isinstance(value, (tuple, list)) else value)
    first, second = (*value, *value)[:2] if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)


def _holds_ref(value: Any) -> bool:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(part, Ref) for part in parts)


def _words(call: Call, module: nn.Module | None) -> str:
    """What a call is, for the report."""
    if module is not None:
        return type(module).__name__
    return call.target.rpartition(":")[2] if call.kind == "function" else call.target
