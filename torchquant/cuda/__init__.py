"""The path on an NVIDIA GPU: which kernels run there, and how to choose others.

The operators have two implementations for CUDA tensors, with the same bits:

* ``"triton"``: fused kernels (``torchquant/triton``), for compute capability 8.0 and higher. Triton
  is part of torch's CUDA builds. An operator's first call imports it and compiles the kernel.
* ``"aten"``: torch's own operations (``csrc/aten``), for every GPU that torch supports.

``"auto"``, the default, uses Triton if it works; otherwise it uses ATen and warns once. An
operator's first call on a device compares a small case with the other path. With ``"triton"``, a
failure of Triton is an error. Calls that Triton's kernels do not support (rare types, empty
tensors) use ATen's kernels on both paths. The choice applies to the whole process, all threads.

The environment variable ``TORCHQUANT_CUDA_PATH`` sets the path before the first call. A shape's
first call measures Triton's configurations; a file keeps the choice. ``TORCHQUANT_CACHE_DIR`` sets
the file's folder; ``TORCHQUANT_AUTOTUNE=0`` turns measuring off.

CUDA graphs: call the model once, with the shapes of the capture, before capturing it.

Example:
    >>> set(available_paths()) <= {"triton", "aten"}  # () on a machine without a GPU
    True
    >>> with use_path("aten"):
    ...     chosen_path()
    'aten'
"""

from torchquant.cuda.paths import (
    AUTOTUNE_VARIABLE,
    ENVIRONMENT_VARIABLE,
    GPU,
    active_path,
    available_paths,
    chosen_path,
    gpus,
    no_gpu_reason,
    use_path,
)

__all__ = [
    "AUTOTUNE_VARIABLE",
    "ENVIRONMENT_VARIABLE",
    "GPU",
    "active_path",
    "available_paths",
    "chosen_path",
    "gpus",
    "no_gpu_reason",
    "use_path",
]
