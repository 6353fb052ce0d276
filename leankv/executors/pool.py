"""What the executors have in common: a worker pool that is watched, mended and stopped."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from leankv.config.notation import Shard
from leankv.errors import UserError
from leankv.progress import Progress

RESTARTS = 3  # of one shard; a worker that dies four times will die again

LOOK_EVERY_SECONDS = 0.5

STOP_SECONDS = 5.0  # for workers to end by themselves


@dataclass(frozen=True)
class Job:
    """What a worker pool works on.

    Attributes:
        config: the experiment's file.
        folder: the output folder.
        workers: how many there are.
        cwd: to which paths in the experiment are relative.
        task: what they are at; see `leankv.executors.worker.TASKS`.
    """

    config: Path
    folder: Path
    workers: int
    cwd: Path
    task: str = "sweep"

    def log(self, shard: Shard) -> Path:
        """The log of a shard's workers, one after another."""
        path = self.folder / "logs" / f"shard-{shard.index}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def arguments(self, shard: Shard) -> tuple[str, str, str, str, str]:
        """What `leankv.executors.worker.work` takes for a shard."""
        return self.task, str(self.config), str(shard), str(self.log(shard)), str(self.cwd)


class Worker(Protocol):
    """One worker at its shard."""

    log: Path

    def ended(self) -> str | None:
        """None while it works, nothing (`""`) when its shard is done, else a few words on how it died.

        Raises:
            UserError: it ended with one.
        """
        ...

    def stop(self, force: bool) -> None:
        """Ask it to end; with `force`, end it. Does nothing to one that has ended."""
        ...


Start = Callable[[Sequence[Shard]], Sequence[Worker]]
"""Starts a worker for each shard."""


@contextmanager
def watched(folder: Path, shards: Sequence[Shard], start: Start, progress: Progress) -> Iterator[Callable[[], bool]]:
    """Start a worker a shard; all are stopped at the end.

    Yields:
        A function that says whether any is at work, and starts those that died again. It raises `UserError` where a
        worker ended with one, or died more than `RESTARTS` times.
    """
    pool: dict[Shard, Worker] = {}
    starts = dict.fromkeys(shards, 1)

    def at_work() -> bool:
        for shard, worker in list(pool.items()):
            died = worker.ended()
            if not died:
                if died is not None:
                    del pool[shard]
                continue
            if starts[shard] > RESTARTS:
                raise UserError(
                    f"the worker of shard {shard} died {starts[shard]} times ({died}); its log is {worker.log}; "
                    "what is finished is kept, and the same command goes on from there"
                )
            progress.say(f"the worker of shard {shard} died ({died}) and is started again; its log is {worker.log}")
            starts[shard] += 1
            pool.update(zip([shard], start([shard]), strict=True))
        return bool(pool)

    with _terminable():
        try:
            progress.say(f"starting {len(shards)} workers; their logs are in {folder / 'logs'}")
            pool.update(zip(shards, start(shards), strict=True))
            yield at_work
        finally:
            _stop(list(pool.values()))


def _stop(workers: list[Worker]) -> None:
    def ended(worker: Worker) -> bool:
        try:
            return worker.ended() is not None
        except UserError:
            return True

    for worker in workers:
        worker.stop(force=False)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and not all(ended(worker) for worker in workers):
        time.sleep(0.05)
    for worker in workers:
        worker.stop(force=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """A termination signal, as of a batch system, stops the worker pool as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
