"""Tasks of lm-evaluation-harness, and those of RULER whose text it makes by itself."""

import difflib
import importlib
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import nltk
import numpy as np
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler import cwe_utils

from leankv.config.presets import RULER_OFFLINE
from leankv.errors import UserError, first_line
from leankv.evaluation.harness import quietly

OFFLINE_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""Needles in repeated sentences and among other needles, chains of variables, the most common words of a list and of a
coded text. RULER's other tasks hide needles in essays or ask of articles, which the harness downloads."""

RULER_GROUPS = ("ruler", "longcxt")
"""What the harness calls all of RULER's tasks together."""

RULER_FOLDER = Path(lm_eval.tasks.__file__).parent / "ruler"


@dataclass(frozen=True)
class HarnessTask:
    """A task as it is asked.

    Attributes:
        name: the harness's.
        length: tokens of a sample of RULER's tasks, as the harness counts them; None of others.
        task: the harness's object.
    """

    name: str
    length: int | None
    task: Task

    @property
    def title(self) -> str:
        """Its name, and its length where it has one."""
        return self.name if self.length is None else f"{self.name} {self.length}"


def load_tasks(
    names: Sequence[str], lengths: Sequence[int], tokenizer_folder: Path, include_path: Path | None, seed: int
) -> list[HarnessTask]:
    """Load tasks by name; those of RULER once a length.

    RULER's text is drawn anew, from the seed, when a task is loaded.

    Args:
        names: of tasks, groups or tags of the harness, YAML files of one's own, or `RULER_OFFLINE`.
        lengths: tokens of a sample of RULER's tasks; none where the model has positions for none.
        tokenizer_folder: a saved tokenizer, which RULER's tasks measure their text with.
        include_path: a folder with task files of one's own.
        seed: of what is drawn.

    Raises:
        UserError: the harness knows no such task, its data cannot be had, or no length suits one of RULER's.
    """
    wanted = list(
        dict.fromkeys(part for name in names for part in (OFFLINE_TASKS if name == RULER_OFFLINE else (name,)))
    )
    with quietly():
        own = RULER_FOLDER if include_path is None else [RULER_FOLDER, include_path]
        manager = TaskManager(include_path=own, include_defaults=False)  # all of the harness's take half a minute
        if not set(wanted) <= {*manager.all_subtasks, *RULER_GROUPS}:
            manager = TaskManager(include_path=include_path)
    check_names(wanted, manager.all_tasks)
    of_ruler = [name for name in manager.all_subtasks if _lies_in_ruler(name, manager)]
    single = list(dict.fromkeys(part for name in wanted for part in (of_ruler if name in RULER_GROUPS else (name,))))
    of_no_length = [name for name in single if name in of_ruler and not lengths]
    if of_no_length:
        raise UserError(f"{of_no_length[0]} at --lengths is longer than the model's positions reach; name shorter ones")
    if set(wanted) <= set(OFFLINE_TASKS):
        _import_needles()
    found = []
    for each in single:
        if each in of_ruler:
            found += [
                HarnessTask(each, length, _ruler(manager, each, length, tokenizer_folder, seed)) for length in lengths
            ]
        else:
            found += [HarnessTask(title, None, task) for title, task in _load(manager, each, each, seed).items()]
    return found


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a name that is neither known nor a file.

    Raises:
        UserError: with the nearest names.
    """
    for name in names:
        if name in known or Path(name).is_file():
            continue
        nearest = difflib.get_close_matches(name, [RULER_OFFLINE, *known], n=4, cutoff=0.5)
        meant = f"did you mean {', '.join(nearest)}?" if nearest else f"{RULER_OFFLINE} is what needs no hub"
        raise UserError(f"the harness knows no task {name!r}; {meant}")


def _lies_in_ruler(name: str, manager: TaskManager) -> bool:
    path = manager.task_index[name].yaml_path
    return path is not None and Path(path).parent == RULER_FOLDER


def _import_needles() -> None:
    """Import RULER's needles without the network.

    The module looks for nltk's splitter of sentences when it is imported and fetches what is missing, though only
    essays are split. An empty folder of that name is found, and goes again.
    """
    with tempfile.TemporaryDirectory() as folder, quietly():
        (Path(folder) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        nltk.data.path.append(folder)
        try:
            importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
        finally:
            nltk.data.path.remove(folder)


def _ruler(manager: TaskManager, name: str, length: int, tokenizer_folder: Path, seed: int) -> Task:
    """One of RULER's tasks at one length.

    The harness lists a metric for each length from 4,096 tokens on, named by the length; here the one there is gets it.
    """
    spec = {
        "group": f"{name} {length}",
        "task": [
            {
                "task": name,
                "metric_list": [{"metric": str(length), "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"max_seq_lengths": [length], "tokenizer": str(tokenizer_folder)},
            }
        ],
    }
    (task,) = _load(manager, spec, f"{name} at {length} tokens", seed).values()
    return task


def _load(manager: TaskManager, spec: Any, title: str, seed: int) -> dict[str, Task]:
    random.seed(seed)  # the harness's tasks draw from the global generators, and one from its module's
    np.random.seed(seed)
    cwe_utils.RNG.seed(seed)
    try:
        with quietly():
            tasks: dict[str, Task] = manager.load(spec)["tasks"]
    except Exception as error:  # whatever data sets, hub and task files raise
        reason = first_line(error)[:300]
        raise UserError(
            f"the task {title} cannot be loaded ({type(error).__name__}: {reason}); tasks other than {RULER_OFFLINE} "
            "take their data from the hub or from files"
        ) from error
    return tasks
