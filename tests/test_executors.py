"""Worker pools, local, on Ray and under Slurm: workers that die are started again, and all are stopped at the end.

A search by workers on Ray, one of which is killed, stands in `tests/test_select_plan.py`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from leankv.config.loading import load_experiment
from leankv.config.notation import Shard
from leankv.errors import UserError
from leankv.executors import pool
from leankv.executors.dispatch import WorkerOptions, follow_sweep, sweep_with_workers
from leankv.executors.local import share_of
from leankv.executors.pool import Job, Worker, watched
from leankv.executors.slurm import slurm_workers
from leankv.executors.worker import work
from leankv.progress import Progress, Silent
from leankv.studies.sweep_table import gather
from tests.forked import CommandProcess, ForkedWorker
from tests.run_folders import (
    TIME_OUT,
    Sweep,
    assert_swept,
    finished_files,
    kill_the_first_worker,
    layers_measured,
    refuse,
    wait_for,
    worker_processes,
)

pytestmark = pytest.mark.whole_runs


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local workers are copies of this process; `tests/test_select_plan.py` starts them as users do."""
    names = ("DEVNULL", "PIPE", "CalledProcessError", "run")
    stand_in = SimpleNamespace(Popen=ForkedWorker, **{name: getattr(subprocess, name) for name in names})
    monkeypatch.setattr("leankv.executors.local.subprocess", stand_in)


@pytest.mark.usefixtures("forked_workers")
def test_local_workers_are_stopped_by_ctrl_c_and_started_again_when_killed(
    serial: Sweep, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = serial.command(tmp_path, "--executor", "local", "--workers", "2")
    interrupted = CommandProcess(command)
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
    sweep_with_workers(experiment, WorkerOptions("local", 2), Progress())
    killer.join()
    assert "shard 1/2 died (by SIGKILL) and is started again" in capfd.readouterr().err
    assert_swept(tmp_path, serial)
    after = finished_files(tmp_path)
    assert {name: after[name] for name in before} == before


def test_slurm_jobs(serial: Sweep, tmp_path: Path) -> None:
    """By submitit's executor for this machine, which takes jobs as Slurm does."""
    pytest.importorskip("submitit")
    experiment = load_experiment(serial.config, {"output_dir": str(tmp_path)})
    config = tmp_path / "experiment.yaml"
    config.write_text(experiment.to_yaml(), encoding="utf-8")
    job = Job(config, tmp_path, 2, Path.cwd())
    with (
        slurm_workers(job, None, cluster="local") as start_jobs,
        watched(tmp_path, Shard.all_of(2), start_jobs, Silent()) as at_work,
    ):
        follow_sweep(experiment, 2, at_work, Silent())
    gather(experiment)
    assert_swept(tmp_path, serial)
    assert "sweeping 4 layers" in (tmp_path / "logs/shard-2.log").read_text()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:x"])
def test_a_ray_cluster_that_does_not_answer(serial: Sweep, tmp_path: Path, address: str) -> None:
    pytest.importorskip("ray")
    started = time.monotonic()
    sentence = refuse("sweep", "--config", serial.config, "-o", tmp_path, "--executor", "ray", "--address", address)
    assert address in sentence
    assert time.monotonic() - started < 60


def test_ray_that_does_not_start(serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    sentence = refuse("sweep", "--config", serial.config, "-o", tmp_path, "--executor", "ray")
    assert "Ray does not start on this machine (" in sentence
    assert "--executor local" in sentence


@pytest.mark.parametrize(("executor", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra(
    serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    sentence = refuse("sweep", "--config", serial.config, "-o", tmp_path, "--executor", executor)
    assert f"pip install 'leankv[{executor}]'" in sentence


def test_a_machine_without_slurm(serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    assert "no Slurm" in refuse("sweep", "--config", serial.config, "-o", tmp_path, "--executor", "slurm")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--executor", "magic"), "local, ray, slurm"),
        (("--workers", "3"), "--executor"),
        (("--address", "here"), "--executor ray"),
        (("--executor", "local", "--address", "here"), "--executor ray"),
        (("--executor", "local", "--screen"), "leave --executor out, or give --no-screen"),
        (("--gather", "--predict"), "leave --gather out, or give --no-screen"),
        (("--shard", "1/2", "--gather"), "choose one"),
        (("--shard", "1/2", "--executor", "local"), "choose one"),
    ],
)
def test_options_that_do_not_go_together(serial: Sweep, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refuse("sweep", "--config", serial.config, "-o", tmp_path, *arguments)


@pytest.mark.usefixtures("forked_workers")
def test_what_a_worker_refuses_is_told_at_once(serial: Sweep, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    sentence = refuse(
        "sweep", "--config", serial.config, "-m", missing, "-o", tmp_path, "--executor", "local", "--workers", 1
    )
    assert sentence == f"error: the model folder {missing} does not exist; check --model"
    assert not (tmp_path / "experiment.yaml").exists()


@pytest.mark.parametrize(
    ("error", "logged"),
    [(RuntimeError("no such luck"), "RuntimeError: no such luck"), (KeyboardInterrupt(), "interrupted: ")],
)
def test_what_ends_a_worker_stands_in_its_log(
    serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, logged: str
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("leankv.executors.worker.Workspace.open", fail)
    log = tmp_path / "log"
    with pytest.raises(type(error)):
        work("sweep", str(serial.config), "1/2", str(log), str(Path.cwd()))
    (line,) = [line for line in log.read_text().splitlines() if line.startswith(logged)]
    assert log.read_text().splitlines()[-1] == line
    assert ("Traceback" in log.read_text()) == isinstance(error, Exception)


def test_a_local_worker_has_its_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of the cores, or what the user set lower; of several GPUs one, in turn."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    for asked, threads in (("", "2"), ("1", "1"), ("16", "2"), ("many", "2")):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        shares = [share_of(shard, 4) for shard in Shard.all_of(4)]
        assert [share["OMP_NUM_THREADS"] for share in shares] == [threads] * 4
        assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["2", "5", "2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert set(share_of(Shard(1, 4), 4)) == {"OMP_NUM_THREADS"}


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
    monkeypatch.setattr(pool, "LOOK_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(pool, "STOP_SECONDS", 0.0)

    def start_both(shards: Sequence[Shard]) -> list[Worker]:
        return [Dying() if shard.index == 2 else Idle() for shard in shards]

    given_up = pytest.raises(UserError, match=r"shard 2/2 died 4 times \(by SIGSEGV\); its log is results/x/logs/shard")
    with given_up, watched(tmp_path, Shard.all_of(2), start_both, Silent()) as at_work:
        while at_work():
            pass
    assert Dying.started == 4
    assert Idle.forced
