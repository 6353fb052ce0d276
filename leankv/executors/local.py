"""Workers on this machine: each a `python -m leankv sweep --shard`, with its share of the cores, and of the GPUs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from leankv.errors import UserError
from leankv.executors.crew import Job, Start, Worker
from leankv.shards import Shard

EXIT_USER_ERROR = 2


@contextmanager
def local_workers(job: Job) -> Iterator[Start]:
    """Starts workers as processes of this machine."""

    def start(shards: Sequence[Shard]) -> list[Worker]:
        return [LocalWorker(job, shard) for shard in shards]

    yield start


class LocalWorker:
    """A process that sweeps a shard."""

    def __init__(self, job: Job, shard: Shard):
        self.log = job.log(shard)
        command = [
            sys.executable,
            "-m",
            "leankv",
            "sweep",
            "--config",
            str(job.config),
            "--output-dir",
            str(job.folder),
        ]
        with self.log.open("ab") as file:
            self._began = file.tell()
            self._process = subprocess.Popen(
                [*command, "--shard", str(shard), "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                env={**os.environ, **_share(shard, job.workers)},
            )

    def ended(self) -> str | None:
        """See `Worker`."""
        code = self._process.poll()
        if code == EXIT_USER_ERROR and (sentence := _last_error(self.log, self._began)):
            raise UserError(sentence)
        if code is None or code == 0:
            return None if code is None else ""
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def stop(self, force: bool) -> None:
        """See `Worker`."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL if force else signal.SIGINT)
        if force:
            self._process.wait()


def _share(shard: Shard, workers: int) -> dict[str, str]:
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


def _last_error(log: Path, began: int) -> str:
    """The sentence with which a worker refused, from its part of the log."""
    lines = log.read_bytes()[began:].decode(errors="replace").splitlines()
    last = lines[-1] if lines else ""
    return last.removeprefix("error: ") if last.startswith("error: ") else ""
