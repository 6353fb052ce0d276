"""Tensors and what is said of them in one file: a safetensors file under one checksum, written whole or not at all."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from leankv.errors import UserError
from leankv.storage.files import hash_of, write_bytes

ABOUT, CHECKSUM = "leankv", "sha256"
"""Names in the header's metadata."""


class UnreadableError(UserError):
    """A file that is not there, or that the operating system does not hand out: nothing says that it is damaged."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write contiguous tensors on the CPU, and a JSON table about them.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    metadata = {ABOUT: json.dumps(about, allow_nan=False), CHECKSUM: _checksum(tensors, about)}
    write_bytes(path, safetensors.torch.save(dict(tensors), metadata=metadata))


def read_tensors(path: Path, what: str, way_out: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The way back. Nothing is handed out unless every bit of it is as it was written.

    Args:
        path: the file.
        what: it is, for the sentences.
        way_out: what to do where it is none, likewise.

    Raises:
        UnreadableError: there is no such file, or it cannot be read.
        UserError: it is damaged, cut off, or something else.
    """
    with _opened(path, what, way_out) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        about, checksum = _described(file)
        is_whole = checksum == _checksum(tensors, about)
    if not is_whole:
        raise UserError(f"{what} {path} was changed since it was written (its sha256 differs); {way_out}")
    return tensors, about


def read_about(path: Path, what: str, way_out: str) -> dict[str, Any]:
    """What a file says of its tensors, which are not read, so not checked either; arguments as in `read_tensors`.

    Raises:
        UnreadableError: as there.
        UserError: it is cut off, or something else.
    """
    with _opened(path, what, way_out) as file:
        return _described(file)[0]


@contextlib.contextmanager
def _opened(path: Path, what: str, way_out: str) -> Iterator[Any]:
    """A file to read; whatever goes wrong meanwhile is told in a sentence."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UnreadableError(f"{what} {path} does not exist; {way_out}") from error
    except OSError as error:
        raise UnreadableError(f"{what} {path} cannot be read ({_short(error)}); {way_out}") from error
    # Nothing in a file that is no longer what was written is sure to be of any kind.
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{what} {path} is damaged ({_short(error)}); {way_out}") from error


def _described(file: Any) -> tuple[dict[str, Any], str]:
    """The table about an open file's tensors, and its checksum."""
    metadata = file.metadata() or {}
    about = json.loads(metadata[ABOUT])
    if not isinstance(about, dict):
        raise TypeError(f"its table is {type(about).__name__}")
    return about, metadata[CHECKSUM]


def _checksum(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(hash_of(about).encode())
    update_with(digest, tensors)
    return digest.hexdigest()


def update_with(digest: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Have a hash of `hashlib` take in tensors: names, kinds, shapes and numbers."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # where it lies: no copy


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 100 else f"{text[:100]}..."
