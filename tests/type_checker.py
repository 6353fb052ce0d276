"""How annotations are checked while tests run: jaxtyping's pytest hook gives them to this, shapes and all."""

from types import ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import _import_hook

# A whole number serves where a float is asked for, as in every type checker of Python (PEP 484).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _run(loader: Any, module: ModuleType) -> None:
    """Run a checked module, compiled anew.

    While jaxtyping runs one itself, files of compiled code have other names, also for all that the module is the first
    to import: thousands of files of torch, transformers and pandas would be compiled anew in every process that tests.
    """
    exec(loader.source_to_code(loader.get_data(loader.path), loader.path), module.__dict__)


_import_hook._JaxtypingLoader.exec_module = _run  # type: ignore[method-assign]
