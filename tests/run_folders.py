"""What tests of commands and of real processes share: how commands are run, and what they leave in a folder."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from typer.testing import CliRunner, Result

from leankv.cli import app
from leankv.config.loading import load_experiment
from leankv.config.notation import Shard
from leankv.progress import Silent
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.sweep import sweep
from leankv.studies.workspace import Workspace
from tests import tiny
from tests.forked import CommandProcess

Files = dict[str, tuple[int, int]]
"""Name -> inode and time of its last change."""

BLOCKS = 3
"""Of every split, in the experiment that the fixture `experiment` writes."""

LAYERS = 8
"""Of the model that the fixture `serial` sweeps."""

TIME_OUT = 300
"""Seconds; a worker takes about five and a run about ten, on a machine that does nothing beside them."""


# -- commands ----------------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    return result


def succeed_json(*arguments: object) -> Any:
    """What a command prints with --json; anything beside JSON on standard output fails."""
    return json.loads(succeed(*arguments, "--json").stdout)


def refuse(*arguments: object) -> str:
    """The sentence with which a command refuses."""
    return refusal(invoke(*arguments))


def refusal(result: Result) -> str:
    """The sentence on standard error; exit code 2, and nothing on standard output."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.splitlines()[-1] == errors[0], "the sentence comes last, on one line"
    return errors[0]


# -- folders -----------------------------------------------------------------------------------------------------------


def write_experiment(root: Path, n_layers: int, epochs: int, blocks: dict[str, int], **sections: Any) -> Path:
    """A tiny Llama, a text and an experiment with both, under `root`; `blocks` of 64 tokens for each split."""
    tiny.save(root / "model", tiny.build("llama", num_hidden_layers=n_layers))
    (root / "text.txt").write_text(tiny.text(60_000), encoding="utf-8")
    own_blocks = {f"{split}_blocks": count for split, count in blocks.items()}
    experiment = {
        "model": {"name": str(root / "model"), "device": "cpu", "dtype": "float32"},
        "data": {"dataset": str(root / "text.txt"), "block_length": 64, **own_blocks},
        "plan": "ae:4x16",
        "fit": {"epochs": epochs},
        "selection": {"strategy": "greedy"},
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


def write_factory(folder: Path, name: str, source: str) -> str:
    """A module in `folder`; `module:make` of it, as `--baseline` names it."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return f"{name}:make"


# -- plans and workspaces ----------------------------------------------------------------------------------------------


def evaluator_of(settings: Mapping[str, Any], folder: Path, shard: str = "1/1", **changes: Any) -> PlanEvaluator:
    """What measures plans in a folder, under settings by dotted keys."""
    experiment = load_experiment(None, {**settings, "output_dir": str(folder), **changes})
    return PlanEvaluator(Workspace.open(experiment, Silent(), Shard.parse(shard)))


def folder_of(evaluator: PlanEvaluator) -> Path:
    """Of a workspace that has one."""
    assert evaluator.workspace.folder is not None
    return evaluator.workspace.folder


# -- sweeps by several processes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """An experiment's file, and the table of its sweep by one process alone."""

    config: Path
    table: pd.DataFrame

    def command(self, folder: Path, *arguments: str) -> list[str]:
        """What `leankv` is called with."""
        return ["sweep", "--config", str(self.config), "-o", str(folder), *arguments]

    def evaluator(self, folder: Path, shard: str = "1/1", **changes: Any) -> PlanEvaluator:
        """A worker in this process."""
        experiment = load_experiment(self.config, {"output_dir": str(folder), **changes})
        return PlanEvaluator(Workspace.open(experiment, Silent(), Shard.parse(shard)))


def swept_by_one(root: Path) -> Sweep:
    """Write an experiment under `root`, and sweep it in this process; its folder is `root / "run"`."""
    config = write_experiment(root, LAYERS, 2, {"calibration": 12, "selection": 16, "report": 3})
    experiment = load_experiment(config, {"output_dir": str(root / "run")})
    sweep(PlanEvaluator(Workspace.open(experiment, Silent())))
    return Sweep(config, table_of(root / "run"))


def table_of(folder: Path) -> pd.DataFrame:
    """`sweep.csv` without the clock's column."""
    return pd.read_csv(folder / "sweep.csv").drop(columns="seconds")


def assert_swept(folder: Path, expected: Sweep) -> None:
    """All is there that one process alone writes, and nothing that workers leave on the way."""
    pd.testing.assert_frame_equal(table_of(folder), expected.table, check_exact=True)
    assert (folder / "sweep.md").exists()
    assert (folder / "figures/cost_by_layer.png").exists()
    assert len(list(folder.glob("cells/nats-selection-*.json"))) == 1 + LAYERS
    assert len(list(folder.glob("codecs/*.safetensors"))) == 2 * LAYERS
    assert not list(folder.glob("activations-*"))


def wait_for(point: Callable[[], bool], process: subprocess.Popen[str] | CommandProcess | None) -> None:
    """Until a process has come to some point; None is this process."""
    deadline = time.monotonic() + TIME_OUT
    while not point():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def layers_measured(folder: Path) -> int:
    return max(0, len(list(folder.glob("cells/nats-selection-*.json"))) - 1)


def worker_processes(folder: Path) -> dict[int, int]:
    """Number of a shard -> its latest worker, as the logs tell."""
    found: dict[int, int] = {}
    for log in folder.glob("logs/shard-*.log"):
        if pids := re.findall(r"^shard \d+/\d+: process (\d+) on", log.read_text(), re.MULTILINE):
            found[int(log.stem.removeprefix("shard-"))] = int(pids[-1])
    return found


def kill_the_first_worker(folder: Path, known: int | None = None) -> None:
    """As soon as it is at work for this process; not the one that is known, of an earlier pool."""
    wait_for(lambda: worker_processes(folder).get(1, known) != known, None)
    os.kill(worker_processes(folder)[1], signal.SIGKILL)
