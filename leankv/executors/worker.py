"""A worker's whole work: a shard of a sweep, or its part of a search, in a process on any machine with the folder.

Ray and Slurm call `work`. A local worker pool runs this module, `python -m leankv.executors.worker`, which calls it.
"""

import os
import platform
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from leankv.config.experiment import Experiment
from leankv.config.loading import load_experiment
from leankv.config.notation import Shard
from leankv.errors import sentence_of
from leankv.progress import Progress
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.select_plan import select_plans
from leankv.studies.sweep import sweep
from leankv.studies.workspace import Workspace


def _sweep(experiment: Experiment, progress: Progress, shard: Shard) -> None:
    sweep(PlanEvaluator(Workspace.open(experiment, progress, shard)))


def _select(experiment: Experiment, progress: Progress, shard: Shard) -> None:
    """All workers run the whole search: they come to the same plans, and share the measurements that it asks for."""
    progress.say(f"shard {shard}: process {os.getpid()} on {platform.node()}")
    select_plans(PlanEvaluator(Workspace.load(experiment, progress)))


TASKS: Mapping[str, Callable[[Experiment, Progress, Shard], None]] = {"sweep": _sweep, "select": _select}
"""What a worker pool may be at, by the name of the command."""


def work(task: str, config: str, shard: str, log: str, cwd: str) -> str:
    """Do a worker's part, with progress in a file.

    Args:
        task: one of `TASKS`.
        config: path of the experiment.
        shard: which worker of how many, and of a sweep which part of the layers, e.g. `2/8`.
        log: path of the file that progress, and a traceback if any, is added to.
        cwd: folder to which paths in the experiment are relative.

    Returns:
        `""` when it is done, else one sentence: what the user must mend first.
    """
    os.chdir(cwd)
    sys.path.insert(0, cwd)  # as the command line does: modules of the user's own are there
    with Path(log).open("a", encoding="utf-8") as file:
        try:
            experiment, progress = load_experiment(Path(config), {}), Progress(Console(file=file))
            TASKS[task](experiment, progress, Shard.parse(shard))
        except KeyboardInterrupt:
            file.write("interrupted: what was finished is kept\n")
            raise
        except BaseException as error:
            if (sentence := sentence_of(error)) is None:
                traceback.print_exc(file=file)
                raise
            file.write(f"error: {sentence}\n")
            return sentence
    return ""


def main() -> None:
    """Work as the command line's five arguments say; the sentence, if any, goes to standard output.

    The exit code is 0 wherever `work` returned. Else it is 1, and the log tells why.
    """
    task, config, shard, log, cwd = sys.argv[1:]
    # Nothing but the sentence may reach the process that reads it: what libraries print goes to standard error.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answer:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        try:
            answer.write(work(task, config, shard, log, cwd))
        except BaseException:
            sys.exit(1)  # `work` has written why to the log


if __name__ == "__main__":
    main()
