"""Who does the work of a sweep or a search: this process, or a shard of it, or workers that it starts and watches."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from leankv.config.experiment import Experiment
from leankv.config.loading import load_experiment
from leankv.config.notation import Shard
from leankv.errors import UserError
from leankv.executors.local import local_workers
from leankv.executors.pool import LOOK_EVERY_SECONDS, Job, Start, watched
from leankv.executors.ray import ray_workers
from leankv.executors.slurm import slurm_workers
from leankv.progress import Progress
from leankv.report.columns import read_sweep
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.run_folder import check_folder, write_if_changed
from leankv.studies.select import experiment_of
from leankv.studies.sweep import sweep
from leankv.studies.sweep_index import Index
from leankv.studies.sweep_table import gather
from leankv.studies.workspace import Workspace

DEFAULT_WORKERS = 2

EXECUTORS = ("local", "ray", "slurm")


@dataclass(frozen=True)
class WorkerOptions:
    """Workers, as the command line asks for them.

    Attributes:
        executor: start workers; one of `EXECUTORS`.
        workers: how many.
        address: of the Ray cluster; for Slurm the partition.
    """

    executor: str | None = None
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        """Check that they go together.

        Raises:
            UserError: they do not.
        """
        if self.executor is not None and self.executor not in EXECUTORS:
            raise UserError(f"--executor must be one of {', '.join(EXECUTORS)}, not {self.executor!r}")
        if self.executor is None and self.workers is not None:
            raise UserError("--workers needs --executor local, ray or slurm")
        if self.executor not in ("ray", "slurm") and self.address is not None:
            raise UserError("--address goes with --executor ray (a cluster) or slurm (a partition) only")

    @property
    def count(self) -> int:
        """How many workers."""
        return self.workers or DEFAULT_WORKERS


@dataclass(frozen=True)
class SweepOptions(WorkerOptions):
    """How a sweep is spread, as the command line asks for it.

    Attributes:
        shard: only this part of the layers, e.g. `2/8`.
        gather: only gather what is finished.
    """

    shard: str | None = None
    gather: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.shard is not None) + self.gather + (self.executor is not None) > 1:
            raise UserError("--shard, --gather and --executor are three ways to sweep; choose one of them")
        if self.shard is not None:
            Shard.parse(self.shard)


@dataclass(frozen=True)
class Swept:
    """What a sweep left.

    Attributes:
        folder: the run's folder.
        table: the whole sweep, or where layers are `missing`, one shard's part of it; see
            `leankv.report.columns.SWEEP_COLUMNS`.
        missing: layers that other shards have yet to do.
    """

    folder: Path
    table: pd.DataFrame
    missing: tuple[int, ...]


def sweep_as_asked(config: Path | None, overrides: dict[str, Any], options: SweepOptions, progress: Progress) -> Swept:
    """Sweep here, or a shard of it, or with workers, or gather what others did.

    Args:
        config: the experiment's file; None starts from the defaults, or when gathering from the folder's own.
        overrides: settings on top, e.g. `{"fit.epochs": 3}`.
        options: how the sweep is spread.
        progress: shows the stages.

    Raises:
        UserError: see `Workspace.open`, `gather`, `sweep_with_workers`.
    """
    if options.gather:
        experiment = experiment_of(config, overrides)
        _refuse_screening(experiment, "--gather")
        return Swept(Path(experiment.output_dir), gather(experiment), ())
    experiment = load_experiment(config, overrides)
    if options.executor is not None:
        table = sweep_with_workers(experiment, options, progress)
        return Swept(Path(experiment.output_dir), table, ())
    shard = Shard.parse(options.shard or "1/1")
    evaluator = PlanEvaluator(Workspace.open(experiment, progress, shard))
    table = sweep(evaluator)
    missing = Index.of(evaluator).missing(experiment) if shard.count > 1 else ()
    return Swept(Path(experiment.output_dir), table, missing)


def sweep_with_workers(experiment: Experiment, options: WorkerOptions, progress: Progress) -> pd.DataFrame:
    """Start workers, one a shard, and watch over them until the last has gathered what all did.

    Raises:
        UserError: the executor is not to be had here, a worker refuses, or one dies again and again.
    """
    _refuse_screening(experiment, "--executor")
    with _workers(experiment, options, "sweep", progress) as at_work:
        follow_sweep(experiment, options.count, at_work, progress)
    index = Index.read(Path(experiment.output_dir))
    assert index is not None
    assert not index.missing(experiment), "every shard is done"
    return read_sweep(Path(experiment.output_dir))


def select_with_workers(experiment: Experiment, options: WorkerOptions, progress: Progress) -> None:
    """Start workers that search together: each runs the whole search, and measurements are shared among them.

    What the first of them says is shown; each writes the same results in turn.

    Raises:
        UserError: as `sweep_with_workers`.
    """
    log = Job(Path(), Path(experiment.output_dir), options.count, Path.cwd()).log(Shard(1, options.count))
    shown = log.stat().st_size if log.is_file() else 0
    with _workers(experiment, options, "select", progress) as at_work:
        working = True
        while working:
            working = at_work()
            text = log.read_bytes()[shown:] if log.is_file() else b""
            whole = text[: text.rfind(b"\n") + 1]
            shown += len(whole)
            for line in whole.decode("utf-8", "replace").splitlines():
                progress.say(line)
            if working:
                time.sleep(LOOK_EVERY_SECONDS)


@contextmanager
def _workers(
    experiment: Experiment, options: WorkerOptions, task: str, progress: Progress
) -> Iterator[Callable[[], bool]]:
    """Workers at a task; yields what `leankv.executors.pool.watched` does."""
    folder = check_folder(experiment)
    # Not the folder's own experiment.yaml: that is written by workers whose model has loaded.
    config = folder / "logs" / "experiment.yaml"
    write_if_changed(config, experiment.to_yaml())
    assert options.executor is not None
    job = Job(config, folder, options.count, Path.cwd(), task)
    with (
        _executor(options.executor, job, options.address) as start,
        watched(folder, Shard.all_of(options.count), start, progress) as at_work,
    ):
        yield at_work


def follow_sweep(experiment: Experiment, workers: int, at_work: Callable[[], bool], progress: Progress) -> None:
    """Show the layers that workers finish, until none is at work."""
    folder = Path(experiment.output_dir)
    # How many layers there are is known when the first worker has loaded the model.
    while at_work() and (index := Index.read(folder)) is None:
        time.sleep(LOOK_EVERY_SECONDS)
    if (index := Index.read(folder)) is None:
        return
    layers = index.layers(experiment)
    with progress.stage(f"sweeping {len(layers)} layers with {workers} workers", len(layers)) as step:
        shown: set[int] = set()
        working = True
        while working:
            working = at_work()
            index = Index.read(folder) or index
            finished = set(layers) - set(index.missing(experiment))
            for layer in sorted(finished - shown):
                step(f"layer {layer}")
            shown |= finished
            if working:
                time.sleep(LOOK_EVERY_SECONDS)


def _refuse_screening(experiment: Experiment, flag: str) -> None:
    if experiment.sweep.screen or experiment.sweep.predict:
        raise UserError(
            f"screening and prediction look at all layers together; leave {flag} out, or give "
            "--no-screen and --no-predict"
        )


def _executor(name: str, job: Job, address: str | None) -> AbstractContextManager[Start]:
    """The workers of one of `EXECUTORS`."""
    if name == "ray":
        return ray_workers(job, address)
    if name == "slurm":
        return slurm_workers(job, address)
    return local_workers(job)
