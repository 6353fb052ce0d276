"""LeanKV's own files as they travel in a repository: those that a bundle needs, flat, importing each other relatively.

Transformers copies what a modeling file imports relatively, from its own folder only, and refuses to go on where a
package is missing that one of these files imports. So `leankv/codecs/base.py` becomes `leankv_codecs_base.py`, imports
are rewritten where they stand, and all else is as it was, comments included.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from leankv.codecs import FAMILIES

ROOT = Path(__file__).parent.parent

MODELING, CONFIGURATION = "leankv.export.modeling_leankv", "leankv.export.configuration_leankv"

OWN_NAMES = {module: module.rpartition(".")[2] for module in (MODELING, CONFIGURATION, "leankv.export.leankv_shapes")}
"""These keep the names of their files."""

FAMILIES_MODULE = "leankv.codecs.families"
"""Imports every family there is; in a repository, those that are in use."""

PRESENT = frozenset({"numpy", "safetensors", "torch", "transformers", *sys.stdlib_module_names})
"""What is there wherever transformers loads a model. Whoever imports other packages does so where they are needed."""


def travelling_files(families: Iterable[str]) -> dict[str, str]:
    """File name -> text, of all that a model with a bundle of these codec families needs.

    Args:
        families: names of families of LeanKV's own.
    """
    modules = sorted({FAMILIES[family].__module__ for family in families})
    texts = {FAMILIES_MODULE: _importing("The codec families that are in use.", modules)}
    waiting = [MODELING, *modules]
    while waiting:
        module = waiting.pop()
        if module not in texts:
            texts[module] = path_of(module).read_text(encoding="utf-8")
            waiting += imported(texts[module])
    needed = sorted(set(texts) - {MODELING})
    files = {f"{flat(module)}.py": rewritten(text) for module, text in texts.items()}
    files[f"{flat(MODELING)}.py"] += _all_named(needed)
    return files


def path_of(module: str) -> Path:
    """The file of one of our modules."""
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def flat(module: str) -> str:
    """The name that a module has in a repository."""
    return OWN_NAMES.get(module, module.replace(".", "_"))


def imported(text: str) -> Iterator[str]:
    """Our own modules that a module imports, those that it imports by name when it needs them included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and _is_own(node.module):
            yield from (target for target, _ in _targets(node))
        elif (name := _imported_later(node)) is not None:
            yield str(name.value)
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxtyping":
            yield "leankv.export.leankv_shapes"


def rewritten(text: str) -> str:
    """A module's text with imports as they are in a flat folder."""
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    # From the end on, so that what stands before keeps its place.
    for node in sorted(ast.walk(tree), key=lambda node: getattr(node, "lineno", 0), reverse=True):
        if (name := _imported_later(node)) is not None:
            line = lines[name.lineno - 1]
            new = f'f"{{__package__}}.{flat(str(name.value))}"'
            lines[name.lineno - 1] = line[: name.col_offset] + new + line[name.end_col_offset :]
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        new_lines = list(_statement(node))
        if new_lines:
            indent = " " * node.col_offset
            lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in new_lines]
    return "".join(lines)


def _statement(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The lines that stand in place of an import; none where it stays."""
    if isinstance(node, ast.ImportFrom) and _is_own(node.module):
        names = [ast.unparse(alias) for target, alias in _targets(node) if target == node.module]
        if names:
            yield f"from .{flat(node.module or '')} import {', '.join(names)}"
        for target, alias in _targets(node):
            if target != node.module:  # a module itself
                yield f"from . import {flat(target)} as {alias.asname or alias.name}"
        return
    if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping":
        yield f"from .leankv_shapes import {', '.join(alias.name for alias in node.names)}"
        return
    packages = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    if not all(package.partition(".")[0] in PRESENT for package in packages):
        # What stands in `try` is not asked for beforehand.
        yield from ("try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise")


def _targets(node: ast.ImportFrom) -> Iterator[tuple[str, ast.alias]]:
    """Which module each name is imported from, or is."""
    assert node.module is not None
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield (inner if path_of(inner).is_file() else node.module), alias


def _imported_later(node: ast.AST) -> ast.Constant | None:
    """The name in `import_module("leankv...")`."""
    if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "import_module":
        return None
    name = node.args[0]
    return name if isinstance(name, ast.Constant) and _is_own(str(name.value)) else None


def _is_own(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == "leankv"


def _importing(docstring: str, modules: Iterable[str]) -> str:
    lines = [f"from {module.rpartition('.')[0]} import {module.rpartition('.')[2]}\n" for module in modules]
    return f'"""{docstring}"""\n\n' + "".join(lines)


def _all_named(modules: Iterable[str]) -> str:
    """Imports that are never run: transformers copies the files that it finds named in the modeling file."""
    lines = [f"    from .{flat(module)} import *\n" for module in modules]
    return "\n\nif False:  # the files that travel along: transformers reads their names here\n" + "".join(lines)
