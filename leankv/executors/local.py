"""Workers on this machine: each a process with its share of the cores, and of the GPUs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from leankv.config.notation import Shard
from leankv.errors import UserError
from leankv.executors.pool import Job, Start, Worker


@contextmanager
def local_workers(job: Job) -> Iterator[Start]:
    """Starts workers as processes of this machine."""

    def start(shards: Sequence[Shard]) -> list[Worker]:
        return [LocalWorker(job, shard) for shard in shards]

    yield start


class LocalWorker:
    """A process that sweeps a shard; see `leankv.executors.worker`."""

    def __init__(self, job: Job, shard: Shard):
        self.log = job.log(shard)
        command = [sys.executable, "-m", "leankv.executors.worker", *job.arguments(shard)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**os.environ, **share_of(shard, job.workers)},
            )
        assert self._process.stdout is not None
        self._answer = self._process.stdout
        """What `work` returned comes through it, from a process that ended with exit code 0."""
        self._sentence = ""

    def ended(self) -> str | None:
        """See `Worker`."""
        code = self._process.poll()
        if code is None:
            return None
        if not self._answer.closed:
            with self._answer:
                self._sentence = self._answer.read() if code == 0 else ""
        if self._sentence:
            raise UserError(self._sentence)
        if code == 0:
            return ""
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def stop(self, force: bool) -> None:
        """See `Worker`."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL if force else signal.SIGINT)
        if force:
            self._process.wait()
            self._answer.close()


def share_of(shard: Shard, workers: int) -> dict[str, str]:
    """The environment that gives a worker its share of the machine; what the user set lower is left."""
    cores = max(1, len(os.sched_getaffinity(0)) // workers)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    share = {"OMP_NUM_THREADS": str(min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores)}
    if len(gpus := _gpus()) > 1:
        share["CUDA_VISIBLE_DEVICES"] = gpus[(shard.index - 1) % len(gpus)]
    return share


def _gpus() -> list[str]:
    """The names of the GPUs that this process may use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    try:
        told = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, _ in enumerate(told.splitlines())]
