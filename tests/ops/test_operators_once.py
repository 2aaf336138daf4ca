"""Each operator is written down once per floor.

A new operator on the CPU, composed of ATen's for other devices and with gradients touches five
files of C++: its schema (csrc/ops.cpp), its type (csrc/operators.h) and its family's file in
csrc/cpu, csrc/aten and csrc/autograd. Everything else follows by loops over the schemas.
"""

import ast
import re
from pathlib import Path

import pytest
import torch

from torchquant import _C

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = {
    path.relative_to(CSRC).as_posix(): path.read_text()
    for path in sorted(CSRC.rglob("*"))
    if path.suffix in (".cpp", ".h", ".inc")
}
FLOORS = ("cpu", "aten", "autograd")
DEFINED = [
    name.removeprefix("torchquant::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torchquant::")
]


def families(text: str, comment: str, operator: str) -> dict[str, str]:
    """Operator -> family, where comments head the families' operators."""
    found, family = {}, ""
    for match in re.finditer(rf"^ *// {comment}(\w+)$|{operator}", text, re.MULTILINE):
        if match[1]:
            family = match[1]
        else:
            found[match[2]] = family
    return found


SCHEMAS = families(SOURCES["ops.cpp"], "---- ", r'"(\w+)\(Tensor')
HANDLES = families(SOURCES["operators.h"], "", r"^TORCHQUANT_OPERATOR\((\w+),")


def registered(folder: str, name: str) -> list[str]:
    """Sources in a folder of csrc that register a kernel for the operator."""
    pattern = re.compile(rf"ops::{name}(::implement\(|>\(&)|\(ops::{name}, &")
    files = [file for file in SOURCES if file.startswith(folder) and file.endswith(".cpp")]
    return [file for file in files if pattern.search(SOURCES[file])]


def has_kernel(library: str, name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{library}::{name}", key)


def test_schemas_and_handles_are_the_same_list_in_the_same_families() -> None:
    assert list(SCHEMAS.items()) == list(HANDLES.items())
    assert sorted(SCHEMAS) == sorted(DEFINED)
    assert all(SCHEMAS.values())


@pytest.mark.parametrize("name", SCHEMAS)
def test_both_libraries_have_one_schema(name: str) -> None:
    ours, aten = (
        getattr(space, name).default._schema
        for space in (torch.ops.torchquant, torch.ops.torchquant_aten)
    )
    assert str(ours).partition("::")[2] == str(aten).partition("::")[2]


@pytest.mark.parametrize("name", SCHEMAS)
def test_five_files(name: str) -> None:
    family = HANDLES[name]
    where = {floor: registered(floor + "/", name) for floor in FLOORS}
    assert where["cpu"] == [f"cpu/{family}.cpp"]
    assert where["aten"] == [f"aten/{family}.cpp"]
    assert where["autograd"] in ([], [f"autograd/{family}.cpp"])
    assert registered("", name) == sorted(where["cpu"] + where["aten"] + where["autograd"])


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_has_a_kernel(name: str) -> None:
    assert has_kernel("torchquant", name, "CPU")
    assert has_kernel("torchquant", name, "CUDA")
    assert has_kernel("torchquant_aten", name, "CompositeExplicitAutograd")
    assert has_kernel("torchquant", name, "FuncTorchBatched")
    fake = torch._library.simple_registry.singleton.find(f"torchquant::{name}").fake_impl
    assert fake.kernel is not None
    for library in ("torchquant", "torchquant_aten"):
        assert has_kernel(library, name, "Autograd")


def autograd_kernel(name: str) -> str:
    """own, constant (looks through the operator) or refused."""
    line = next(
        line
        for line in torch._C._dispatch_dump(f"torchquant::{name}").splitlines()
        if line.startswith("Autograd[alias]")
    )
    if "fallthrough" in line:
        return "constant"
    return "refused" if "boxed" in line and "unboxed" not in line else "own"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_gradient_is_its_own_or_comes_from_the_loop(name: str) -> None:
    constant = re.search(r"kConstantResults = \{(.*?)\};", SOURCES["boxed/autograd.cpp"], re.DOTALL)
    assert constant
    table = set(re.findall(r'"(\w+)"', constant[1]))
    expected = "constant" if name in table else "refused"
    if registered("autograd/", name):
        assert name not in table
        expected = "own"
    assert autograd_kernel(name) == expected


def test_the_table_of_constant_results_names_operators() -> None:
    for file, table in (("boxed/autograd.cpp", "kConstantResults"), ("boxed/vmap.cpp", "kRows")):
        body = SOURCES[file].partition(f"{table} = {{")[2].partition("\n};")[0]
        names = set(re.findall(r'"(\w+)"', body)) - {"input", "gate", "up", "residual", "rows"}
        assert names and names <= set(SCHEMAS), file


def test_types_of_operators_are_nowhere_but_in_operators_h() -> None:
    for pattern in (r"\.typed<", r"findSchemaOrThrow", r"TypedOperatorHandle", r'\bimpl\("'):
        users = {file for file, text in SOURCES.items() if re.search(pattern, text)}
        assert users <= {"operators.h"}, pattern


def test_fast_calls_are_operators_without_a_signature() -> None:
    calls = re.findall(r"FastCall<ops::(\w+)", SOURCES["module.cpp"])
    assert calls and set(calls) <= set(SCHEMAS)
    for name in calls:
        assert callable(getattr(_C, name))
        with pytest.raises(TypeError, match=rf"{name}: expected \d+ positional arguments, got 0"):
            getattr(_C, name)()


def arity(name: str) -> int:
    return len(getattr(torch.ops.torchquant, name).default._schema.arguments)


def definitions(name: str) -> list[str]:
    """Where functions of this name, or of a kernel's, have the operator's number of parameters."""
    pattern = rf"^[\w:<>, ]+ {name}(?:_autograd|_forward)?\(([^;{{]*?)\) \{{"
    return [
        file
        for file, text in SOURCES.items()
        if not file.startswith(("core/", "kernels/"))
        for found in re.findall(pattern, text, re.MULTILINE)
        if found.count(",") == arity(name) - 1
    ]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_parameter_list_is_written_in_kernels_alone(name: str) -> None:
    """Once on each floor; or, for a kernel that the CPU and ATen share, in csrc/common."""
    family = HANDLES[name]
    gradient = [f"autograd/{family}.cpp"] if registered("autograd/", name) else []
    if name in ("qat_linear", "qat_linear_intx"):
        header = {"qat_linear": "qat_linear", "qat_linear_intx": "qat_intx"}[name]
        assert definitions(name) == [*gradient, f"common/{header}.h"]
    else:
        assert definitions(name) == [f"aten/{family}.cpp", *gradient, f"cpu/{family}.cpp"]


# ---------------------------------------------------------------- the build


def test_every_source_is_in_one_translation_unit(tmp_path: Path) -> None:
    path = CSRC.parent / "setup.py"
    wanted = {"sources", "translation_units", "SEPARATE_FOLDERS"}
    body = [
        node
        for node in ast.parse(path.read_text()).body
        if (isinstance(node, ast.FunctionDef) and node.name in wanted)
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in wanted)
    ]
    scope = {"ROOT": CSRC.parent, "Path": Path}
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    units = scope["translation_units"](tmp_path)
    compiled = []
    for unit in units:
        if unit.startswith("csrc/"):
            compiled.append(unit.removeprefix("csrc/"))
        else:
            compiled += re.findall(r'^#include "(.*)"$', Path(unit).read_text(), re.MULTILINE)
    assert sorted(compiled) == sorted(file for file in SOURCES if file.endswith(".cpp"))
    kernels = sorted(unit for unit in units if unit.startswith("csrc/"))
    assert kernels == sorted(f"csrc/{f}" for f in SOURCES if re.fullmatch(r"kernels/\w+\.cpp", f))
    before = {unit: Path(unit).stat().st_mtime_ns for unit in units if not unit.startswith("csrc/")}
    assert scope["translation_units"](tmp_path) == units
    assert all(Path(unit).stat().st_mtime_ns == time for unit, time in before.items())
