"""Locks between processes that share a folder.

The operating system holds them: a worker that dies, however it dies, holds none.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from leankv.storage.files import cannot_write

LOCKS = ".locks"
"""Subfolder with the lock files. They are empty and stay: removing one that others wait for would split it in two."""


@contextlib.contextmanager
def locked(folder: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `name` of `folder`; yields False where another process holds it and `wait` is False.

    Raises:
        UserError: the lock file cannot be made.
    """
    path = folder / LOCKS / f"{name}.lock"
    lock = FileLock(path, blocking=wait)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield True
    finally:
        lock.release()
