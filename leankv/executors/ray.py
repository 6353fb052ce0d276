"""Workers on Ray: on this machine, or on a cluster whose nodes share the output folder and have LeanKV installed."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from leankv.config.notation import Shard
from leankv.errors import UserError
from leankv.executors.pool import Job, Start, Worker
from leankv.executors.worker import work

CONNECT_SECONDS = 4.0
PROBE_SECONDS = 11.0  # with CONNECT_SECONDS and the time to start, under 20
OBJECT_STORE_BYTES = 100 << 20  # Ray's least is 75 MB; nothing but sentences goes through it
PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"


@contextmanager
def ray_workers(job: Job, address: str | None) -> Iterator[Start]:
    """Starts workers as Ray tasks, each with its share of the cluster's cores, and a GPU where there are any.

    Raises:
        UserError: Ray is not installed or does not start, or `address` does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports on its use unless told not to
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs Ray; run: pip install 'leankv[ray]'") from error
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, **quiet}
        try:
            ray.init(address="local", **local)
        except Exception as error:  # Ray raises no narrower one where its processes are slow to start
            raise UserError(
                f"Ray does not start on this machine ({' '.join(str(error).split())}); start the command again, "
                "or take --executor local"
            ) from error
    else:
        _check_answers(address)
        ray.init(address=address, **quiet)
    resources = ray.cluster_resources()
    cores = max(1, int(resources.get("CPU", 1)) // job.workers)
    # max_calls=1: a worker process ends with its task, and what it held of a GPU's memory is free.
    task = ray.remote(num_cpus=cores, num_gpus=int(resources.get("GPU", 0) > 0), max_retries=0, max_calls=1)(work)

    def start(shards: Sequence[Shard]) -> list[Worker]:
        return [RayWorker(job, shard, task) for shard in shards]

    # Of dead workers Ray itself tells too, on standard output, where what a command found stands alone.
    with redirect_stdout(sys.stderr):
        try:
            yield start
        finally:
            ray.shutdown()


class RayWorker:
    """A Ray task that sweeps a shard."""

    def __init__(self, job: Job, shard: Shard, task: Any):
        self.log = job.log(shard)
        self._result = task.remote(*job.arguments(shard))

    def ended(self) -> str | None:
        """See `Worker`."""
        import ray

        if not ray.wait([self._result], timeout=0)[0]:
            return None
        try:
            sentence: str = ray.get(self._result)
        except ray.exceptions.RayError as error:
            return type(error).__name__
        if sentence:
            raise UserError(sentence)
        return sentence

    def stop(self, force: bool) -> None:
        """See `Worker`."""
        import ray

        if not ray.wait([self._result], timeout=0)[0]:
            ray.cancel(self._result, force=True)


def _check_answers(address: str) -> None:
    """See in good time that a cluster answers. Ray itself takes a minute over it, then ends the process.

    Raises:
        UserError: it does not.
    """
    refused = UserError(f"no Ray cluster answers at {address}; check --address, or leave it out to use this machine")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        if not port.isdecimal() or int(port) > 65535:
            raise refused
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            raise refused from error
    try:
        subprocess.run([sys.executable, "-c", PROBE, address], capture_output=True, timeout=PROBE_SECONDS, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        if b"InvalidAuthToken" in (error.stderr or b""):
            raise UserError(
                f"the Ray cluster at {address} wants its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to what it was started with"
            ) from error
        raise refused from error
