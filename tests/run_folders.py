"""What tests of real processes share: an experiment in a folder, and what a run has finished in its own."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests import tiny

Files = dict[str, tuple[int, int]]
"""Name -> inode and time of its last change."""


def write_experiment(root: Path, n_layers: int, epochs: int, blocks: dict[str, int], **sections: Any) -> Path:
    """A tiny Llama, a text and an experiment with both, under `root`; `blocks` of 64 tokens for each split."""
    tiny.save(root / "model", tiny.build("llama", num_hidden_layers=n_layers))
    (root / "text.txt").write_text(tiny.text(60_000), encoding="utf-8")
    own_blocks = {f"{split}_blocks": count for split, count in blocks.items()}
    experiment = {
        "model": {"name": str(root / "model"), "device": "cpu", "dtype": "float32"},
        "data": {"dataset": str(root / "text.txt"), "block_length": 64, **own_blocks},
        "codec": {"k": "ae:4x16", "v": "ae:4x16"},
        "fit": {"epochs": epochs},
        **sections,
    }
    path = root / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return path


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """A process that gives way to others, so that who watches it, to stop it at some point, is not too late."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: os.nice(10),
    )


def finished_files(folder: Path) -> Files:
    """The measurements and codecs that are finished, temporary files left out."""
    paths = [path for kind in ("cells", "codecs") for path in (folder / kind).glob("[!.]*")]
    return {f"{path.parent.name}/{path.name}": (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
