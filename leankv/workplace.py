"""What every command starts from: an experiment, its model, text and folder, and captures of its calibration text."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from leankv.capture import CAPTURE_REVISION, Activations, capture, find_activations, groups_that_fit
from leankv.data import Blocks, TextSource
from leankv.errors import UserError
from leankv.experiment import Experiment
from leankv.model import LoadedModel, load_model
from leankv.notation import parse_layers
from leankv.output_folder import check_folder
from leankv.progress import Progress
from leankv.rope import KeyRotation
from leankv.shards import Shard
from leankv.store import Cells, hash_of, locked

WORKING, KEPT = "activations", "kept-activations"
"""How folders of captures begin: those that a command makes for itself, and those that a user asked for."""


class Workplace:
    """An experiment's model, text and output folder.

    Args:
        experiment: what is asked for.
        progress: shows what takes long.
        shard: which part of the layers is this worker's, when several share the folder.

    Raises:
        UserError: the model, the data or the folder are not usable; see the rooms that own them.
    """

    def __init__(self, experiment: Experiment, progress: Progress, shard: Shard | None = None):
        self.experiment = experiment
        self.progress = progress
        self.shard = shard or Shard()
        self.folder = Path(experiment.output_dir)
        # What can fail cheaply fails before a model is loaded.
        check_folder(experiment)
        self._source = TextSource(experiment.data)
        progress.say(f"loading {experiment.model.name}")
        self.loaded: LoadedModel = load_model(experiment.model)
        self.layers = parse_layers(experiment.layers, len(self.loaded.geometry.layers))
        self._blocks: dict[str, Blocks] = {}
        self.cells = Cells(self.folder / "cells")

    def begin(self) -> None:
        """Results are about to change: without its manifest the folder does not pass for a finished run."""
        (self.folder / "manifest.json").unlink(missing_ok=True)

    def blocks(self, split: str) -> Blocks:
        """The blocks of a split that this experiment uses."""
        if split not in self._blocks:
            data = self.experiment.data
            wanted: int = getattr(data, f"{split}_blocks")
            self._blocks[split] = self._source.blocks(split, self.loaded.tokenizer, wanted, data.block_length)
        return self._blocks[split]

    @cached_property
    def rotation(self) -> KeyRotation | None:
        """Takes keys to the key space of their codecs; None where that is the cache's own (post-rope)."""
        wanted = self.experiment.codec.key_space
        if wanted == "post-rope":
            return None
        try:
            return KeyRotation(self.loaded.model)
        except UserError as error:
            if wanted == "pre-rope":
                raise
            self.progress.say(f"keys stay as the cache holds them (post-rope): {error}")
            return None

    @property
    def key_space(self) -> str:
        """`pre-rope` or `post-rope`."""
        return "post-rope" if self.rotation is None else "pre-rope"

    @cached_property
    def model_key(self) -> dict[str, Any]:
        """What every number of this run depends on."""
        return {"fingerprint": self.loaded.fingerprint, **self.loaded.numerics}

    def fit_lock(self) -> AbstractContextManager[bool]:
        """Held while this worker's layers are captured, and while the capture is read; not reentrant."""
        return locked(self.cells.folder, _fit_lock(self.shard.file_name))

    def captures(self, layers: Sequence[int]) -> Iterator[tuple[list[int], Activations]]:
        """The calibration activations of these layers, in groups where the disk does not hold those of all at once."""
        groups = [list(layers)]
        if self._kept(layers) is None:
            groups = groups_that_fit(self.loaded, self.blocks("calibration"), layers, self.folder)
        for group in groups:
            activations = self.captured(group)
            yield group, activations
            if len(groups) > 1 and activations.folder != self._kept_folder:
                activations.delete()  # else it stays for other codecs, until the command's end

    def captured(self, layers: Sequence[int]) -> Activations:
        """The calibration activations of these layers; kept ones or a stopped run's are used if they cover them."""
        shard = "" if self.shard == Shard() else f"-{self.shard.file_name}"
        folder = self.folder / f"{WORKING}-{self._capture_hash}{shard}"
        found = self._kept(layers) or _covering(folder, layers) or self._capture(folder, layers)
        of_these = {**self._capture_depends_on, "layers": found.manifest["layers"]}
        cost = {"seconds": found.manifest["seconds"], "tokens": self.blocks("calibration").tokens.numel()}
        self.cells.get_or_compute("capture", of_these, lambda: cost)
        return found

    def keep_captured(self) -> Activations:
        """The calibration activations of the layers asked for, which every later command finds and none removes.

        What was kept before under the same settings stays: layers are added to it.
        """
        with locked(self.cells.folder, self._kept_folder.name):
            kept = find_activations(self._kept_folder)
            layers = sorted({*self.layers, *(kept.manifest["layers"] if kept else ())})
            return self._kept(layers) or self._capture(self._kept_folder, layers)

    @cached_property
    def _capture_depends_on(self) -> dict[str, Any]:
        return {
            "revision": CAPTURE_REVISION,
            "model": self.model_key,
            "blocks": self.blocks("calibration").hash,
            "batch_size": self.experiment.protocol.batch_size,
            "key_space": self.key_space,
        }

    @property
    def _capture_hash(self) -> str:
        return hash_of(self._capture_depends_on)[:16]

    @property
    def _kept_folder(self) -> Path:
        return self.folder / f"{KEPT}-{self._capture_hash}"

    def _kept(self, layers: Sequence[int]) -> Activations | None:
        return _covering(self._kept_folder, layers)

    def _capture(self, folder: Path, layers: Sequence[int]) -> Activations:
        blocks, batch_size = self.blocks("calibration"), self.experiment.protocol.batch_size
        depends_on = self._capture_depends_on
        return capture(self.loaded, blocks, folder, layers, batch_size, depends_on, self.progress, self.rotation)


def _covering(folder: Path, layers: Sequence[int]) -> Activations | None:
    """The finished capture in `folder`, if these layers are in it."""
    found = find_activations(folder)
    return found if found is not None and set(layers) <= set(found.manifest["layers"]) else None


def remove_captures(folder: Path, only: Shard | None = None) -> None:
    """Remove a run's captures that nobody asked to keep, or only one shard's; of a worker that is at work none."""
    for path in folder.glob(f"{WORKING}-*"):
        name = path.name.removeprefix(f"{WORKING}-").partition("-")[2] or Shard().file_name
        if only is not None and name != only.file_name:
            continue
        with locked(folder / "cells", _fit_lock(name), wait=False) as mine:
            if mine:
                (path / "manifest.json").unlink(missing_ok=True)  # what is left of a stopped removal is no capture
                shutil.rmtree(path, ignore_errors=True)


def _fit_lock(shard_name: str) -> str:
    """The lock under which a shard's layers are captured and fitted."""
    return f"fit-{shard_name}"
