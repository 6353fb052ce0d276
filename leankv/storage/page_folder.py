"""A folder of files that many processes use, held under a size: what was used longest ago goes first.

Files are written whole or not at all, and looked up by name, with no index that could disagree with them. When a file
was used last is its time of modification.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from leankv.errors import UserError
from leankv.storage.files import cannot_write
from leankv.storage.locks import locked

SUFFIX = ".page"

ABANDONED = 3600.0  # seconds after which an unfinished file's writer is taken for dead; assumption


class PageFolder:
    """Files by key.

    Args:
        folder: made when the first file is added.
        max_bytes: of all files together; None for no limit.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None):
        self.folder, self.max_bytes = folder, max_bytes

    def path(self, key: str) -> Path:
        """Where the file of a key lies, or would."""
        return self.folder / f"{key}{SUFFIX}"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def size(self, key: str) -> int:
        """Bytes of the file of a key; 0 where another process dropped it."""
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError:
            return 0

    def keys(self) -> list[str]:
        """All keys, those used longest ago first."""
        return [path.name.removesuffix(SUFFIX) for path, _, _ in self._files()]

    def used(self, keys: Iterable[str]) -> None:
        """Note that files were used just now, the last of them first: so the end of a chain goes before its start.

        Of another user's files, nothing can be noted; they are as good to read.
        """
        now = time.time_ns()
        for place, key in enumerate(keys):
            with contextlib.suppress(OSError):  # or another process dropped it
                os.utime(self.path(key), ns=(now - 1000 * place,) * 2)

    def add(self, key: str, write: Callable[[Path], None], replace: bool = False, kept: Collection[str] = ()) -> bool:
        """Have `write` write a file, unless it is there; then make room. Whether it was written.

        Args:
            key: of the file.
            write: gets its path.
            replace: write it although it is there.
            kept: keys of files that are not to go in exchange.

        Raises:
            UserError: the folder cannot be written, or there is no room beside what is kept.
        """
        with locked(self.folder, "pages"):
            there = key in self
            if there and not replace:
                return False
            write(self.path(key))
            if not self._made_room({key, *kept}):
                if not there:
                    self.path(key).unlink()
                    self._made_room(kept)  # the folder may have been over its limit before
                raise UserError(
                    f"{self.folder} may hold {self.max_bytes} bytes, and what belongs together takes more; raise "
                    "max_bytes"
                )
            return True

    def drop(self, keys: Iterable[str]) -> int:
        """Remove files; the bytes that were freed."""
        freed = 0
        with locked(self.folder, "pages"):
            for key in keys:
                freed += self._remove(self.path(key))
        return freed

    @contextlib.contextmanager
    def working_on(self, key: str) -> Iterator[None]:
        """Keep other processes from working out the same at the same time."""
        with locked(self.folder, f"working-on-{key[:2]}"):  # few files: locks are never removed
            yield

    def _made_room(self, kept: Collection[str]) -> bool:
        """Remove what was used longest ago until the rest is within the limit; where what is kept is more than that
        already, nothing. Whether there is room."""
        for path in self.folder.glob(f".*{SUFFIX}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        if self.max_bytes is None:
            return True
        files = self._files()
        may_go = [(path, size) for path, _, size in files if path.name.removesuffix(SUFFIX) not in kept]
        left = sum(size for _, _, size in files) - self.max_bytes
        if left > sum(size for _, size in may_go):
            return False
        for path, size in may_go:
            if left <= 0:
                break
            self._remove(path)
            left -= size
        return True

    def _files(self) -> list[tuple[Path, int, int]]:
        """Path, time of last use and size of each, those used longest ago first."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((path, status.st_mtime_ns, status.st_size))
        return sorted(found, key=lambda file: (file[1], file[0].name))

    def _remove(self, path: Path) -> int:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise cannot_write(path, error) from error
        return size
