"""The path on an NVIDIA GPU: which kernels run there, and how to choose others.

The operators have two implementations for CUDA tensors, with the same bits:

* ``"triton"``: fused kernels (``torchquant/triton``), for compute capability 8.0 and higher. Triton
  comes with torch's CUDA builds; it is imported, and compiles, at an operator's first call.
* ``"aten"``: composed of torch's own operations (``csrc/cuda``), for every GPU that torch serves.

``"auto"``, the default, takes Triton's where they work, and says so once where they do not; each
operator's first call on a device checks a small case against the other path. With ``"triton"`` it
is an error if they do not work. Calls that Triton's kernels do not cover (rare types, empty
tensors) run with ATen's on either. The choice holds for the whole process, all threads.

The environment variable ``TORCHQUANT_CUDA_PATH`` sets it before the first call. Which of Triton's
configurations a shape gets is measured once, at its first call, and kept in a file;
``TORCHQUANT_CACHE_DIR`` names another folder for it, ``TORCHQUANT_AUTOTUNE=0`` measures nothing.

CUDA graphs: call the model once before capturing it, with the shapes of the capture.

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
