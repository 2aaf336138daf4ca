"""Memory that ends at an unmapped page, or begins behind one: one byte too far ends the process."""

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


def beside_a_hole(tensor: Tensor, before: bool = False) -> Tensor:
    """The same values in memory that ends at an unmapped page, or begins behind one."""
    if tensor.numel() == 0:
        return tensor
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    room = -(-len(data) // PAGE) * PAGE
    memory = mmap.mmap(-1, room + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = PAGE if before else room - len(data)
    memory[offset : offset + len(data)] = data
    hole = address if before else address + room
    assert LIBC.mprotect(ctypes.c_void_p(hole), ctypes.c_size_t(PAGE), 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape)


def strided_beside_a_hole(tensor: Tensor, before: bool = False) -> Tensor:
    """The same for any strides: no byte of the memory is behind the last element."""
    if tensor.numel() == 0:
        return tensor
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in sizes)
    run = tensor.as_strided((span,), (1,), tensor.storage_offset())
    return beside_a_hole(run, before).as_strided(tensor.shape, tensor.stride())
