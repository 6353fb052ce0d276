"""Result files: written whole or not at all, found again by the hash of everything they depend on.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed. So a run that is killed
at any instant leaves finished files and ignorable temporary ones, and the next run finds what is finished by its key.
"""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from leankv.errors import UserError

DISK_SHARE = 0.9  # of what is free; the rest is for results, and for others


def usable_bytes(folder: Path) -> float:
    """Bytes that large working files may take of the disk under `folder`."""
    return DISK_SHARE * shutil.disk_usage(folder).free


def hash_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`: keys sorted, no spaces, NaN refused."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def hash_of_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file next to `path`, flush it to the disk, then rename it to `path`.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full. Nothing half-written is left under `path`.
    """
    with _renamed_at_the_end(path, write):
        pass


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write several files, all of them under temporary names before any is renamed; the first one is renamed last.

    Raises:
        UserError: as in `write_atomically`; then the files that were there are as they were, unless it is the renaming
            that failed.
    """
    with contextlib.ExitStack() as stack:
        for path, data in files.items():
            stack.enter_context(_renamed_at_the_end(path, functools.partial(_fill, data)))


@contextlib.contextmanager
def _renamed_at_the_end(path: Path, write: Callable[[Path], None]) -> Iterator[None]:
    """Have `write` fill a temporary file next to `path`, flushed; it is renamed when the block ends well."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        named = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        # Not by mkstemp, whose files only their owner may read: what others may do is the process's umask to say.
        os.close(os.open(named, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = named
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        yield
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _fill(data: bytes, temporary: Path) -> None:
    temporary.write_bytes(data)


def cannot_write(path: Path, error: OSError) -> UserError:
    """The sentence for a write that the operating system refused."""
    reason = error.strerror or str(error)
    return UserError(
        f"cannot write {path}: {reason}; free space or choose another --output-dir, then run the same command again "
        "(what is finished is kept)"
    )


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically."""
    write_atomically(path, functools.partial(_fill, data))


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented JSON, as files have it."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run again") from error


def check_output_dir(path: Path) -> None:
    """Make sure that results can be written under `path`, before anything is computed.

    Raises:
        UserError: it is a file, or cannot be made or written.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"the output folder {path} is a file; choose another --output-dir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error
