"""Lets torchvision be imported with a CPU build of torch, in every Python process of the tests.

The wheels of torchvision on PyPI hold a library for CUDA, which does not load without CUDA. The
import then fails, because torchvision describes its operators ``nms`` and ``qnms``, which the
library would have defined. transformers and timm import torchvision and fail as well. Here both
operators are declared before that import. Models run; only torchvision's own operators (``nms``,
``roi_align``, ...) do not.

conftest.py puts this folder on PYTHONPATH where torchvision is installed.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

NAMES = ("nms", "qnms")
SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
libraries: list[Any] = []  # a declaration ends with its object


class DeclareOperators:
    """An import hook: at the first import of torchvision it declares the missing operators."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name)
        if spec is not None and spec.origin is not None and not loads(Path(spec.origin).parent):
            import torch

            libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
            for operator in NAMES:
                libraries[-1].define(SCHEMA.format(operator))
        return spec


def loads(folder: Path) -> bool:
    """Whether torchvision's library loads; where it does, the operators exist from now on."""
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return True
    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")


sys.meta_path.insert(0, DeclareOperators)
