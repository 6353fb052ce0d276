"""`leankv init`: an experiment that fits the model, and a forecast of it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from leankv.cli import app
from leankv.config.experiment import Experiment, ModelConfig
from leankv.config.loading import flatten, load_experiment, settings_named
from leankv.models.loading import load_model
from leankv.report.tables import format_duration
from leankv.studies.starting_point import Pace, experiment_text, forecast, starting_experiment

pytestmark = pytest.mark.whole_runs


@pytest.fixture(scope="module")
def begun(llama_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What `init` wrote, and said."""
    path = tmp_path_factory.mktemp("init") / "first.yaml"
    command = [
        "init",
        str(llama_folder),
        "--dataset",
        str(text_file),
        "--to",
        str(path),
        "--dtype",
        "float32",
        "--json",
    ]
    ran = CliRunner().invoke(app, [*command, "--json"])
    assert ran.exit_code == 0, ran.output
    return path, json.loads(ran.stdout)


def test_the_experiment_suits_the_model(begun: tuple[Path, Any], llama_folder: Path, text_file: Path) -> None:
    path, _ = begun
    experiment = load_experiment(path, {})
    loaded = load_model(ModelConfig(str(llama_folder), dtype="float32"))
    assert experiment.model.name == str(llama_folder)
    assert experiment.data.dataset == str(text_file)
    assert experiment.codec.key_space == "pre-rope"
    assert experiment.data.block_length <= loaded.model.config.max_position_embeddings
    assert (experiment.protocol.kind, experiment.protocol.window) == ("stream", 128)
    assert all("#" in line or ":" in line for line in path.read_text().splitlines())


def test_all_that_was_asked_for_stands_in_it(llama_folder: Path, text_file: Path) -> None:
    """Names that YAML would read otherwise too."""
    asked = {
        "model.name": str(llama_folder),
        "model.revision": "abc #1",
        "model.trust_remote_code": True,
        "model.dtype": "float32",
        "data.dataset": str(text_file),
        "data.data_dir": "/a: b",
        "data.block_length": 64,
        "protocol.kind": "prefix",
        "protocol.prefix_length": 32,
        "selection.budget": "3%",
        "plan": {"k": "int:4", "v": "none"},
        "seed": 7,
    }
    loaded, base = load_model(ModelConfig(str(llama_folder), dtype="float32")), load_experiment(None, asked)
    text = experiment_text(starting_experiment(loaded, base, asked.keys(), "out"), loaded)
    read = flatten(yaml.safe_load(text))
    assert {key: read[key] for key in asked} == asked
    assert len([line for line in text.splitlines() if line.startswith("data:")]) == 1
    assert read["protocol.window"] == 0


def test_what_is_asked_for_stays_where_it_is_what_is_said_anyway(llama_folder: Path) -> None:
    """LeanKV's defaults are not what `init` would write."""
    defaults = flatten(asdict(Experiment()))
    asked = {
        key: defaults[key] for key in ("protocol.kind", "fit.error_metric", "selection.budget", "data.block_length")
    }
    named = settings_named(None, asked)
    loaded = load_model(ModelConfig(str(llama_folder), dtype="float32"))
    written = starting_experiment(loaded, load_experiment(None, asked), named, "out")
    assert {key: written[key] for key in asked} == asked
    assert written["protocol.window"] == 0, "a strict pass has none"
    short = {"data.block_length": 128}
    written = starting_experiment(loaded, load_experiment(None, short), short.keys(), "out")
    assert 0 < written["protocol.window"] <= 64, "what a window holds is compressed by no plan"


def test_the_forecast_has_every_part(begun: tuple[Path, Any]) -> None:
    _, told = begun
    names = [part["part"] for part in told["parts"]]
    assert names == ["capture", "gradients", "ladders", "search", "refits", "certification", "report"]
    assert all(part["seconds"] > 0 for part in told["parts"])
    assert told["parts"][0]["disk"] > 0


def test_twice_the_blocks_take_twice_as_long(begun: tuple[Path, Any], llama_folder: Path) -> None:
    path, _ = begun
    loaded = load_model(ModelConfig(str(llama_folder), dtype="float32"))
    once, twice = (
        load_experiment(path, {"data.calibration_blocks": n, "data.selection_blocks": n, "data.report_blocks": n})
        for n in (8, 16)
    )
    pace = Pace(once.data.selection_block_length or 0, 1.0, 3.0, 2.0, 0.5, 8 * once.data.block_length)
    for before, after in zip(forecast(loaded, once, pace), forecast(loaded, twice, pace), strict=True):
        grows = 1 if before.part in ("gradients", "certification") else 2
        assert after.seconds == pytest.approx(grows * before.seconds)
    capture = forecast(loaded, once, pace)[0]
    assert capture.disk == 8 * once.data.block_length * loaded.geometry.bytes_per_token * 2  # float32


def test_a_file_that_is_there_is_left_alone(begun: tuple[Path, Any], llama_folder: Path) -> None:
    path, _ = begun
    before = path.read_text()
    ran = CliRunner().invoke(app, ["init", str(llama_folder), "--to", str(path)])
    assert ran.exit_code == 2
    assert "--to" in ran.output
    assert path.read_text() == before


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (12_600, "3.5 h")])
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
