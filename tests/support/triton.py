"""Triton's kernels in tests: compiled where there is a GPU, otherwise in Triton's interpreter.

Import this before anything of torchquant.triton. The interpreter is chosen where ``triton.jit`` is
called, in Triton itself too, so conftest.py chooses it before anything is imported. ``DEVICE`` is
where the tensors go.

Three of the interpreter's operations differ from the hardware's and are replaced: the conversion
from fp32 to bf16 (it does not round to nearest even), that from bf16 (denormals become zero), and
in older versions the fused multiply-add (it rounds twice). Another replacement lets Triton 3.6 run
with NumPy 2.4. Two save most of the time: reductions with a function of our own took one element at
a time, and each call of a function in a kernel patched the whole language again.
"""

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"


def _patch_interpreter() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from torchquant.functional._arithmetic import fmaf

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl
    convert = builder.create_fp_to_fp

    def through_torch(handle: Any, dtype: Any) -> Any | None:
        types = (handle.dtype.scalar, dtype.scalar)
        if types == (tl.float32, tl.bfloat16):
            values = np.ascontiguousarray(handle.data, dtype=np.float32)
            data = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
        elif types == (tl.bfloat16, tl.float32):
            data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return None
        return interpreter.TensorHandle(data.reshape(handle.data.shape), dtype.scalar)

    def cast_impl(self: Any, handle: Any, dtype: Any) -> Any:
        result = through_torch(handle, dtype)
        return cast(self, handle, dtype) if result is None else result

    def create_fp_to_fp(self: Any, handle: Any, dtype: Any, rounding: Any) -> Any:
        result = through_torch(handle, dtype)
        return convert(self, handle, dtype, rounding) if result is None else result

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        assert z.data.dtype == np.float32
        operands = np.broadcast_arrays(x.data, y.data, z.data)
        a, b, c = (torch.from_numpy(np.array(operand)) for operand in operands)
        return interpreter.TensorHandle(fmaf(a, b, c).numpy(), z.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """NumPy 2.4 refuses int() of an array of one element, which Triton 3.6 calls."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def generic_reduce(self: Any, input: Any) -> list[Any]:
        """Combine halves until one value is left, as the hardware does."""
        inputs, axis = self.unravel(input, self.axis)
        types = [tensor.dtype for tensor in inputs]
        values = [np.moveaxis(tensor.handle.data, axis, 0) for tensor in inputs]
        while len(values[0]) > 1:
            half, rest = divmod(len(values[0]), 2)
            assert rest == 0
            parts = [(value[:half], value[half:]) for value in values]
            first, second = (map(self.to_tensor, side, types) for side in zip(*parts, strict=True))
            found = self.combine_fn.fn(*first, *second)
            values = [x.handle.data for x in (found if isinstance(found, tuple) else (found,))]
        kept = (1,) * inputs[0].handle.data.ndim if self.axis is None else None
        results = [value[0] for value in values]
        if self.keep_dims:
            results = [
                np.expand_dims(result, axis) if kept is None else result.reshape(kept)
                for result in results
            ]
        return list(map(self.to_tensor, results, types))

    patch_language = interpreter._patch_lang
    patched: set[str] = set()  # modules whose functions found the language in this launch

    def patch_at_launch(kernel: Any) -> Any:
        patched.clear()
        return patch_language(kernel)

    def call_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function that a kernel calls: one patch of the language suffices for its module."""
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            patch_language(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = patch_at_launch
    interpreter.InterpretedFunction.__call__ = call_function
    interpreter.ReduceOps.generic_reduce = generic_reduce
    interpreter._patch_lang_tensor = patch_tensor_and_index
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_fma = create_fma


if INTERPRETED:
    assert os.environ["TRITON_INTERPRET"] == "1"
    _patch_interpreter()


def module(name: str) -> Any:
    """``torchquant.triton.name``, imported after the interpreter was patched."""
    return importlib.import_module(f"torchquant.triton.{name}")


def to_device(*tensors: Tensor | None) -> list[Any]:
    """The tensors on ``DEVICE``; None stays."""
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of values that no kernel writes: NaN, or an unlikely integer."""
    value = float("nan") if dtype.is_floating_point else {1: 85, 4: 0x55AA55AA}[dtype.itemsize]
    return torch.full(shape, value, dtype=dtype, device=DEVICE)
