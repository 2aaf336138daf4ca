"""A package's structure, read from its source: which file imports which, and tests on types.

Nothing is imported: every file is parsed, and all of it counts, also imports inside functions and
behind ``TYPE_CHECKING``. ``from package import name`` is an import of the package's face and of the
file that defines ``name``; so is ``import package`` followed by ``package.name``.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One violation: where it is, and what is wrong."""

    file: str
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.problem}"


@dataclass
class Source:
    """One parsed file, and the names that its imports and assignments bind, in any scope."""

    module: str
    path: Path
    tree: ast.Module
    # name -> (module, attribute of that module, or None for the module itself)
    imported: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    assigned: dict[str, list[ast.expr]] = field(default_factory=dict)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


class Package:
    """All Python files of one package.

    Args:
        root: the package's folder.
        built: modules that exist only once the package is built (an extension, say).
    """

    def __init__(self, root: Path, built: Iterable[str] = ()) -> None:
        self.root, self.name = root, root.name
        self.built = {f"{self.name}.{module}" for module in built}
        self.sources: dict[str, Source] = {}
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if module not in self.built:
                self.sources[module] = Source(module, path, ast.parse(path.read_text()))
        for source in self.sources.values():
            self._bind(source)

    def file(self, module: str) -> str:
        """Path of a module's file, from the folder that holds the package."""
        return self.sources[module].path.relative_to(self.root.parent).as_posix()

    # ------------------------------------------------------------ names

    def _bind(self, source: Source) -> None:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    module = alias.name if alias.asname else first
                    source.imported[alias.asname or first] = (module, None)
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(source, node)
                for alias in node.names:
                    source.imported[alias.asname or alias.name] = self._member(base, alias.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name) and node.value is not None:
                        source.assigned.setdefault(target.id, []).append(node.value)

    def _member(self, module: str, name: str) -> tuple[str, str | None]:
        """``name`` in ``module``: a module inside it, or one of its attributes."""
        inner = f"{module}.{name}"
        return (inner, None) if inner in self.sources or inner in self.built else (module, name)

    def definer(self, module: str, name: str) -> str:
        """The file in which ``name`` of ``module`` is defined; packages' faces pass names on."""
        seen = set()
        while module in self.sources and self.sources[module].is_package:
            if (module, name) in seen or name not in self.sources[module].imported:
                break
            seen.add((module, name))
            source, inner = self.sources[module].imported[name]
            if inner is None:
                return source
            module, name = source, inner
        return module

    def _chain(self, source: Source, node: ast.expr) -> tuple[str, str | None, bool] | None:
        """The module and attribute at the start of ``a.b.c``, and whether that is all of it.

        None if ``a`` is not imported.
        """
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in source.imported:
            return None
        module, name = source.imported[node.id]
        while name is None and names:
            module, name = self._member(module, names.pop())
        return module, name, not names

    # ------------------------------------------------------------ imports

    def imports(self, module: str) -> dict[str, int]:
        """The modules of this package that one file imports: name -> line of the first import."""
        source = self.sources[module]
        found: dict[str, int] = {}

        def add(target: str, name: str | None, line: int) -> None:
            if name is not None:
                add(self.definer(target, name), None, line)
            if target in self.sources and target != module:
                found.setdefault(target, line)

        faces = list(self._uses_of_the_face(source))
        for use in faces:
            add(*use)
        for node in ast.walk(source.tree):
            line = getattr(node, "lineno", 0)
            if isinstance(node, ast.Import):
                for alias in node.names:
                    # `import package` counts by the uses of the package's name, if there are any.
                    if alias.name != self.name or not faces:
                        add(alias.name, None, line)
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(source, node)
                for alias in node.names:
                    if alias.name == "*":
                        add(base, None, line)
                    else:
                        add(*self._member(base, alias.name), line)
            elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
                for argument in node.args[:1]:
                    if isinstance(argument, ast.Constant):
                        add(str(argument.value), None, line)
        return found

    def _uses_of_the_face(self, source: Source) -> Iterator[tuple[str, str | None, int]]:
        """Each ``package.name``, and each bare use of a name that is bound to the package."""
        faces = {name for name, bound in source.imported.items() if bound == (self.name, None)}
        inner: set[int] = set()
        for node in ast.walk(source.tree):  # an outer attribute comes before the ones inside it
            if id(node) in inner or not isinstance(node, (ast.Attribute, ast.Name)):
                continue
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
                inner.add(id(root))
            if isinstance(root, ast.Name) and root.id in faces:
                use = self._chain(source, node)
                if use is not None:
                    yield use[0], use[1], node.lineno

    # ------------------------------------------------------------ types

    def subclasses(self, folder: str, bases: Iterable[str]) -> set[tuple[str, str]]:
        """(module, class) of the classes below ``folder`` that derive from one of ``bases``."""
        wanted, parents = set(bases), {}
        for module, source in self.sources.items():
            if not _below(module, f"{self.name}.{folder}"):
                continue
            for node in ast.walk(source.tree):
                if isinstance(node, ast.ClassDef):
                    own = {self._class(source, base) for base in node.bases}
                    parents[module, node.name] = own
        found: set[tuple[str, str]] = set()
        while True:
            more = {
                key
                for key, own in parents.items()
                if key not in found and any(b in found or (b and b[1] in wanted) for b in own)
            }
            if not more:
                return found
            found |= more

    def _class(self, source: Source, node: ast.expr) -> tuple[str, str] | None:
        """(module that defines it, name) of a class that an expression names."""
        if isinstance(node, ast.Subscript):
            return self._class(source, node.value)
        if isinstance(node, ast.Name) and node.id not in source.imported:
            return source.module, node.id
        module, name, whole = self._chain(source, node) or ("", None, False)
        return (self.definer(module, name), name) if name is not None and whole else None


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    """The module after ``from``, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parts = source.module.split(".")
    up = node.level - 1 if source.is_package else node.level
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _below(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}.")


# ---------------------------------------------------------------- checks


def upward_imports(package: Package, layers: Iterable[tuple[str, ...]]) -> list[Finding]:
    """Imports that do not go down ``layers``, which are listed from the top to the bottom.

    A layer holds names of packages and files side by side; those do not import each other. A name
    with dots places a part of a package, and the longest name that fits a file counts. The
    package's face has the name ``__init__``.
    """
    depth = {name: number for number, names in enumerate(layers) for name in names}

    def part(module: str) -> str:
        own = module.partition(".")[2] or "__init__"
        return max((name for name in depth if _below(own, name)), key=len, default="")

    findings = []
    for module in package.sources:
        if not part(module):
            findings.append(Finding(package.file(module), 1, "is in no layer"))
            continue
        for target, line in package.imports(module).items():
            here, there = part(module), part(target)
            if there and here != there and depth[there] <= depth[here]:
                findings.append(
                    Finding(package.file(module), line, f"imports {package.file(target)}")
                )
    return findings


def circles(package: Package) -> list[list[str]]:
    """Circles of imports between files: one shortest circle through each file that is on one.

    Returns:
        Circles as lists of files, the first file repeated at the end; each circle once.
    """
    graph = {module: list(package.imports(module)) for module in package.sources}
    found: dict[frozenset[str], list[str]] = {}
    for start in graph:
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            if start in graph[path[-1]]:
                found.setdefault(frozenset(path), [*path, start])
                break
            for target in graph[path[-1]]:
                if target not in seen:
                    seen.add(target)
                    paths.append([*path, target])
    return [[package.file(module) for module in circle] for circle in found.values()]


def type_tests(package: Package, folder: str, bases: Iterable[str]) -> list[Finding]:
    """Tests outside ``folder`` for a class that is defined in it and derives from ``bases``.

    Counted are ``isinstance`` and ``issubclass``, comparisons with ``type(x)`` or ``x.__class__``,
    ``case Class()``, comparisons with the class's name as a string, and what prepares a test
    elsewhere: a dictionary with the class as a key, the class as an argument of a call (but not of
    ``cast``). A tuple, union or table counts by what it holds, also under a name of its own.

    Args:
        package: the package.
        folder: the folder that defines the classes; tests inside it are allowed.
        bases: names of their base classes; tests for a base class are allowed everywhere.
    """
    concrete = package.subclasses(folder, bases)
    findings = []
    for module, source in package.sources.items():
        if not _below(module, f"{package.name}.{folder}"):
            for line, name in sorted(set(_TypeTests(package, source, concrete).found())):
                findings.append(Finding(package.file(module), line, f"tests for {name}"))
    return findings


class _TypeTests:
    def __init__(self, package: Package, source: Source, concrete: set[tuple[str, str]]) -> None:
        self.package, self.source, self.concrete = package, source, concrete

    def found(self) -> Iterator[tuple[int, str]]:
        for node in ast.walk(self.source.tree):
            for name in self._tested(node):
                yield getattr(node, "lineno", 0), name

    def _tested(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Call):
            if _called(node) in ("isinstance", "issubclass") and len(node.args) > 1:
                return self._held(node.args[1])
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            passed = [value for value in values if not isinstance(value, ast.Call)]
            cast = _called(node) == "cast"
            return set() if cast else self._all_held(passed, variables=False)
        if isinstance(node, ast.Dict):
            return self._all_held([key for key in node.keys if key is not None])
        if isinstance(node, ast.MatchClass):
            return self._held(node.cls)
        if isinstance(node, ast.MatchValue):
            return self._held(node.value) | self._named(node.value)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            held = self._all_held(sides) if any(map(_is_type, sides)) else set()
            return held.union(*map(self._named, sides))
        return set()

    def _named(self, node: ast.expr) -> set[str]:
        """The concrete class whose name a string literal is."""
        text = node.value if isinstance(node, ast.Constant) else None
        return {name for _, name in self.concrete if name == text}

    def _all_held(self, nodes: Iterable[ast.expr], variables: bool = True) -> set[str]:
        return {name for node in nodes for name in self._held(node, variables)}

    def _held(
        self, node: ast.expr, variables: bool = True, seen: frozenset[str] = frozenset()
    ) -> set[str]:
        """Names of the concrete classes that an expression names or holds.

        With ``variables`` the values that were assigned to a name count too.
        """
        if isinstance(node, ast.Name) and node.id in self.source.assigned:
            if not variables or node.id in seen:
                return set()
            values = self.source.assigned[node.id]
            return {n for value in values for n in self._held(value, True, seen | {node.id})}
        if isinstance(node, (ast.Name, ast.Attribute)):
            named = self.package._class(self.source, node)
            return {named[1]} if named is not None and named in self.concrete else set()
        inner: Iterable[ast.AST] = ast.iter_child_nodes(node)
        if isinstance(node, ast.Dict):
            inner = [key for key in node.keys if key is not None]
        if isinstance(node, ast.Call):  # tuple([A, B]) holds A and B; A() is an object
            inner = node.args
        expressions = [child for child in inner if isinstance(child, ast.expr)]
        return {n for child in expressions for n in self._held(child, variables, seen)}


def _is_type(node: ast.expr) -> bool:
    """``type(x)`` or ``x.__class__``."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__class__"
    return isinstance(node, ast.Call) and _called(node) == "type" and len(node.args) == 1


def long_files(
    root: Path, folders: Iterable[str], suffixes: Iterable[str], limit: int
) -> dict[str, int]:
    """Files below ``folders`` of ``root`` with more than ``limit`` lines: path -> lines."""
    endings, found = tuple(suffixes), {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.name.endswith(endings):
                lines = len(path.read_text().splitlines())
                if lines > limit:
                    found[path.relative_to(root).as_posix()] = lines
    return found
