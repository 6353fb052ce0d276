"""The house: each package imports only what stands below it, and nothing hides an import inside a function."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import leankv

ROOT = Path(leankv.__file__).parent
REPOSITORY = ROOT.parent
FILES = sorted(ROOT.rglob("*.py"))
STOREYS = [
    {"__main__"},
    {"cli"},
    {"__init__"},
    {"api"},
    {"inputs"},
    {"executors"},
    {"studies"},
    {"evaluation", "export"},
    {"calibration"},
    {"cache"},
    {"models", "data"},
    {"codecs"},
    {"report"},
    {"config"},
    {"search"},
    {"storage"},
    {"compiled"},
    {"errors", "progress", "version"},
]
"""From the top down; `__init__` is the package's face. A package imports from its own and from those below; packages of
one storey do not see each other."""
MAY_WAIT = {"cli", "__init__"}
"""Where imports stand inside functions, so that `leankv --help` and `import leankv` load no torch."""
WITHOUT_TORCH = {"report", "config", "search", "errors", "progress"}
"""They know no model and no tensor."""
LONGEST = 400  # lines


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        module: its full name; of `from package import name` the submodule, where `name` is one.
        name: what is imported from it; empty where that is the module itself.
        line: where.
        inside: whether it stands inside a function.
    """

    module: str
    name: str
    line: int
    inside: bool

    @property
    def is_own(self) -> bool:
        """Whether it is LeanKV's."""
        return self.module.partition(".")[0] == "leankv"

    @property
    def package(self) -> str:
        """Which package of LeanKV's it belongs to."""
        return self.module.split(".")[1] if "." in self.module else "__init__"


def module_of(path: Path) -> str:
    """`leankv.cache.plan`; of an `__init__.py` its package."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def package_of(path: Path) -> str:
    """`cache`, `errors`, `__init__`."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def storey(package: str) -> int:
    """Counted from the top."""
    levels = [level for level, names in enumerate(STOREYS) if package in names]
    assert len(levels) == 1, f"{package} has no storey; give it one in STOREYS"
    return levels[0]


MODULES = {module_of(path): path for path in FILES}


def imports_in(node: ast.AST, inside: bool = False) -> Iterator[Import]:
    """Every import below a node of a file's tree, those under `if TYPE_CHECKING` too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, "", child.lineno, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            assert child.module is not None
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                if submodule in MODULES:
                    yield Import(submodule, "", child.lineno, inside)
                else:
                    yield Import(child.module, alias.name, child.lineno, inside)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_in(child, inside or is_function)


IMPORTS = {path: list(imports_in(ast.parse(path.read_text(encoding="utf-8")))) for path in FILES}


def lines_of(found: Iterable[tuple[Path, Import]]) -> str:
    """Where each import stands and what it imports, a line each, once."""
    return "\n".join(
        dict.fromkeys(
            f"{path.relative_to(REPOSITORY)} line {each.line}: {package_of(path)} imports {each.module}"
            for path, each in found
        )
    )


def every_import() -> Iterator[tuple[Path, Import]]:
    return ((path, each) for path, imports in IMPORTS.items() for each in imports)


def test_every_import_points_downwards() -> None:
    back = [
        (path, each)
        for path, each in every_import()
        if each.is_own and each.package != package_of(path) and storey(each.package) <= storey(package_of(path))
    ]
    assert not back, lines_of(back)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """By what stands at the top of files; an import inside a function closes no circle, and is found below."""
    imported = {
        module: sorted({each.module for each in IMPORTS[path] if each.is_own and not each.inside})
        for module, path in MODULES.items()
    }
    finished: set[str] = set()

    def circle_from(module: str, way: tuple[str, ...]) -> tuple[str, ...]:
        """The first circle that is met from a module on, reached by `way`; nothing where there is none."""
        if module in way:
            return (*way[way.index(module) :], module)
        if module not in finished:
            for other in imported.get(module, ()):
                if circle := circle_from(other, (*way, module)):
                    return circle
            finished.add(module)
        return ()

    for module in imported:
        circle = circle_from(module, ())
        assert not circle, " -> ".join(circle)


def test_imports_inside_functions_only_keep_torch_out_of_help() -> None:
    hidden = [
        (path, each)
        for path, each in every_import()
        if each.is_own and each.inside and package_of(path) not in MAY_WAIT
    ]
    assert not hidden, lines_of(hidden)


def test_who_knows_no_model_imports_no_torch() -> None:
    heavy = [
        (path, each)
        for path, each in every_import()
        if each.module.partition(".")[0] in ("torch", "transformers") and package_of(path) in WITHOUT_TORCH
    ]
    assert not heavy, lines_of(heavy)


@pytest.mark.parametrize("folder", ["leankv", "tests", "benchmarks", "examples"])
def test_no_file_is_longer_than_400_lines(folder: str) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (REPOSITORY / folder).rglob("*.py")}
    long = [f"{path.relative_to(REPOSITORY)}: {lines} lines" for path, lines in lengths.items() if lines > LONGEST]
    assert not long, "\n".join(long)
