"""Fixtures that several test files use."""

import os
from pathlib import Path
from typing import Any

# The tensors of tiny models gain nothing from more threads, and the numbers are the same on every machine. Set before
# torch is imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tests import tiny


@pytest.fixture(params=list(tiny.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return str(request.param)


@pytest.fixture
def model(architecture: str) -> Any:
    """A tiny model of each architecture in turn."""
    return tiny.build(architecture)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer."""
    return tiny.save(tmp_path_factory.mktemp("llama"), tiny.build("llama"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text long enough for four splits of short blocks."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.text(60_000), encoding="utf-8")
    return path


@pytest.fixture
def settings(llama_folder: Path, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Overrides of a whole experiment that takes a second or two."""
    return {
        "model.name": str(llama_folder),
        "model.device": "cpu",
        "data.dataset": str(text_file),
        "data.block_length": 48,
        "data.calibration_blocks": 12,
        "data.selection_blocks": 3,
        "data.report_blocks": 4,
        "codec.k": "ae:4x16",
        "codec.v": "ae:4x16",
        "fit.epochs": 2,
        "protocol.sinks": 0,
        "selection.budget": "50%",
        "output_dir": str(tmp_path / "run"),
    }
