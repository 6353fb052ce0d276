"""Captured activations of a workspace's calibration text: made when they are asked for, gone when nothing needs them.

With a folder they lie in it, so that a command that was stopped finds them again; without one they are in memory.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from leankv.calibration.activations import Activations, StoredActivations, find_activations
from leankv.calibration.capture import CAPTURE_REVISION, capture, groups_that_fit, vectors_in_memory
from leankv.config.notation import Shard
from leankv.storage.files import hash_of
from leankv.storage.locks import locked
from leankv.studies.workspace import Workspace

WORKING, KEPT = "activations", "kept-activations"
"""How folders of captures begin: those that a command makes for itself, and those that a user asked for."""


class ActivationStore:
    """The calibration activations of a workspace, `[tokens, W]` for each site."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self._in_memory: Activations | None = None

    def lock(self) -> AbstractContextManager[Any]:
        """Held while this worker's layers are captured, and while the capture is read; not reentrant."""
        folder = self.workspace.folder
        if folder is None:
            return nullcontext()
        return locked(folder / "cells", _fit_lock(self.workspace.shard.file_name))

    def in_groups(self, layers: Sequence[int]) -> Iterator[tuple[list[int], Activations]]:
        """The activations of these layers, in groups where the disk does not hold those of all at once."""
        workspace, groups = self.workspace, [list(layers)]
        if workspace.folder is not None and self._found(layers) is None:
            groups = groups_that_fit(workspace.loaded, workspace.blocks("calibration"), layers, workspace.folder)
        for group in groups:
            activations = self.of(group)
            yield group, activations
            if (
                len(groups) > 1
                and isinstance(activations, StoredActivations)
                and activations.folder != self._kept_folder
            ):
                activations.delete()  # else it stays for other codecs, until the command's end

    def of(self, layers: Sequence[int]) -> Activations:
        """The activations of these layers; kept ones or a stopped run's are used if they cover them."""
        workspace = self.workspace
        if workspace.folder is None:
            if not _covers(self._in_memory, layers):
                blocks, batch_size = workspace.blocks("calibration"), workspace.experiment.protocol.batch_size
                self._in_memory = vectors_in_memory(
                    workspace.loaded, blocks, layers, batch_size, workspace.progress, workspace.rotation
                )
            assert self._in_memory is not None
            return self._in_memory
        found = self._found(layers) or self._capture(self._working_folder, layers)
        of_these = {**self._depends_on, "layers": found.manifest["layers"]}
        cost = {"seconds": found.manifest["seconds"], "tokens": workspace.blocks("calibration").tokens.numel()}
        workspace.cells.get_or_compute("capture", of_these, lambda: cost)
        return found

    def keep(self) -> StoredActivations:
        """The activations of the layers asked for, which every later command finds and none removes.

        What was kept before under the same settings stays: layers are added to it.
        """
        folder = self._kept_folder
        with locked(folder.parent / "cells", folder.name):
            kept = find_activations(folder)
            layers = sorted({*self.workspace.layers, *(kept.manifest["layers"] if kept else ())})
            return self._kept(layers) or self._capture(folder, layers)

    @cached_property
    def _depends_on(self) -> dict[str, Any]:
        return {
            "revision": CAPTURE_REVISION,
            "model": self.workspace.model_key,
            "blocks": self.workspace.blocks("calibration").hash,
            "batch_size": self.workspace.experiment.protocol.batch_size,
            "key_space": self.workspace.key_space,
        }

    @property
    def _hash(self) -> str:
        return hash_of(self._depends_on)[:16]

    @property
    def _working_folder(self) -> Path:
        assert self.workspace.folder is not None
        shard = "" if self.workspace.shard == Shard() else f"-{self.workspace.shard.file_name}"
        return self.workspace.folder / f"{WORKING}-{self._hash}{shard}"

    @property
    def _kept_folder(self) -> Path:
        assert self.workspace.folder is not None
        return self.workspace.folder / f"{KEPT}-{self._hash}"

    def _found(self, layers: Sequence[int]) -> StoredActivations | None:
        """A capture of these layers, kept or of this command."""
        return self._kept(layers) or _covering(self._working_folder, layers)

    def _kept(self, layers: Sequence[int]) -> StoredActivations | None:
        return _covering(self._kept_folder, layers)

    def _capture(self, folder: Path, layers: Sequence[int]) -> StoredActivations:
        workspace = self.workspace
        blocks, batch_size = workspace.blocks("calibration"), workspace.experiment.protocol.batch_size
        return capture(
            workspace.loaded,
            blocks,
            folder,
            layers,
            batch_size,
            self._depends_on,
            workspace.progress,
            workspace.rotation,
        )


def _covering(folder: Path, layers: Sequence[int]) -> StoredActivations | None:
    """The finished capture in `folder`, if these layers are in it."""
    found = find_activations(folder)
    return found if _covers(found, layers) else None


def _covers(activations: Activations | None, layers: Sequence[int]) -> bool:
    return activations is not None and set(layers) <= set(activations.manifest["layers"])


def remove_captures(folder: Path | None, shard: Shard | None = None) -> None:
    """Remove a run's captures that nobody asked to keep, or only one shard's; of a worker that is at work none."""
    for path in folder.glob(f"{WORKING}-*") if folder is not None else ():
        name = path.name.removeprefix(f"{WORKING}-").partition("-")[2] or Shard().file_name
        if shard is not None and name != shard.file_name:
            continue
        with locked(path.parent / "cells", _fit_lock(name), wait=False) as mine:
            if mine:
                (path / "manifest.json").unlink(missing_ok=True)  # what is left of a stopped removal is no capture
                shutil.rmtree(path, ignore_errors=True)


def _fit_lock(shard_name: str) -> str:
    """The lock under which a shard's layers are captured and fitted."""
    return f"fit-{shard_name}"
