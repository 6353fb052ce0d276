"""What the folder of a run holds, and what it does not hold yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from leankv.errors import UserError
from leankv.report import run_files
from leankv.report.columns import read_compare, read_map, read_spectra, read_sweep
from leankv.report.plans import read_entries
from leankv.report.summary import Summary
from leankv.report.task_scores import TaskScores, read_task_scores
from leankv.storage.files import read_json


@dataclass(frozen=True)
class Chosen:
    """One selection of a run.

    Attributes:
        summary: what it chose, costs and saves.
        plan: as `PlanSpec.table` has it; None in runs of LeanLlama's recipe.
        steps: of a search, as `plans.json` has them; empty where there was none.
        candidates: likewise, those that were to be certified.
    """

    summary: Summary
    plan: Mapping[str, Any] | str | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    candidates: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class RunContents:
    """All that a report shows of a run; None and empty where the run has none.

    Attributes:
        name: of its folder.
        chosen: its selections.
        sweep: what each layer costs.
        selection: the steps in which LeanLlama's recipe added layers.
        rate_map: what each site costs at each rate.
        spectra: variances of the principal components of each site's vectors.
        compare: what whole caches cost.
        tasks: what tasks said of caches.
        completion: what base and compressed model said.
        manifest: what made the results.
        experiment: the settings, YAML.
        missing: sentences on what is not there yet.
    """

    name: str
    chosen: Sequence[Chosen] = ()
    sweep: pd.DataFrame | None = None
    selection: Mapping[str, Any] | None = None
    rate_map: pd.DataFrame | None = None
    spectra: pd.DataFrame | None = None
    compare: pd.DataFrame | None = None
    tasks: TaskScores | None = None
    completion: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] | None = None
    experiment: str | None = None
    missing: Sequence[str] = field(default_factory=list)


def read_run(folder: Path) -> RunContents:
    """What is there of a run, finished or not.

    Raises:
        UserError: the folder does not exist, or no command of LeanKV wrote anything in it.
    """
    if not folder.is_dir():
        raise UserError(f"the run {folder} does not exist; name a folder that leankv wrote with --output-dir")

    def json_of(name: str) -> Any:
        return read_json(folder / name) if (folder / name).is_file() else None

    def table_of(name: str, read: Any) -> pd.DataFrame | None:
        return read(folder) if (folder / name).is_file() else None

    experiment = folder / run_files.EXPERIMENT
    contents = RunContents(
        name=folder.name,
        chosen=_chosen(folder),
        sweep=table_of(run_files.SWEEP, read_sweep),
        selection=json_of(run_files.SELECTION),
        rate_map=table_of(run_files.MAP, read_map),
        spectra=table_of(run_files.SPECTRA, read_spectra),
        compare=table_of(run_files.COMPARE, read_compare),
        tasks=read_task_scores(folder),
        completion=json_of(run_files.COMPLETION),
        manifest=json_of(run_files.MANIFEST),
        experiment=experiment.read_text(encoding="utf-8") if experiment.is_file() else None,
        missing=_missing(folder),
    )
    tables = (contents.sweep, contents.rate_map, contents.compare, contents.tasks)
    if not contents.chosen and all(table is None for table in tables):
        begun = "was begun, and nothing of it is finished" if contents.experiment else "holds no run"
        raise UserError(f"{folder} {begun}; run the command that writes there to its end first")
    return contents


def _chosen(folder: Path) -> list[Chosen]:
    return [
        Chosen(
            Summary.from_json(entry["summary"]),
            entry.get("plan"),
            entry.get("steps", ()),
            entry.get("candidates", ()),
        )
        for entry in read_entries(folder)
    ]


def _missing(folder: Path) -> list[str]:
    """What an unfinished run lacks; the same command goes on from where it stopped."""
    there = {path.name for path in folder.iterdir()}
    missing = []
    if run_files.SWEEP_INDEX in there and run_files.SWEEP not in there:
        missing.append("The sweep was begun and is not finished: no costs by layer yet.")
    if run_files.SWEEP in there and run_files.SELECTION not in there and run_files.PLANS not in there:
        missing.append("The layers were swept, and none was selected: no plan yet.")
    if run_files.SELECTION in there and run_files.SUMMARY not in there:
        missing.append("Layers were selected, and not measured on report text: no joint cost and no ratios yet.")
    if (run_files.PLANS in there or run_files.SUMMARY in there) and run_files.COMPLETION not in there:
        missing.append("No text was generated: `leankv run` does it at its end.")
    return missing
