"""Arrays in memory, or in a temporary file where they would not fit."""

import math
import os
import tempfile
from pathlib import Path

import torch

from leankv.storage.files import cannot_write


def mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """An empty tensor in a file of its own, which vanishes with the tensor.

    Raises:
        UserError: the disk has no space for it.
    """
    size = math.prod(shape)
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".hidden-states-", suffix=".tmp")
        try:
            # Space is claimed now: a full disk is an error here, and would be a crash when the pages are written.
            os.posix_fallocate(handle, 0, size * dtype.itemsize)
            return torch.from_file(name, shared=True, size=size, dtype=dtype).reshape(shape)
        finally:
            os.close(handle)
            Path(name).unlink()
    except OSError as error:
        raise cannot_write(folder, error) from error
