"""A disk that is full: nothing finished is lost, and the run goes on when there is room."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.run_folders import invoke, refusal, refuse

pytestmark = pytest.mark.whole_runs


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Mounts a file system of so many bytes, and resizes it when called again; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def resize(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("this user may not mount a file system")
        mounted = True
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_the_run_goes_on(experiment: Path, finished: Path, small_disk: Any) -> None:
    """Full at once, during the capture, and among the codecs; each time there is a little more room."""
    full_at: set[str] = set()
    kept: dict[Path, int] = {}
    for kibibytes in range(4, 1000, 16):
        folder = small_disk(f"{kibibytes}k")
        result = invoke("run", experiment, "-o", folder, "--json")
        assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
        if result.exit_code == 0:
            break
        sentence = refusal(result)
        assert "No space left on device" in sentence
        full_at |= {name for name in ("activations", "codecs") if f"{folder}/{name}" in sentence}
        kept = {path: path.stat().st_mtime_ns for kind in ("cells", "codecs") for path in (folder / kind).glob("[!.]*")}
    assert full_at == {"activations", "codecs"}
    assert kept
    assert json.loads(result.stdout)["ppl"] == json.loads((finished / "summary.json").read_text())["ppl"]


def test_a_disk_that_fills_on_flushing(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems tell only when they are asked to write for real; nothing but empty lock files is left."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    sentence = refuse("sweep", "--config", experiment, "-o", tmp_path / "run")
    assert "No space left on device" in sentence
    assert str(tmp_path / "run") in sentence
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".lock"] == []
