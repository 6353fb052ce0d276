"""Shards of a sweep: processes that share a folder, in any order or at once, and killed, end where one process ends."""

import re
import shutil
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from leankv.calibration.activations import StoredActivations
from leankv.calibration.capture import capture
from leankv.config.notation import Shard
from leankv.errors import UserError
from leankv.studies.sweep import sweep
from tests.forked import CommandProcess
from tests.run_folders import (
    LAYERS,
    TIME_OUT,
    Sweep,
    assert_swept,
    finished_files,
    layers_measured,
    refuse,
    start,
    succeed,
    succeed_json,
    wait_for,
)

pytestmark = pytest.mark.whole_runs

# -- shards ------------------------------------------------------------------------------------------------------------


def test_shards_one_after_another_make_the_same_sweep(serial: Sweep, tmp_path: Path) -> None:
    for shard in ("3/3", "1/3", "2/3"):
        assert not (tmp_path / "sweep.csv").exists()
        sweep(serial.evaluator(tmp_path, shard))
    assert_swept(tmp_path, serial)


def test_more_shards_than_layers(serial: Sweep, tmp_path: Path) -> None:
    """Those without a layer have nothing to do."""
    assert len(sweep(serial.evaluator(tmp_path, "3/3", layers="0-1"))) == 0
    assert not list(tmp_path.glob("codecs/*"))
    told = succeed("sweep", "--config", serial.config, "-o", tmp_path, "--shard", "3/3", "--layers", "0-1").stdout
    assert "yet to do layers 0 1" in told


def test_workers_at_once_make_the_same_sweep_and_nothing_twice(serial: Sweep, tmp_path: Path) -> None:
    """Every stage shows in one log only."""
    processes = [CommandProcess(serial.command(tmp_path, "--shard", shard)) for shard in ("1/3", "2/3", "3/3")]
    logs = [process.communicate(timeout=TIME_OUT)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, logs
    assert_swept(tmp_path, serial)
    text = "".join(logs)
    assert len(re.findall(r"^base perplexity.*steps$", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^capturing.*steps$", text, re.MULTILINE)) == 3
    assert len(re.findall(r"^fitting.*steps$", text, re.MULTILINE)) == 3


COMPUTE_ONCE = """
import os, pathlib, sys, time
from leankv.storage.cells import StoredCells

folder = pathlib.Path(sys.argv[1])

def compute():
    with (folder / "computed").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(sys.argv[2]))
    return {"ppl": 1.0}

print("ready", flush=True)
assert StoredCells(folder / "cells").get_or_compute("nats", {"seed": 1}, compute) == {"ppl": 1.0}
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
    process = CommandProcess(serial.command(tmp_path, "--shard", "1/2"))
    wait_for(lambda: layers_measured(tmp_path) >= 2, process)
    process.kill()
    process.communicate()
    before = finished_files(tmp_path)
    assert layers_measured(tmp_path) < LAYERS / 2
    for shard in ("1/2", "2/2"):
        sweep(serial.evaluator(tmp_path, shard))
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

    monkeypatch.setattr("leankv.studies.activation_store.capture", counted)
    workers = [serial.evaluator(tmp_path, "1/2") for _ in range(3)]
    plan = workers[0].workspace.plan.only([0, 2])
    threads = [Thread(target=worker.codecs.fit, args=([plan],)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(captures) == 1
    for worker in workers:
        assert list(worker.codecs.codecs(plan)) == [(0, "k"), (0, "v"), (2, "k"), (2, "v")]
    assert len(captures) == 1


def test_captures_of_shards_are_their_own(serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker's capture serves the same shard again, and is removed then."""
    first, second = (serial.evaluator(tmp_path, shard) for shard in ("1/3", "2/3"))
    captures = []
    for worker in (first, second):
        own = worker.codecs.activations.of(worker.workspace.shard.part(worker.workspace.layers))
        assert isinstance(own, StoredActivations)
        captures.append(own)
    assert captures[0].folder != captures[1].folder
    monkeypatch.setattr("leankv.studies.activation_store.capture", pytest.fail)
    sweep(serial.evaluator(tmp_path, "2/3"))
    assert [each.folder.exists() for each in captures] == [True, False]


def test_a_half_made_capture_is_none(serial: Sweep, tmp_path: Path) -> None:
    """Of this shard, and of one that nobody takes up again."""
    for shard in ("1/2", "3/7"):
        half = serial.evaluator(tmp_path, shard).codecs.activations.of([0, 2])
        assert isinstance(half, StoredActivations)
        (half.folder / "manifest.json").unlink()
        (half.folder / "layer-000.safetensors").write_bytes(b"half")
    sweep(serial.evaluator(tmp_path, "1/2"))
    sweep(serial.evaluator(tmp_path, "2/2"))
    assert_swept(tmp_path, serial)


@pytest.mark.parametrize("text", ["0/8", "9/8", "x", "2", "1/0", "-1/8", "1/2/3", "", "1/", "1.5/2"])
def test_a_bad_shard(serial: Sweep, tmp_path: Path, text: str) -> None:
    sentence = refuse("sweep", "--config", serial.config, "-o", tmp_path, f"--shard={text}")
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
    assert "leankv sweep" in refuse("sweep", "--gather", "-o", tmp_path)
    sweep(serial.evaluator(tmp_path, "2/3"))
    sentence = refuse("sweep", "--gather", "-o", tmp_path)
    assert "layers 0,2-3,5-6;" in sentence
    assert f"leankv sweep --config {tmp_path}/experiment.yaml --output-dir {tmp_path}" in sentence
    assert not (tmp_path / "sweep.csv").exists()


def test_gathering_computes_nothing(serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the model is loaded."""
    shutil.copytree(serial.config.parent / "run", tmp_path, dirs_exist_ok=True)
    for name in ("sweep.csv", "sweep.md", "figures/cost_by_layer.png"):
        (tmp_path / name).unlink()
    before = finished_files(tmp_path)
    monkeypatch.setattr("leankv.studies.workspace.load_model", pytest.fail)
    assert [row["layer"] for row in succeed_json("sweep", "--gather", "-o", tmp_path)] == list(range(LAYERS))
    assert_swept(tmp_path, serial)
    assert finished_files(tmp_path) == before


# -- one folder, one experiment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fit.epochs", 3, "fit.epochs 2, not 3"),
        ("plan", "pca:2", "plan ae:4x16, not pca:2"),
        ("data.selection_blocks", 3, "data.selection_blocks 16, not 3"),
        ("protocol.sinks", 1, "protocol.sinks 4, not 1"),
        ("model.revision", "main", "model.revision null, not main"),
        ("seed", 1, "seed 0, not 1"),
    ],
)
def test_other_settings_are_refused(
    serial: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, words: str
) -> None:
    (tmp_path / "experiment.yaml").write_bytes((serial.config.parent / "run" / "experiment.yaml").read_bytes())
    monkeypatch.setattr("leankv.studies.workspace.load_model", pytest.fail)  # refused at once
    for way in ((), ("--shard", "1/2"), ("--executor", "local"), ("--gather",)):
        sentence = refuse("sweep", "--config", serial.config, "-o", tmp_path, "--set", f"{key}={value}", *way)
        assert sentence == f"error: {tmp_path} was begun with {words}; choose another --output-dir"


def test_settings_that_may_differ(serial: Sweep, tmp_path: Path) -> None:
    serial.evaluator(tmp_path)
    changes: dict[str, Any] = {
        "layers": "1-2",
        "selection.budget": "7%",
        "selection.layers": "1",
        "memory_budget": 1.0,
        "model.device": "auto",
        "data.data_dir": str(tmp_path),
    }
    serial.evaluator(tmp_path, **changes)
    assert yaml.safe_load((tmp_path / "experiment.yaml").read_text())["layers"] == "1-2"


def test_a_model_that_does_not_load_claims_no_folder(serial: Sweep, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        serial.evaluator(tmp_path, **{"model.name": str(tmp_path / "none")})
    serial.evaluator(tmp_path)
