"""Experiment trackers: the figures of a finished run's files, as trackio, wandb, mlflow or tensorboard show them.

A tracker gets what the files have, read back from them, once the run is done. Where it cannot be had or reached, a line
says so, and nothing of the run is lost.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from leankv.config.loading import flatten
from leankv.errors import UserError, first_line
from leankv.report.page.contents import RunContents, read_run

PROJECT = "leankv"

STEPS = {"sweep": "layer", "rate_map": None, "compare": None}
"""Tables of a run, and the column that counts their steps; None: the row's number."""


@dataclass(frozen=True)
class Figures:
    """What a tracker is given.

    Attributes:
        name: of the run.
        settings: the experiment, flat: `protocol.kind` -> `stream`.
        rows: step, and figures by name: `sweep/delta_ppl`; those of selections at step 0.
    """

    name: str
    settings: Mapping[str, Any]
    rows: list[tuple[int, dict[str, float]]]


def figures_of(run: RunContents) -> Figures:
    """All numbers of a run's tables and summaries."""
    rows: list[tuple[int, dict[str, float]]] = []
    for place, one in enumerate(run.chosen):
        title = "selection" if len(run.chosen) == 1 else f"selection {one.summary.budget}"
        rows.append((place, _numbers(title, one.summary.to_json())))
    for table, counted in STEPS.items():
        frame: pd.DataFrame | None = getattr(run, table)
        if frame is not None:
            for number, (_, row) in enumerate(frame.iterrows()):
                step = number if counted is None else int(row[counted])
                rows.append((step, _numbers(_title(table, row), {str(name): value for name, value in row.items()})))
    return Figures(run.name, flatten(yaml.safe_load(run.experiment or "{}")), rows)


def track(tracker: str, folder: Path, say: Callable[[str], None]) -> None:
    """Send a run's figures; what goes wrong is said, and is no error.

    Args:
        tracker: one of `TRACKERS`.
        folder: of the run.
        say: told what became of it.
    """
    try:
        figures = figures_of(read_run(folder))
    except UserError as error:  # a shard whose others are at work, or a table of another version
        say(f"{tracker} was told nothing: {error}")
        return
    try:
        with TRACKERS[tracker](figures, folder) as log:
            for step, values in figures.rows:
                log(step, values)
    except ModuleNotFoundError:
        say(f"{tracker} is not installed, so it was told nothing; run: pip install 'leankv[{tracker}]'")
    except Exception as error:  # each tracker raises what it likes when its server cannot be reached
        reason = first_line(error)[:200]
        say(f"{tracker} could not be told ({type(error).__name__}: {reason}); the run's files are complete in {folder}")
    else:
        say(f"{tracker} was told {sum(len(values) for _, values in figures.rows)} figures of {figures.name}")


def check_tracker(name: str) -> None:
    """Refuse a name before anything is computed.

    Raises:
        UserError: there is no such tracker.
    """
    if name not in TRACKERS:
        raise UserError(f"--track must be one of {', '.join(TRACKERS)}, not {name!r}")


def _title(table: str, row: pd.Series) -> str:
    if table == "rate_map":
        return f"map/{row['part']}{row['layer']}/{row['codec']}"
    return f"compare/{row['spec']}" if table == "compare" else table


def _numbers(title: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among some values; what is not known is left out."""
    return {
        f"{title}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, Real) and not math.isnan(float(value))
    }


Log = Callable[[int, dict[str, float]], None]


@contextmanager
def _tensorboard(figures: Figures, folder: Path) -> Iterator[Log]:
    """Event files in the run's folder, under `tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_text("experiment", f"```yaml\n{yaml.safe_dump(dict(figures.settings))}```")

        def log(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log


@contextmanager
def _mlflow(figures: Figures, folder: Path) -> Iterator[Log]:
    """Where MLFLOW_TRACKING_URI says."""
    import mlflow

    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=figures.name):
        mlflow.log_params(dict(figures.settings))

        def log(step: int, values: dict[str, float]) -> None:
            # Names have no commas, parentheses and colons there.
            plain = {"".join(c if c.isalnum() or c in "_-. /" else "_" for c in name): v for name, v in values.items()}
            mlflow.log_metrics(plain, step=step)

        yield log


@contextmanager
def _wandb(figures: Figures, folder: Path) -> Iterator[Log]:
    import wandb

    with wandb.init(project=PROJECT, name=figures.name, config=dict(figures.settings), dir=str(folder)) as run:
        yield lambda step, values: run.log({**values, "step": step})


@contextmanager
def _trackio(figures: Figures, folder: Path) -> Iterator[Log]:
    import trackio

    trackio.init(project=PROJECT, name=figures.name, config=dict(figures.settings))
    yield lambda step, values: trackio.log(values, step=step)
    trackio.finish()


TRACKERS = {"trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow, "tensorboard": _tensorboard}
