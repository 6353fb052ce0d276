"""Commands in processes of their own, without the ten seconds in which a new one imports torch and transformers."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import IO, Any

import jaxtyping

from leankv.cli import main
from leankv.executors import worker

FORK = multiprocessing.get_context("fork")


class CommandProcess:
    """A `leankv` command in a copy of this process, which can be waited for and killed as any other.

    It has the methods of `subprocess.Popen` that tests use. It gives way to others, so that who watches it, to stop it
    at some point, is not too late.
    """

    def __init__(self, arguments: Sequence[str]):
        # Files, since a pipe that nobody reads would stop it.
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 - closed below
        self._process = FORK.Process(target=_run, args=(arguments, self._out.fileno(), self._err.fileno()))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Minus the signal's number, where one ended it."""
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it printed, and what it said."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()  # else this process would wait for it at its own end
            raise subprocess.TimeoutExpired("leankv", timeout or 0)
        said = []
        for file in (self._out, self._err):
            file.seek(0)
            said.append(file.read())
            file.close()
        return said[0], said[1]


class ForkedWorker:
    """A local worker in a copy of this process; `leankv.executors.local` takes it for a `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], *, stderr: IO[bytes], env: Mapping[str, str], **given: Any):
        assert list(command[1:3]) == ["-m", "leankv.executors.worker"]
        answer, write = os.pipe()
        self._process = FORK.Process(target=_work, args=(command[3:], write, stderr.fileno(), env))
        self._process.start()
        os.close(write)
        self.stdout = os.fdopen(answer, encoding="utf-8")

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> None:
        self._process.join()


def _work(arguments: Sequence[str], out: int, err: int, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    _begin(out, err)
    sys.argv = ["worker", *arguments]
    worker.main()


def _run(arguments: Sequence[str], out: int, err: int) -> None:
    os.nice(10)
    _begin(out, err)
    sys.argv = ["leankv", *arguments]
    main()


def _begin(out: int, err: int) -> None:
    """What a new process would find."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    jaxtyping.config.update("jaxtyping_disable", True)
