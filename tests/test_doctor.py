"""What `leankv doctor` says of this installation, and of one that lacks something."""

import io
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from leankv import compiled
from leankv.cli import app
from leankv.report.tables import text_table
from leankv.studies import doctor
from leankv.studies.doctor import BROKEN, MISSING, OK, Finding

pytestmark = pytest.mark.whole_runs


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model takes seconds to load."""
    monkeypatch.setattr(doctor, "_embedded", lambda: Finding("embedded model smollm2-135m", OK, "30 layers"))


def by_name(folder: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(folder)}


def test_this_installation_is_sound(no_model: None, tmp_path: Path) -> None:
    found = by_name(tmp_path)
    assert [finding for finding in found.values() if finding.state == BROKEN] == []
    assert found["torch"].told == torch.__version__
    assert found["extra cpu"].state == OK
    assert "extra dev" not in found
    assert found["CUDA"].state == (OK if torch.cuda.is_available() else MISSING)
    assert found["bitsandbytes, NF4"].state == OK


def test_what_is_missing_is_named_with_a_remedy(
    no_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = doctor.version

    def version(name: str) -> str:
        if name in ("numba", "safetensors"):
            raise PackageNotFoundError(name)
        return "0.1" if name == "typer" else stock(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(compiled, "compiler", lambda: "none")
    found = by_name(tmp_path)
    assert found["extra cpu"] == Finding("extra cpu", MISSING, "numba not installed", "pip install 'leankv[cpu]'")
    assert found["compiled loops"].remedy == "pip install 'leankv[cpu]'"
    assert found["safetensors"].state == found["typer"].state == BROKEN
    assert found["typer"].remedy.startswith("pip install 'typer>=")


def test_whatever_a_library_raises_is_told(no_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Finding:
        raise OSError("libcudart.so.12: cannot open shared object file\nmore")

    monkeypatch.setattr(doctor, "_four_bits", fails)
    finding = by_name(tmp_path)["bitsandbytes, NF4"]
    assert finding.state == BROKEN
    assert finding.told == "OSError: libcudart.so.12: cannot open shared object file"
    ran = CliRunner().invoke(app, ["doctor"])
    assert ran.exit_code == 1


def test_square_brackets_are_shown() -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(text_table("", ["to mend it"], [["pip install 'leankv[cpu]'"]]))
    assert "pip install 'leankv[cpu]'" in console.file.getvalue()  # type: ignore[attr-defined]


def test_doctor_is_a_command(no_model: None) -> None:
    ran = CliRunner().invoke(app, ["doctor", "--json"])
    assert ran.exit_code == 0, ran.output
    names = [finding["name"] for finding in json.loads(ran.stdout)]
    assert names[0] == "leankv"
    assert "embedded model smollm2-135m" in names
