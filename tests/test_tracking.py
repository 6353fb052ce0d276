"""A tracker is told what the files have; one that cannot be told does no harm."""

import io
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from leankv.cli import app
from leankv.progress import Progress
from leankv.report.columns import read_sweep
from leankv.report.page.contents import read_run
from leankv.studies import tracking
from leankv.studies.tracking import figures_of, track

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of LeanLlama's recipe."""
    return Path(shutil.copytree(RESULTS / "smollm2-135m", tmp_path / "run"))


def test_tensorboard_gets_the_figures_of_the_files(run: Path) -> None:
    said: list[str] = []
    track("tensorboard", run, said.append)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    summary = json.loads((run / "summary.json").read_text())
    for name in ("ppl", "base_ppl", "cache_ratio", "kl"):
        (event,) = events.Scalars(f"selection/{name}")
        assert event.value == pytest.approx(summary[name], rel=1e-6)
    sweep = read_sweep(run)
    costs = {event.step: event.value for event in events.Scalars("sweep/delta_ppl")}
    assert costs == pytest.approx(dict(zip(sweep["layer"], sweep["delta_ppl"], strict=True)), rel=1e-6)
    assert "tensorboard was told" in said[0]


def test_maps_and_comparisons_have_a_figure_a_row() -> None:
    figures = figures_of(read_run(RESULTS / "map-smollm2"))
    names = {name for _, values in figures.rows for name in values}
    assert "map/k0/transform:1/delta_ppl" in names
    assert figures.settings["protocol.kind"] == "strict"
    assert all(math.isfinite(value) for _, values in figures.rows for value in values.values())
    compared = figures_of(read_run(RESULTS / "compare-smollm2"))
    assert any(name == "compare/int:4/ppl" for _, values in compared.rows for name in values)


def test_a_run_that_others_are_still_at_is_no_error(run: Path) -> None:
    """A shard that has done its part."""
    for path in (*run.glob("*.csv"), *run.glob("s*.json"), *run.glob("p*.json")):
        path.unlink()
    said: list[str] = []
    track("tensorboard", run, said.append)
    assert said[0].startswith("tensorboard was told nothing: ")
    assert "nothing of it is finished" in said[0]


@pytest.mark.parametrize(
    ("error", "told"),
    [(ConnectionError("no route to host"), "no route to host"), (ImportError("cannot import name"), "cannot import")],
)
def test_a_tracker_that_cannot_be_told_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def unreachable(figures: Any, folder: Path) -> Any:
        raise error

    monkeypatch.setitem(tracking.TRACKERS, "wandb", unreachable)
    said: list[str] = []
    track("wandb", run, said.append)
    (line,) = said
    assert told in line


def test_a_package_that_is_not_there_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    said: list[str] = []
    track("trackio", run, said.append)
    assert "leankv[trackio]" in said[0]


def test_what_is_said_keeps_its_brackets(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    console = Console(width=200, file=io.StringIO())
    track("trackio", run, Progress(console).say)
    assert "leankv[trackio]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_unknown_tracker_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["select", "-m", "nowhere", "--track", "paper", "-o", str(tmp_path / "run")])
    assert ran.exit_code == 2
    assert "trackio, wandb, mlflow, tensorboard" in ran.output
    assert not (tmp_path / "run").exists()


@pytest.mark.whole_runs
def test_track_is_an_option_of_a_run(settings: dict[str, Any], tmp_path: Path) -> None:
    sets = [text for key, value in settings.items() if key != "plan" for text in ("--set", f"{key}={value}")]
    ran = CliRunner().invoke(app, ["sweep", *sets, "--codec", "int:4", "--layers", "0", "--track", "tensorboard"])
    assert ran.exit_code == 0, ran.output
    assert list((Path(settings["output_dir"]) / "tensorboard").glob("events.*"))
