"""Triton's own way from a call to a launch, without a GPU: all of it but the launch.

Here the compiler gets the arguments as Triton's launcher sees them: integers that are 1 become
constants, pointers are aligned or not, what is absent is None, and globals must not have changed.
The interpreter and a compilation by hand (test_triton_compile.py) do without all that.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ahead import NewFolder, Processes, Run, Selection

pytest.importorskip("triton", reason="triton is not installed")

# Rows, outputs, inputs: odd ones, and ones. "large" is for products alone, whose operands come by
# the tensor memory accelerator then.
SIZES = {"odd": (19, 37, 83), "ones": (1, 1, 1), "large": (1024, 1024, 256)}


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024  # module, function, registers, spills, most threads


class Driver:
    """A Hopper that runs nothing."""

    utils = _Utilities()
    launched = 0

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        assert metadata.global_scratch_size == 0, "memory that nobody would provide"
        assert metadata.shared <= 232448

        def launch(*arguments: Any) -> None:
            Driver.launched += 1

        return launch


def main(rows: int, outputs: int, inputs: int) -> None:
    from triton.runtime import driver

    driver.set_active(Driver())
    import torchquant  # noqa: F401 (operators)
    from torchquant.cuda.host import FAMILIES, FAMILY_OF, CudaHost
    from torchquant.triton import selftest

    selftest.ROWS, selftest.OUTPUTS, selftest.INPUTS = rows, outputs, inputs
    if rows < 4:  # its special values have no place
        plain = selftest._Draw.floats

        def floats(self: Any, *shape: int, dtype: Any = torch.float32, odd: bool = False) -> Any:
            return plain(self, *shape, dtype=dtype, odd=False)

        selftest._Draw.floats = floats  # type: ignore[method-assign]
    rows_and_products = (
        *FAMILIES["linear"],
        "quantize_per_token",
        "quantize_rows",
        "quantize_pack",
    )
    operators = FAMILY_OF if rows < 1000 else rows_and_products
    for name in operators:
        function = CudaHost().kernel(name)
        for arguments in selftest.samples(name, torch.device("cpu")):
            before = Driver.launched
            result = function(*arguments)
            assert result is NotImplemented or Driver.launched > before, name
            function(*arguments)  # and once more, where the kernel is known


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[str]]:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here), *sys.path])
    names = tests.values("name")
    caches = {name: str(new_folder(name)) for name in names}

    def run(name: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, __file__, *map(str, SIZES[name])],
            env={**environment, "TRITON_CACHE_DIR": caches[name]},
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )

    return run, names


@pytest.fixture(scope="module")
def result_of(request: pytest.FixtureRequest, processes: Processes) -> Callable[[str], Any]:
    """The ended process of one of `SIZES`."""
    return lambda key: processes.result(request.module, key)


@pytest.mark.parametrize("name", SIZES)
def test_every_operator_gets_to_its_launch(name: str, result_of: Callable[[str], Any]) -> None:
    ran = result_of(name)
    assert ran.returncode == 0, ran.stderr[-4000:]


if __name__ == "__main__":
    main(*(int(size) for size in sys.argv[1:]))
