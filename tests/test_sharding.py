"""Sweeps by several workers: real processes that share a folder, die, and are started again, end where one ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from leankv.capture import capture
from leankv.cli import app
from leankv.errors import UserError
from leankv.executors import Job, crew, sweep_with_workers
from leankv.executors.crew import supervise
from leankv.executors.slurm import slurm_workers
from leankv.experiment import load_experiment
from leankv.gathering import gather
from leankv.progress import Progress, Silent
from leankv.run import Run
from leankv.shards import Shard
from leankv.sweep import sweep
from tests.run_folders import finished_files, start, write_experiment

LAYERS = 8
TIME_OUT = 120  # seconds; a worker takes about five
LEANKV = [sys.executable, "-m", "leankv"]


@dataclass(frozen=True)
class Sweep:
    """An experiment's file, and the table of its sweep by one process alone."""

    config: Path
    table: pd.DataFrame

    def command(self, folder: Path, *arguments: str) -> list[str]:
        return [*LEANKV, "sweep", "--config", str(self.config), "-o", str(folder), *arguments]

    def run(self, folder: Path, shard: str = "1/1", **changes: Any) -> Run:
        """A run in this process."""
        experiment = load_experiment(self.config, {"output_dir": str(folder), **changes})
        return Run(experiment, Silent(), Shard.parse(shard))


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    root = tmp_path_factory.mktemp("serial")
    config = write_experiment(root, LAYERS, 2, {"calibration": 20, "selection": 40, "report": 4})
    sweep(Run(load_experiment(config, {"output_dir": str(root / "run")}), Silent()))
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


def wait_for(point: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIME_OUT
    while not point():
        assert process.poll() is None, process.communicate()[1]
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


def refuse(*arguments: object) -> str:
    """The sentence with which `leankv sweep` refuses."""
    result = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    assert result.exit_code == 2, repr(result.exception)
    assert result.stdout == ""
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1] == sentence
    return sentence


# -- shards ------------------------------------------------------------------------------------------------------------


def test_shards_one_after_another_make_the_same_sweep(serial: Sweep, tmp_path: Path) -> None:
    for shard in ("3/3", "1/3", "2/3"):
        assert not (tmp_path / "sweep.csv").exists()
        sweep(serial.run(tmp_path, shard))
    assert_swept(tmp_path, serial)


def test_more_shards_than_layers(serial: Sweep, tmp_path: Path) -> None:
    """Those without a layer have nothing to do."""
    assert len(sweep(serial.run(tmp_path, "3/3", layers="0-1"))) == 0
    assert not list(tmp_path.glob("codecs/*"))
    result = CliRunner().invoke(app, [*serial.command(tmp_path, "--shard", "3/3", "--layers", "0-1")[3:]])
    assert result.exit_code == 0
    assert "yet to do layers 0 1" in result.stdout


def test_workers_at_once_make_the_same_sweep_and_nothing_twice(serial: Sweep, tmp_path: Path) -> None:
    """Every stage shows in one log only."""
    processes = [start(serial.command(tmp_path, "--shard", shard)) for shard in ("1/3", "2/3", "3/3")]
    logs = [process.communicate(timeout=TIME_OUT)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, logs
    assert_swept(tmp_path, serial)
    text = "".join(logs)
    assert len(re.findall(r"^base perplexity.*steps$", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^capturing.*steps$", text, re.MULTILINE)) == 3
    assert len(re.findall(r"^fitting.*steps$", text, re.MULTILINE)) == 3


COMPUTE_ONCE = """
import os, pathlib, sys, time
from leankv.store import Cells

folder = pathlib.Path(sys.argv[1])

def compute():
    with (folder / "computed").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(sys.argv[2]))
    return {"ppl": 1.0}

print("ready", flush=True)
assert Cells(folder / "cells").get_or_compute("nats", {"seed": 1}, compute) == {"ppl": 1.0}
"""


def test_a_cell_that_many_want_is_computed_once(tmp_path: Path) -> None:
    processes = [start([sys.executable, "-c", COMPUTE_ONCE, str(tmp_path), "0.5"]) for _ in range(4)]
    for process in processes:
        _, stderr = process.communicate(timeout=TIME_OUT)
        assert process.returncode == 0, stderr
    assert len((tmp_path / "computed").read_text().split()) == 1


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    dies = start([sys.executable, "-c", COMPUTE_ONCE, str(tmp_path), "1000"])
    wait_for(lambda: (tmp_path / "computed").exists(), dies)
    waits = start([sys.executable, "-c", COMPUTE_ONCE, str(tmp_path), "0"])
    assert waits.stdout is not None
    assert waits.stdout.readline() == "ready\n"
    dies.kill()
    dies.communicate()
    _, stderr = waits.communicate(timeout=TIME_OUT)
    assert waits.returncode == 0, stderr
    assert (tmp_path / "computed").read_text().split() == [str(dies.pid), str(waits.pid)]


def test_a_worker_killed_in_mid_sweep_goes_on_where_it_was(serial: Sweep, tmp_path: Path) -> None:
    process = start(serial.command(tmp_path, "--shard", "1/2"))
    wait_for(lambda: layers_measured(tmp_path) >= 2, process)
    process.kill()
    process.communicate()
    before = finished_files(tmp_path)
    assert layers_measured(tmp_path) < LAYERS / 2
    for shard in ("1/2", "2/2"):
        sweep(serial.run(tmp_path, shard))
    assert_swept(tmp_path, serial)
    after = finished_files(tmp_path)
    assert {name: after[name] for name in before} == before


def test_workers_with_the_same_shard_fit_it_once(
    serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[object] = []

    def counted(*arguments: Any) -> Any:
        captures.append(arguments)
        return capture(*arguments)

    monkeypatch.setattr("leankv.workplace.capture", counted)
    runs = [serial.run(tmp_path, "1/2") for _ in range(3)]
    threads = [Thread(target=run.fitted, args=([0, 2],)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(captures) == 1
    assert all(set(run.fitted([0, 2])) == {(0, "k"), (0, "v"), (2, "k"), (2, "v")} for run in runs)


def test_captures_of_shards_are_their_own(serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker's capture serves the same shard again, and is removed then."""
    first, second = (serial.run(tmp_path, shard) for shard in ("1/3", "2/3"))
    captures = [run.captured(list(run.shard.part(run.layers))) for run in (first, second)]
    assert captures[0].folder != captures[1].folder
    monkeypatch.setattr("leankv.workplace.capture", pytest.fail)
    sweep(serial.run(tmp_path, "2/3"))
    assert [each.folder.exists() for each in captures] == [True, False]


def test_a_half_made_capture_is_none(serial: Sweep, tmp_path: Path) -> None:
    """Of this shard, and of one that nobody takes up again."""
    run = serial.run(tmp_path, "1/2")
    for shard in ("1/2", "3/7"):
        half = serial.run(tmp_path, shard).captured([0, 2]).folder
        (half / "manifest.json").unlink()
        (half / "layer-000.safetensors").write_bytes(b"half")
    sweep(run)
    sweep(serial.run(tmp_path, "2/2"))
    assert_swept(tmp_path, serial)


@pytest.mark.parametrize("text", ["0/8", "9/8", "x", "2", "1/0", "-1/8", "1/2/3", "", "1/", "1.5/2"])
def test_a_bad_shard(serial: Sweep, tmp_path: Path, text: str) -> None:
    sentence = refuse("--config", serial.config, "-o", tmp_path, f"--shard={text}")
    assert repr(text) in sentence
    assert "8/8" in sentence


@pytest.mark.parametrize("count", range(1, 12))
def test_shards_share_the_layers_out(count: int) -> None:
    layers = (0, 2, *range(5, 12))
    parts = [shard.part(layers) for shard in Shard.all_of(count)]
    assert sorted(layer for part in parts for layer in part) == list(layers)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# -- gathering ---------------------------------------------------------------------------------------------------------


def test_gathering_names_what_is_missing(serial: Sweep, tmp_path: Path) -> None:
    assert "leankv sweep" in refuse("--gather", "-o", tmp_path)
    sweep(serial.run(tmp_path, "2/3"))
    sentence = refuse("--gather", "-o", tmp_path)
    assert "layers 0, 2, 3, 5, 6;" in sentence
    assert f"leankv sweep --config {tmp_path}/experiment.yaml --output-dir {tmp_path}" in sentence
    assert not (tmp_path / "sweep.csv").exists()


def test_gathering_computes_nothing(serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the model is loaded."""
    shutil.copytree(serial.config.parent / "run", tmp_path, dirs_exist_ok=True)
    for name in ("sweep.csv", "sweep.md", "figures/cost_by_layer.png"):
        (tmp_path / name).unlink()
    before = finished_files(tmp_path)
    monkeypatch.setattr("leankv.workplace.load_model", pytest.fail)
    result = CliRunner().invoke(app, ["sweep", "--gather", "-o", str(tmp_path), "--json"])
    assert result.exit_code == 0
    assert [row["layer"] for row in json.loads(result.stdout)] == list(range(LAYERS))
    assert_swept(tmp_path, serial)
    assert finished_files(tmp_path) == before


# -- one folder, one experiment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fit.epochs", 3, "fit.epochs 2, not 3"),
        ("codec.k", "pca:2", "codec.k ae:4x16, not pca:2"),
        ("data.selection_blocks", 3, "data.selection_blocks 40, not 3"),
        ("protocol.sinks", 1, "protocol.sinks 4, not 1"),
        ("model.revision", "main", "model.revision null, not main"),
        ("seed", 1, "seed 0, not 1"),
    ],
)
def test_other_settings_are_refused(
    serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, words: str
) -> None:
    (tmp_path / "experiment.yaml").write_bytes((serial.config.parent / "run" / "experiment.yaml").read_bytes())
    monkeypatch.setattr("leankv.workplace.load_model", pytest.fail)  # refused at once
    for way in ((), ("--shard", "1/2"), ("--executor", "local"), ("--gather",)):
        sentence = refuse("--config", serial.config, "-o", tmp_path, "--set", f"{key}={value}", *way)
        assert sentence == f"error: {tmp_path} was begun with {words}; choose another --output-dir"


def test_settings_that_may_differ(serial: Sweep, tmp_path: Path) -> None:
    serial.run(tmp_path)
    changes = {
        "layers": "1-2",
        "selection.budget": "7%",
        "selection.layers": "1",
        "memory_budget": 1.0,
        "model.device": "auto",
        "data.data_dir": str(tmp_path),
    }
    serial.run(tmp_path, **changes)
    assert yaml.safe_load((tmp_path / "experiment.yaml").read_text())["layers"] == "1-2"


def test_a_model_that_does_not_load_claims_no_folder(serial: Sweep, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        serial.run(tmp_path, **{"model.name": str(tmp_path / "none")})
    serial.run(tmp_path)


# -- executors ---------------------------------------------------------------------------------------------------------


def test_local_workers_are_stopped_by_ctrl_c_and_started_again_when_killed(
    serial: Sweep, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = serial.command(tmp_path, "--executor", "local", "--workers", "2")
    interrupted = start(command)
    wait_for(lambda: layers_measured(tmp_path) >= 1 and len(worker_processes(tmp_path)) == 2, interrupted)
    interrupted.send_signal(signal.SIGINT)
    _, stderr = interrupted.communicate(timeout=TIME_OUT)
    assert interrupted.returncode == 2
    assert stderr.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in stderr
    stopped = worker_processes(tmp_path)
    assert not any(Path(f"/proc/{pid}").exists() for pid in stopped.values())
    assert not (tmp_path / "sweep.csv").exists()
    before = finished_files(tmp_path)

    killer = Thread(target=kill_the_first_worker, args=(tmp_path, stopped[1]))
    killer.start()
    experiment = load_experiment(serial.config, {"output_dir": str(tmp_path)})
    sweep_with_workers(experiment, "local", 2, None, Progress())
    killer.join()
    assert "shard 1/2 died (by SIGKILL) and is started again" in capfd.readouterr().err
    assert_swept(tmp_path, serial)
    after = finished_files(tmp_path)
    assert {name: after[name] for name in before} == before


def kill_the_first_worker(folder: Path, known: int | None) -> None:
    """As soon as it is at work; not the one that is known, of an earlier crew."""
    deadline = time.monotonic() + TIME_OUT
    while (pid := worker_processes(folder).get(1, known)) == known:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_a_ray_worker_that_is_killed_is_started_again(serial: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    process = start(serial.command(tmp_path, "--executor", "ray", "--workers", "2"))
    kill_the_first_worker(tmp_path, None)
    stdout, stderr = process.communicate(timeout=TIME_OUT)
    assert process.returncode == 0, stderr
    assert "cheapest first" in stdout
    assert "shard 1/2 died (" in stderr
    assert_swept(tmp_path, serial)


def test_slurm_jobs(serial: Sweep, tmp_path: Path) -> None:
    """By submitit's executor for this machine, which takes jobs as Slurm does."""
    pytest.importorskip("submitit")
    experiment = load_experiment(serial.config, {"output_dir": str(tmp_path)})
    config = tmp_path / "experiment.yaml"
    config.write_text(experiment.to_yaml(), encoding="utf-8")
    with slurm_workers(Job(config, tmp_path, 2, Path.cwd()), None, cluster="local") as start_jobs:
        supervise(experiment, Shard.all_of(2), start_jobs, Silent())
    gather(experiment)
    assert_swept(tmp_path, serial)
    assert "sweeping 4 layers" in (tmp_path / "logs/shard-2.log").read_text()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:x"])
def test_a_ray_cluster_that_does_not_answer(serial: Sweep, tmp_path: Path, address: str) -> None:
    pytest.importorskip("ray")
    started = time.monotonic()
    sentence = refuse("--config", serial.config, "-o", tmp_path, "--executor", "ray", "--address", address)
    assert address in sentence
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(("executor", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra(
    serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    sentence = refuse("--config", serial.config, "-o", tmp_path, "--executor", executor)
    assert f"pip install 'leankv[{executor}]'" in sentence


def test_a_machine_without_slurm(serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    assert "no Slurm" in refuse("--config", serial.config, "-o", tmp_path, "--executor", "slurm")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--executor", "magic"), "local, ray, slurm"),
        (("--workers", "3"), "--executor"),
        (("--address", "here"), "--executor ray"),
        (("--executor", "local", "--address", "here"), "--executor ray"),
        (("--executor", "local", "--screen"), "leave --executor or --screen"),
        (("--gather", "--predict"), "leave --gather or --screen"),
        (("--shard", "1/2", "--gather"), "choose one"),
        (("--shard", "1/2", "--executor", "local"), "choose one"),
    ],
)
def test_options_that_do_not_go_together(serial: Sweep, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refuse("--config", serial.config, "-o", tmp_path, *arguments)


def test_what_a_worker_refuses_is_told_at_once(serial: Sweep, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    sentence = refuse("--config", serial.config, "-m", missing, "-o", tmp_path, "--executor", "local", "--workers", 1)
    assert sentence == f"error: the model folder {missing} does not exist; check --model"
    assert not (tmp_path / "experiment.yaml").exists()


class Dying:
    """A worker that dies at once."""

    log = Path("results/x/logs/shard-2.log")
    started = 0

    def __init__(self) -> None:
        type(self).started += 1

    def ended(self) -> str | None:
        return "by SIGSEGV"

    def stop(self, force: bool) -> None:
        pass


class Idle(Dying):
    """A worker that works until it is stopped."""

    forced = False

    def ended(self) -> str | None:
        return "" if Idle.forced else None

    def stop(self, force: bool) -> None:
        Idle.forced = Idle.forced or force


def test_a_worker_that_always_dies_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "LOOK_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(crew, "STOP_SECONDS", 0.0)
    experiment = load_experiment(None, {"output_dir": str(tmp_path)})
    with pytest.raises(UserError, match=r"shard 2/2 died 4 times \(by SIGSEGV\); its log is results/x/logs/shard-2"):
        supervise(
            experiment,
            Shard.all_of(2),
            lambda shards: [Dying() if shard.index == 2 else Idle() for shard in shards],
            Silent(),
        )
    assert Dying.started == 4
    assert Idle.forced
