"""The scripts under `examples/` run, and print what they promise."""

import runpy
from pathlib import Path

import pytest

from leankv.codecs import FAMILIES
from tests import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"
BLOCK = 64


def run(script: str, model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / script))["main"](str(model), str(text), BLOCK)
    return capsys.readouterr().out


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.text(3000), encoding="utf-8")
    return path


def test_there_are_no_others() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {"smaller_cache.py", "codec_of_my_own.py", "edited_model.py"}


def test_a_smaller_cache(llama_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("smaller_cache.py", llama_folder, text_file, capsys)
    assert "bytes held for 420 tokens, layers 0-3: transform:s0.02, pre-rope keys" in printed


def test_a_codec_of_one_s_own(
    llama_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leankv.codecs.registry.FAMILIES", known := dict(FAMILIES))
    lines = run("codec_of_my_own.py", llama_folder, text_file, capsys).splitlines()
    assert [line.split()[0] for line in lines] == ["sign", "resid(pca:8,sign)", "int:2", "mean"]
    assert lines[0].split()[1] == "32", "one bit for each of 32 channels"
    assert "sign" in known


def test_sweeping_an_edited_model(llama_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("edited_model.py", llama_folder, text_file, capsys).splitlines()
    assert lines[0].split() == ["layer", "delta_ppl", "delta_ppl_edited"]
    costs = [line.split()[1:] for line in lines[1:]]
    assert len(costs) == 4
    assert any(before != after for before, after in costs)
