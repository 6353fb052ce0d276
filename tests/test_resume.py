"""`leankv run` as a real process that is killed again and again, and still ends where an undisturbed run ends."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.forked import CommandProcess
from tests.run_folders import LAYERS, TIME_OUT, Files, evaluator_of, finished_files, write_experiment

pytestmark = pytest.mark.whole_runs


def count(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


def capturing(folder: Path) -> bool:
    return count(folder, "activations-*/*.safetensors") > 0


def fitted(folder: Path) -> bool:
    return count(folder, "codecs/[!.]*") > 0


def two_layers_swept(folder: Path) -> bool:
    return count(folder, "cells/nats-selection-*") >= 1 + 2  # with the base run


def three_layers_swept(folder: Path) -> bool:
    return count(folder, "cells/nats-selection-*") >= 1 + 3


def selecting(folder: Path) -> bool:
    return count(folder, "cells/nats-selection-*") > 1 + LAYERS


POINTS: list[tuple[Callable[[Path], bool], signal.Signals]] = [
    (capturing, signal.SIGKILL),
    (fitted, signal.SIGKILL),
    (two_layers_swept, signal.SIGKILL),
    (three_layers_swept, signal.SIGINT),
    (selecting, signal.SIGKILL),
]


@dataclass(frozen=True)
class Stop:
    """A run that was stopped, and what it left."""

    point: str
    exit_code: int
    stderr: str
    files: Files
    complete: bool


def start(experiment: Path, folder: Path) -> CommandProcess:
    return CommandProcess(["run", str(experiment), "-o", str(folder)])


def run_to_the_end(experiment: Path, folder: Path) -> None:
    process = start(experiment, folder)
    _, stderr = process.communicate(timeout=TIME_OUT)
    assert process.returncode == 0, stderr


def stop_at(point: Callable[[Path], bool], with_signal: signal.Signals, experiment: Path, folder: Path) -> Stop:
    """Start the run, and stop it as soon as its folder shows that it got to `point`."""
    process = start(experiment, folder)
    deadline = time.monotonic() + TIME_OUT
    while not point(folder):
        assert process.poll() is None, f"the run ended before it was {point.__name__}: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(with_signal)
    _, stderr = process.communicate(timeout=TIME_OUT)
    complete = (folder / "summary.json").exists() or (folder / "manifest.json").exists()
    return Stop(point.__name__, process.returncode, stderr, finished_files(folder), complete)


@dataclass(frozen=True)
class History:
    """An undisturbed run, and one that was stopped at each of `POINTS` in turn."""

    undisturbed: Path
    disturbed: Path
    stops: list[Stop]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    root = tmp_path_factory.mktemp("resume")
    blocks = {"calibration": 30, "selection": 12, "report": 3}
    path = write_experiment(root, LAYERS, 2, blocks, selection={"budget": "1000%", "strategy": "greedy"})
    run_to_the_end(path, root / "undisturbed")
    stops = [stop_at(point, with_signal, path, root / "disturbed") for point, with_signal in POINTS]
    run_to_the_end(path, root / "disturbed")
    return History(root / "undisturbed", root / "disturbed", stops)


def results(folder: Path) -> tuple[Any, pd.DataFrame, Any]:
    """What must not depend on how often a run was stopped: summary, sweep and selection without the clock's figures."""
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("seconds", "peak_rss_bytes"):
        del summary[name]
    return summary, pd.read_csv(folder / "sweep.csv").drop(columns="seconds"), (folder / "selection.json").read_text()


def test_the_runs_were_stopped_on_the_way(history: History) -> None:
    assert not any(stop.complete for stop in history.stops)
    assert [stop.exit_code for stop in history.stops if stop.point != three_layers_swept.__name__] == [-9] * 4
    during_capture = history.stops[0]
    assert during_capture.files == {}


def test_a_run_that_was_killed_ends_with_the_same_figures(history: History) -> None:
    disturbed, undisturbed = results(history.disturbed), results(history.undisturbed)
    assert disturbed[0] == undisturbed[0]
    pd.testing.assert_frame_equal(disturbed[1], undisturbed[1], check_exact=True)
    assert disturbed[2] == undisturbed[2]
    assert len(disturbed[0]["selected_layers"]) == LAYERS


def test_nothing_finished_is_made_again(history: History) -> None:
    """A file that existed when the run was killed is the same file at the end, untouched."""
    end = finished_files(history.disturbed)
    for stop in history.stops:
        assert {name: end.get(name) for name in stop.files} == stop.files, stop.point


def test_no_measurement_is_made_twice_under_another_name(history: History) -> None:
    made = {name for name in finished_files(history.disturbed) if not name.startswith("cells/capture")}
    assert made == {name for name in finished_files(history.undisturbed) if not name.startswith("cells/capture")}


def test_a_finished_run_leaves_no_activations(history: History) -> None:
    """They are large, and nothing needs them any more."""
    assert count(history.disturbed, "activations-*") == 0


def test_an_interrupted_run_says_so_in_one_line(history: History) -> None:
    (stop,) = [stop for stop in history.stops if stop.point == three_layers_swept.__name__]
    assert stop.exit_code == 2
    assert "Traceback" not in stop.stderr
    lines = [line for line in stop.stderr.splitlines() if "interrupted" in line]
    assert len(lines) == 1
    assert stop.stderr.rstrip().endswith(lines[0])


@pytest.mark.parametrize("spec", ["ae:4x16", "pca:4", "resid(share:-1,int:4)"])
def test_codecs_that_are_fitted_later_have_the_same_bits(settings: dict[str, Any], tmp_path: Path, spec: str) -> None:
    """A run that is killed between two codec files fits the rest in a smaller batch: that must not show."""

    def fit() -> None:
        evaluator = evaluator_of(settings, tmp_path, plan=spec)
        evaluator.codecs.fit([evaluator.workspace.plan])

    fit()
    paths = sorted((tmp_path / "codecs").iterdir())
    before = [load_file(path) for path in paths]
    for lost in (paths[2:5], paths[:7]):
        for path in lost:
            path.unlink()
        fit()
        for path, expected in zip(paths, before, strict=True):
            tensors = load_file(path)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items()), path.name
