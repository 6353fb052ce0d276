"""What the folder of a run holds, and what it does not hold yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from leankv.errors import UserError
from leankv.report.columns import read_compare, read_map, read_spectra, read_sweep
from leankv.report.plans import PLANS_FILE
from leankv.report.runs import COMPLETION_FILE
from leankv.report.summary import SUMMARY_FILE, Summary, read_summary
from leankv.report.task_scores import TaskScores, read_task_scores
from leankv.storage.files import read_json

SELECTION_FILE, MANIFEST_FILE, EXPERIMENT_FILE = "selection.json", "manifest.json", "experiment.yaml"


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

    experiment = folder / EXPERIMENT_FILE
    contents = RunContents(
        name=folder.name,
        chosen=_chosen(folder),
        sweep=table_of("sweep.csv", read_sweep),
        selection=json_of(SELECTION_FILE),
        rate_map=table_of("map.csv", read_map),
        spectra=table_of("spectra.csv", read_spectra),
        compare=table_of("compare.csv", read_compare),
        tasks=read_task_scores(folder),
        completion=json_of(COMPLETION_FILE),
        manifest=json_of(MANIFEST_FILE),
        experiment=experiment.read_text(encoding="utf-8") if experiment.is_file() else None,
        missing=_missing(folder),
    )
    tables = (contents.sweep, contents.rate_map, contents.compare, contents.tasks)
    if not contents.chosen and all(table is None for table in tables):
        begun = "was begun, and nothing of it is finished" if contents.experiment else "holds no run"
        raise UserError(f"{folder} {begun}; run the command that writes there to its end first")
    return contents


def _chosen(folder: Path) -> list[Chosen]:
    if (folder / PLANS_FILE).is_file():
        return [
            Chosen(Summary.from_json(entry["summary"]), entry["plan"], entry["steps"], entry["candidates"])
            for entry in read_json(folder / PLANS_FILE)
        ]
    return [Chosen(read_summary(folder))] if (folder / SUMMARY_FILE).is_file() else []


def _missing(folder: Path) -> list[str]:
    """What an unfinished run lacks; the same command goes on from where it stopped."""
    there = {path.name for path in folder.iterdir()}
    missing = []
    if "sweep.json" in there and "sweep.csv" not in there:
        missing.append("The sweep was begun and is not finished: no costs by layer yet.")
    if "sweep.csv" in there and SELECTION_FILE not in there and PLANS_FILE not in there:
        missing.append("The layers were swept, and none was selected: no plan yet.")
    if SELECTION_FILE in there and SUMMARY_FILE not in there:
        missing.append("Layers were selected, and not measured on report text: no joint cost and no ratios yet.")
    if (PLANS_FILE in there or SUMMARY_FILE in there) and COMPLETION_FILE not in there:
        missing.append("No text was generated: `leankv run` does it at its end.")
    return missing
