"""A run's output folder belongs to the settings that it was begun with; `experiment.yaml` in it says which.

What is handed in from Python, a model and texts, has no name there that could be compared; `given.json` has its hashes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leankv.config.experiment import Experiment
from leankv.config.loading import flatten, load_experiment
from leankv.errors import UserError
from leankv.report import run_files
from leankv.storage.files import check_output_dir, read_json, write_text
from leankv.storage.locks import locked

MAY_DIFFER = ("layers", "memory_budget", "output_dir", "model.device", "model.device_map", "data.data_dir")
"""Settings beside those of `SECTIONS_MAY_DIFFER` that may change between runs in one folder: they choose among results,
or where things lie. Results that depend on the device or the text carry that in their keys."""

SECTIONS_MAY_DIFFER = ("selection.", "sweep.", "certification.")


def check_folder(experiment: Experiment, given: Mapping[str, str] | None = None) -> Path:
    """Make the output folder, and see that nothing in it was made with other settings.

    Args:
        experiment: the settings, the folder among them.
        given: what was handed in from Python in their place, with its hashes: `{"model": ...}`.

    Raises:
        UserError: it cannot be written, or was begun with other settings; names the first that differs.
    """
    folder = Path(experiment.output_dir)
    check_output_dir(folder)
    path = folder / run_files.EXPERIMENT
    if path.is_file():
        begun = flatten(asdict(load_experiment(path, {})))
        for key, value in flatten(asdict(experiment)).items():
            if begun[key] != value and key not in MAY_DIFFER and not key.startswith(SECTIONS_MAY_DIFFER):
                raise UserError(
                    f"{folder} was begun with {key} {_words(begun[key])}, not {_words(value)}; "
                    "choose another --output-dir"
                )
    if given and (folder / run_files.GIVEN).is_file():
        begun = read_json(folder / run_files.GIVEN)
        if differing := [name for name, its_hash in given.items() if begun.get(name) != its_hash]:
            raise UserError(f"{folder} was begun with another {differing[0]} than is given now; choose another folder")
    return folder


def claim_folder(experiment: Experiment, given: Mapping[str, str] | None = None) -> None:
    """Write `experiment.yaml`, and `given.json` where something was handed in from Python.

    Of two runs with different settings that begin at once, one is refused.

    Raises:
        UserError: as `check_folder`.
    """
    with locked(Path(experiment.output_dir) / "cells", "experiment"):
        folder = check_folder(experiment, given)
        write_if_changed(folder / run_files.EXPERIMENT, experiment.to_yaml())
        if given:
            write_if_changed(folder / run_files.GIVEN, json.dumps(given, indent=1) + "\n")


def write_if_changed(path: Path, text: str) -> None:
    """Write `text` atomically, unless the file holds it already: workers that share a folder all write the same."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _words(value: Any) -> str:
    return "null" if value is None else str(value)
