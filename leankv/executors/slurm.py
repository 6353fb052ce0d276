"""Workers on Slurm, through submitit: one job array, a task a shard; the nodes share the output folder.

What a site asks for beside the partition is set by Slurm's own variables: SBATCH_GPUS, SBATCH_TIMELIMIT and so on.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from leankv.config.notation import Shard
from leankv.errors import UserError
from leankv.executors.pool import Job, Start, Worker
from leankv.executors.worker import work

TIMEOUT_MINUTES = 24 * 60  # assumption: what most partitions allow; a shard that is cut off is started again


@contextmanager
def slurm_workers(job: Job, partition: str | None, cluster: str = "slurm") -> Iterator[Start]:
    """Submits workers as a job array.

    Args:
        job: what to work on.
        partition: Slurm's default where None.
        cluster: `local` runs the jobs on this machine without Slurm; the tests do.

    Raises:
        UserError: submitit or Slurm is missing, or Slurm refuses the jobs.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--executor slurm needs submitit; run: pip install 'leankv[slurm]'") from error
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("there is no Slurm on this machine (no sbatch); use --executor local or ray")
    executor = submitit.AutoExecutor(folder=(job.folder / "logs" / "submitit").absolute(), cluster=cluster)
    executor.update_parameters(name="leankv", timeout_min=TIMEOUT_MINUTES)
    if partition is not None:
        executor.update_parameters(slurm_partition=partition)

    def start(shards: Sequence[Shard]) -> list[Worker]:
        try:
            with executor.batch():
                submitted = [executor.submit(work, *job.arguments(shard)) for shard in shards]
        except submitit.core.utils.FailedJobError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"Slurm refused the jobs ({reason}); check --address, the partition") from error
        return [SlurmWorker(job, shard, each) for shard, each in zip(shards, submitted, strict=True)]

    yield start


class SlurmWorker:
    """A job that sweeps a shard."""

    def __init__(self, job: Job, shard: Shard, submitted: Any):
        self.log = job.log(shard)
        self._job = submitted

    def ended(self) -> str | None:
        """See `Worker`."""
        if not self._job.done():
            return None
        import submitit

        try:
            sentence: str = self._job.result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
            return f"job {self._job.job_id}, {self._job.state}"
        if sentence:
            raise UserError(sentence)
        return sentence

    def stop(self, force: bool) -> None:
        """See `Worker`."""
        if not self._job.done():
            self._job.cancel()
