"""Builds ``torchquant._C``, the C++ kernels and operators, against the torch found at build time.

``pyproject.toml`` holds everything that does not depend on that torch, and ``build_backend.py``
finds it. Three things depend on it:

* the extension itself;
* the run-time requirement: the C++ interface of torch is stable within one release only, so the
  package requires exactly the release that it was built against;
* ``torchquant/_build_info.py``, which records that release. ``torchquant/_extension.py`` compares
  the record with the installed torch *before* it loads the library, while a clear message is
  possible.

No flag here depends on the machine. Target regions in the sources decide which instruction sets are
compiled, and the library chooses one at run time; ``-march=native`` would undo both.
"""

import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

from build_backend import TORCH, is_supported, unsupported

if "sdist" in sys.argv[1:]:
    # An archive of the sources is the same for every torch, and needs none.
    from setuptools import Extension as CppExtension
    from setuptools.command.build_ext import build_ext as BuildExtension

    TORCH_VERSION, TORCH_REQUIREMENT = "", TORCH
else:
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"torchquant is built against torch, which cannot be imported here ({error}). Either "
            f"leave out --no-build-isolation, or first install '{TORCH}', setuptools and ninja."
        ) from None

    TORCH_VERSION = str(torch.__version__)
    TORCH_REQUIREMENT = f"torch=={TORCH_VERSION.partition('+')[0]}"  # without a local "+cpu"

ROOT = Path(__file__).resolve().parent

# Numerics: no contraction of a*b+c, not even where the user's CFLAGS ask for fast arithmetic.
# -g0 undoes Python's own -g, which multiplies the size of the library.
COMPILE_FLAGS = [
    "-O3",
    "-fno-fast-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-g0",
]
# at::parallel_for is a header: without -fopenmp it silently runs on one thread. Apple's clang has
# no OpenMP, there one thread is what we get.
OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]


# Each file of these folders compiles for an instruction set of its own, in a unit of its own.
SEPARATE_FOLDERS = ["csrc/kernels"]


def sources(*suffixes: str) -> list[str]:
    """Files below csrc with one of these suffixes, relative to this folder (setuptools' wish)."""
    found = (path for path in ROOT.glob("csrc/**/*") if path.suffix in suffixes)
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def translation_units(folder: Path) -> list[str]:
    """The files for the compiler: for each folder of csrc one in ``folder`` that includes the rest.

    Most of the time for an operator goes into torch's headers; files that share them compile in
    40 % of it. A unit is written only if its list has changed: ninja would compile it again.
    """
    units: dict[str, list[str]] = {}
    alone = []
    for source in sources(".cpp"):
        parent = source.rpartition("/")[0]
        if parent in SEPARATE_FOLDERS:
            alone.append(source)
        else:
            units.setdefault(parent, []).append(source)
    folder.mkdir(parents=True, exist_ok=True)
    for parent, members in units.items():
        unit = folder / f"{parent.replace('/', '_')}.cpp"
        lines = [f'#include "{member.removeprefix("csrc/")}"' for member in members]
        text = "\n".join(["// Written by setup.py.", *lines, ""])
        if not unit.is_file() or unit.read_text() != text:
            unit.write_text(text)
        alone.append(unit.as_posix())
    return alone


def compiler_version(compiler: list[str]) -> str:
    """First line of ``compiler --version``, for the build record."""
    output = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    return output.stdout.splitlines()[0].strip()


def check_prerequisites(compiler: list[str]) -> None:
    """Stop with one clear line where the compiler would stop with pages."""
    if sys.platform == "win32":
        raise CompileError("torchquant builds on Linux and macOS; on Windows use it inside WSL.")
    if not is_supported(TORCH_VERSION):
        raise CompileError(unsupported(TORCH_VERSION))
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise CompileError(
            f"Python's C headers are missing ({include / 'Python.h'}). Install them: 'apt-get "
            "install python3-dev' on Debian and Ubuntu, 'dnf install python3-devel' on Fedora."
        )
    if shutil.which(compiler[0]) is None:
        raise CompileError(
            f"no C++ compiler: '{compiler[0]}' is not on the PATH. Install g++ 11 or newer "
            "('apt-get install g++'), or name another compiler in the environment variable CXX."
        )


class BuildExt(BuildExtension):
    """BuildExtension, with the checks before it and the build record after it."""

    def run(self) -> None:
        compiler = shlex.split(get_cxx_compiler())  # the environment variable CXX, else c++
        check_prerequisites(compiler)
        # setuptools would skip an extension that is newer than its sources, even when it was built
        # for another torch. ninja, behind BuildExtension, knows better: headers and flags count.
        self.force = True
        for extension in self.extensions:  # until here csrc's own files, which sdist packs
            extension.sources = translation_units(Path(self.build_temp) / "units")
        super().run()
        self.write_build_info(compiler_version(compiler))

    def write_build_info(self, compiler: str) -> None:
        """Write torchquant/_build_info.py beside each copy of the library."""
        lines = [
            '"""Written by setup.py; describes the torchquant._C beside it."""\n',
            f"TORCH_VERSION = {TORCH_VERSION!r}",
            f"CXX11_ABI = {torch.compiled_with_cxx11_abi()!r}",
            f"COMPILER = {compiler!r}",
            f"FLAGS = {' '.join(COMPILE_FLAGS + OPENMP_FLAGS)!r}",
        ]
        folders = [Path(self.build_lib)] + ([ROOT] if self.inplace else [])
        for folder in folders:
            (folder / "torchquant" / "_build_info.py").write_text("\n".join(lines) + "\n")


setup(
    install_requires=[
        TORCH_REQUIREMENT,
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "typer>=0.12",
        "rich>=13",
    ],
    ext_modules=[
        CppExtension(
            "torchquant._C",
            sources(".cpp"),
            include_dirs=[str(ROOT / "csrc")],  # absolute: ninja runs in the build folder
            depends=sources(".cpp", ".h", ".inc"),
            # The macro makes ninja rebuild when torch changes under an existing build folder.
            define_macros=[("TORCHQUANT_TORCH_VERSION", f'"{TORCH_VERSION}"')],
            extra_compile_args=COMPILE_FLAGS + OPENMP_FLAGS,
            extra_link_args=OPENMP_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
