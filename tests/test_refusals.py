"""What commands find missing or not as it should be, and refuse in one sentence: models, text, bundles, folders."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from leankv.errors import UserError, sentence_of
from tests import tiny
from tests.run_folders import refuse, succeed

LEANKV = str(Path(sys.executable).with_name("leankv"))

BAD_TEXTS = {
    "empty": b"",
    "blank": b" \n\n \n",
    "not UTF-8": b"caf\xe9 au lait\n" * 50,
    "too short for splits": b"one line",
    "too short for blocks": b"a few words\n" * 40,
}


def test_a_mistake_exits_with_2_for_real() -> None:
    """The installed command, as a shell sees it."""
    done = subprocess.run([LEANKV, "sweep", "--set", "fit.epochs=x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: fit.epochs must be int, not 'x'\n"


def test_an_unknown_model(text_file: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    sentence = refuse("sweep", "-m", missing, "--dataset", text_file, "-o", tmp_path / "run")
    assert sentence == f"error: the model folder {missing} does not exist; check --model"


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("no such thing"), "no such thing"),
        (OutOfMemoryError("CUDA"), "--load-in-4bit"),
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), "run/x: No space left on device"),
        (OSError(errno.EACCES, "Permission denied"), "the disk: Permission denied"),
    ],
)
def test_what_users_can_mend_is_told_in_a_sentence(error: Exception, words: str) -> None:
    sentence = sentence_of(error)
    assert sentence is not None
    assert words in sentence


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError(errno.ENOENT, "x"), KeyboardInterrupt()])
def test_other_errors_want_their_traceback(error: BaseException) -> None:
    assert sentence_of(error) is None


def test_a_folder_without_a_model(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sentence = refuse("sweep", "--config", experiment, "-m", tmp_path / "empty", "-o", tmp_path / "run")
    assert str(tmp_path / "empty") in sentence
    assert "config.json" in sentence
    assert "config.json" in refuse("info", tmp_path / "empty")


@pytest.mark.parametrize("kind", list(BAD_TEXTS))
def test_bad_data(experiment: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(BAD_TEXTS[kind])
    assert str(path) in refuse("sweep", "--config", experiment, "--dataset", path, "-o", tmp_path / "run")
    assert str(path) in refuse("eval-ppl", "--config", experiment, "--dataset", path, "--split", "calibration")


def test_missing_data(experiment: Path, tmp_path: Path) -> None:
    for name in ("none.txt", "none.parquet", "none.csv"):
        path = tmp_path / name
        assert str(path) in refuse("sweep", "--config", experiment, "--dataset", path, "-o", tmp_path / "run")


def test_select_without_a_sweep(tmp_path: Path) -> None:
    sentence = refuse("select", "-o", tmp_path / "nothing", "--strategy", "greedy")
    assert str(tmp_path / "nothing") in sentence
    assert "leankv sweep" in sentence


def test_select_after_a_sweep_of_something_else(finished: Path) -> None:
    sentence = refuse("select", "-o", finished, "--set", "plan.k=pca:4")
    assert "pca:4" in sentence
    assert "ae:4x16" in sentence


@pytest.fixture
def swept(experiment: Path, text_file: Path, tmp_path: Path) -> Path:
    """The folder of a sweep whose text may change."""
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    common = ("--config", experiment, "--set", f"data.dataset={text}", "--codec", "mean")
    succeed("sweep", *common, "-o", tmp_path / "swept", "--layers", "0-1")
    return tmp_path / "swept"


@pytest.mark.parametrize(
    ("changed", "words"),
    [(slice(0, 300), "fitted to other text"), (slice(1000, None), "made with other selection text")],
    ids=["calibration", "all else"],
)
def test_select_after_a_sweep_of_other_text(swept: Path, changed: slice, words: str) -> None:
    """Of the same length, so that the splits are cut where they were."""
    text = swept.parent / "text.txt"
    letters = list(text.read_text(encoding="utf-8"))
    letters[changed] = ["z" if letter == "a" else letter for letter in letters[changed]]
    text.write_text("".join(letters), encoding="utf-8")
    sentence = refuse("select", "-o", swept)
    assert words in sentence
    assert "run leankv sweep again" in sentence


def test_select_after_a_sweep_on_another_device(swept: Path) -> None:
    """Its base cell says so."""
    (path,) = [path for path in (swept / "cells").glob("nats-selection-*") if '"codecs": {}' in path.read_text()]
    cell = json.loads(path.read_text())
    cell["depends_on"]["model"]["device"] = "cuda"
    path.write_text(json.dumps(cell))
    assert "was made with device cuda, not cpu" in refuse("select", "-o", swept)


def test_select_after_a_sweep_that_was_begun_again(swept: Path) -> None:
    """The table is then of the sweep before."""
    table = pd.read_csv(swept / "sweep.csv")
    table["base_ppl"] += 1e-6
    table.to_csv(swept / "sweep.csv", index=False)
    assert "begun again and not finished" in refuse("select", "-o", swept)


@pytest.mark.parametrize("command", [("eval-ppl",), ("generate", "once there was")], ids=["eval-ppl", "generate"])
def test_a_missing_bundle(finished: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    assert str(tmp_path / "none") in refuse(*command, "--bundle", tmp_path / "none")
    assert "leankv_config.json" in refuse(*command, "--bundle", finished / "cells")


def test_a_bundle_for_another_model(bundle: Path, tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.build("llama", seed=1))
    for command in (("eval-ppl",), ("generate", "once there was")):
        assert "weights" in refuse(*command, "--bundle", bundle, "-m", tmp_path)


def test_an_empty_prompt(bundle: Path) -> None:
    assert "prompt" in refuse("generate", "", "--bundle", bundle)


def test_chat_without_a_template(bundle: Path) -> None:
    assert "chat template" in refuse("generate", "hello", "--bundle", bundle, "--chat")


def test_an_output_folder_that_is_a_file(experiment: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine", encoding="utf-8")
    for command in (("sweep", "--config", experiment), ("run", experiment), ("capture", "--config", experiment)):
        assert str(path) in refuse(*command, "-o", path)
        assert str(path) in refuse(*command, "-o", path / "below")
    assert path.read_text(encoding="utf-8") == "mine"
