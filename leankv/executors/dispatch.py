"""Who does the work of a sweep: this process, all of it or its shard, or workers that it starts and watches."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from leankv.config.experiment import Experiment
from leankv.config.loading import load_experiment
from leankv.config.notation import Shard
from leankv.errors import UserError
from leankv.executors.local import local_workers
from leankv.executors.pool import Job, Start, supervise
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
class SweepOptions:
    """How a sweep is spread, as the command line asks for it.

    Attributes:
        shard: only this part of the layers, e.g. `2/8`.
        gather: only gather what is finished.
        executor: start workers; one of `EXECUTORS`.
        workers: how many.
        address: of the Ray cluster; for Slurm the partition.
    """

    shard: str | None = None
    gather: bool = False
    executor: str | None = None
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        """Check that they go together.

        Raises:
            UserError: they do not.
        """
        if (self.shard is not None) + self.gather + (self.executor is not None) > 1:
            raise UserError("--shard, --gather and --executor are three ways to sweep; choose one of them")
        if self.executor is not None and self.executor not in EXECUTORS:
            raise UserError(f"--executor must be one of {', '.join(EXECUTORS)}, not {self.executor!r}")
        if self.executor is None and self.workers is not None:
            raise UserError("--workers needs --executor local, ray or slurm")
        if self.executor not in ("ray", "slurm") and self.address is not None:
            raise UserError("--address goes with --executor ray (a cluster) or slurm (a partition) only")
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
        folder = Path(overrides.get("output_dir", Experiment().output_dir))
        experiment = experiment_of(folder, config, overrides)
        _refuse_screening(experiment, "--gather")
        return Swept(folder, gather(experiment), ())
    experiment = load_experiment(config, overrides)
    if options.executor is not None:
        workers = options.workers or DEFAULT_WORKERS
        table = sweep_with_workers(experiment, options.executor, workers, options.address, progress)
        return Swept(Path(experiment.output_dir), table, ())
    shard = Shard.parse(options.shard or "1/1")
    evaluator = PlanEvaluator(Workspace.open(experiment, progress, shard))
    table = sweep(evaluator)
    missing = Index.of(evaluator).missing(experiment) if shard.count > 1 else ()
    return Swept(Path(experiment.output_dir), table, missing)


def sweep_with_workers(
    experiment: Experiment, executor: str, workers: int, address: str | None, progress: Progress
) -> pd.DataFrame:
    """Start workers, one a shard, and watch over them until the last has gathered what all did.

    Raises:
        UserError: the executor is not to be had here, a worker refuses, or one dies again and again.
    """
    _refuse_screening(experiment, "--executor")
    folder = check_folder(experiment)
    # Not the folder's own experiment.yaml: that is written by workers whose model has loaded.
    config = folder / "logs" / "experiment.yaml"
    write_if_changed(config, experiment.to_yaml())
    with _executor(executor, Job(config, folder, workers, Path.cwd()), address) as start:
        supervise(experiment, Shard.all_of(workers), start, progress)
    index = Index.read(folder)
    assert index is not None
    assert not index.missing(experiment), "every shard is done"
    return read_sweep(folder)


def _refuse_screening(experiment: Experiment, flag: str) -> None:
    if experiment.sweep.screen or experiment.sweep.predict:
        raise UserError(
            f"screening and prediction look at all layers together; leave {flag} or --screen and --predict out"
        )


def _executor(name: str, job: Job, address: str | None) -> AbstractContextManager[Start]:
    """The workers of one of `EXECUTORS`."""
    if name == "ray":
        return ray_workers(job, address)
    if name == "slurm":
        return slurm_workers(job, address)
    return local_workers(job)
