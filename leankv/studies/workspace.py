"""What every study starts from: an experiment, its model, its text, and where results are kept."""

import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from leankv.cache.plan import PlanSpec, Site
from leankv.codecs import Recipe
from leankv.config.experiment import Experiment
from leankv.config.notation import Shard, parse_layers
from leankv.data.blocks import Blocks
from leankv.data.documents import Documents, DocumentSource, documents_of
from leankv.data.splits import TextSource
from leankv.errors import UserError
from leankv.models.loading import LoadedModel, load_model
from leankv.models.rope import KeyRotation, find_rotation
from leankv.models.structure import earlier_layers, max_positions
from leankv.progress import Progress
from leankv.report import run_files
from leankv.storage.cells import Cells, StoredCells
from leankv.storage.memory_budget import MemoryBudget
from leankv.studies.run_folder import check_folder, claim_folder


@runtime_checkable
class Source(Protocol):
    """Where text comes from."""

    def blocks(self, split: str, tokenizer: Any, n_blocks: int, block_length: int) -> Blocks:
        """The first `n_blocks` blocks of a split, each `block_length` tokens."""


class Workspace:
    """An experiment's model and text, and where its results are kept.

    Attributes:
        experiment: the settings.
        loaded: the model.
        progress: shows what takes long.
        shard: which part of the layers is this worker's, when several share the folder.
        folder: where results are kept; None keeps them in memory.
        cells: measurements, by the hash of all that they depend on.
        plan: what the experiment compresses how, with every layer of the model named.
        layers: the layers that the experiment is about.
        memory: what may be kept of passes through the model, for all that measure here.
    """

    def __init__(
        self,
        experiment: Experiment,
        loaded: LoadedModel,
        source: Source,
        progress: Progress,
        folder: Path | None = None,
        shard: Shard | None = None,
    ):
        """
        Args:
            experiment: the settings; which model and text they name does not matter here.
            loaded: the model.
            source: the text.
            progress: shows what takes long.
            folder: where results are kept; None keeps them in memory.
            shard: of the layers.

        Raises:
            UserError: a recipe is not understood or does not suit the model, a layer does not exist, or blocks are
                longer than the model's positions.
        """
        _check_lengths(experiment, loaded)
        self.experiment = experiment
        self.loaded = loaded
        self.progress = progress
        self.shard = shard or Shard()
        self.folder = folder
        self.cells: Cells = Cells() if folder is None else StoredCells(folder / "cells")
        n_layers = len(loaded.geometry.layers)
        self.layers = parse_layers(experiment.layers, n_layers)
        self.plan = self.checked(PlanSpec.parse(experiment.plan))
        self.memory = MemoryBudget(self.memory_bytes)
        self._source = source
        self._blocks: dict[str, Blocks] = {}

    @classmethod
    def open(cls, experiment: Experiment, progress: Progress, shard: Shard | None = None) -> "Workspace":
        """The workspace of an experiment in its output folder, which is claimed for its settings.

        Raises:
            UserError: the model, the data, the plan or the folder are not usable, or the folder was begun with other
                settings.
        """
        workspace = cls.load(experiment, progress, shard)
        claim_folder(experiment)  # now only: a model that is mistyped must not stand in the way of the right one
        return workspace

    @classmethod
    def beside(cls, experiment: Experiment, progress: Progress) -> "Workspace":
        """As `open`, but a folder that was begun keeps what it was begun with: `layers` are this command's alone.

        For what adds to a folder and chooses nothing in it; else a later choice would be among these layers only.

        Raises:
            UserError: as `open`.
        """
        workspace = cls.load(experiment, progress)
        if not (Path(experiment.output_dir) / run_files.EXPERIMENT).is_file():
            claim_folder(experiment)
        return workspace

    @classmethod
    def load(cls, experiment: Experiment, progress: Progress, shard: Shard | None = None) -> "Workspace":
        """As `open`, but runs with other settings may begin in the folder later: for activations, which suit many.

        Raises:
            UserError: as `open`.
        """
        # What can fail cheaply fails before a model is loaded.
        folder = check_folder(experiment)
        PlanSpec.parse(experiment.plan)
        source = TextSource(experiment.data, experiment.length_of("selection"))
        progress.say(f"loading {experiment.model.name}")
        return cls(experiment, load_model(experiment.model), source, progress, folder, shard)

    @property
    def n_layers(self) -> int:
        return len(self.loaded.geometry.layers)

    @property
    def memory_bytes(self) -> int:
        """What activations and hidden states may take."""
        return round(self.experiment.memory_budget * 1e9)

    def checked(self, plan: PlanSpec) -> PlanSpec:
        """The plan with every layer of the model named.

        Raises:
            UserError: it names a layer that does not exist, or a recipe does not suit the model.
        """
        plan = plan.resolved(self.n_layers)
        for site, recipe in plan.sites(self.n_layers).items():
            recipe.require_width(self.loaded.geometry.layers[site.layer].width_of(site.part))
            self._check_context(recipe)
        return plan

    def _check_context(self, recipe: Recipe) -> None:
        if not recipe.n_context_layers:
            return
        if not isinstance(self.loaded.geometry.width, int):
            raise UserError(
                "share predicts between keys and values of one width, and this model's differ; use other codecs"
            )
        if recipe.n_context_layers >= self.n_layers:
            raise UserError(f"{recipe.text} looks outside of a model of {self.n_layers} layers")

    def context_of(self, site: Site, recipe: Recipe) -> list[Site]:
        """The sites whose vectors a recipe predicts from at a site: those of the layers before, the nearest first."""
        if not recipe.n_context_layers:
            return []
        windows = [layer.sliding_window for layer in self.loaded.geometry.layers]
        layers = earlier_layers(windows, site.layer, recipe.n_context_layers)
        own = [Site(site.layer, "k")] if site.part == "v" else []
        return [Site(layer, part) for layer in layers for part in ("k", "v")] + own

    def begin(self) -> None:
        """Results are about to change: without its manifest the folder does not pass for a finished run."""
        if self.folder is not None:
            (self.folder / run_files.MANIFEST).unlink(missing_ok=True)

    def blocks(self, split: str) -> Blocks:
        """The blocks of a split that this experiment uses; but for calibration, as long as its protocol measures."""
        if split not in self._blocks:
            wanted: int = getattr(self.experiment.data, f"{split}_blocks")
            length = self.experiment.length_of(split)
            self._blocks[split] = self._source.blocks(split, self.loaded.tokenizer, wanted, length)
        return self._blocks[split]

    def with_long_selection_blocks(self) -> "Workspace":
        """The same with selection blocks as long as those of reports: the same documents, and about as many tokens."""
        short, long = self.experiment.length_of("selection"), self.experiment.measured_length
        count = max(1, self.experiment.data.selection_blocks * short // long)
        other = copy.copy(self)
        other._blocks = {
            **self._blocks,
            "selection": self._source.blocks("selection", self.loaded.tokenizer, count, long),
        }
        return other

    def documents(self, split: str, least_tokens: int) -> Documents:
        """The documents of a split, the first tokens of each as one block; see `leankv.data.documents`.

        Args:
            split: whose.
            least_tokens: documents with fewer are left out; under `prefix`, those without a whole continuation too.

        Raises:
            UserError: the text did not come in documents.
        """
        if not isinstance(self._source, DocumentSource):
            raise UserError(
                "certification takes documents one by one, and text given in blocks has none; use a data set"
            )
        tokenizer, length = self.loaded.tokenizer, self.experiment.measured_length
        least = length if self.experiment.protocol.kind == "prefix" else least_tokens
        texts = self._source.documents(split, tokenizer)
        return documents_of(texts, tokenizer, length, least, split, self._source.name)

    @cached_property
    def rotation(self) -> KeyRotation | None:
        """Takes keys to the key space of their codecs; None where that is the cache's own (post-rope)."""
        wanted = self.experiment.codec.key_space
        if wanted == "post-rope":
            return None

        def tell(reason: str) -> None:
            self.progress.say(f"keys stay as the cache holds them (post-rope): {reason}")

        return find_rotation(self.loaded.model, wanted == "pre-rope", tell)

    @property
    def key_space(self) -> str:
        """`pre-rope` or `post-rope`."""
        return "post-rope" if self.rotation is None else "pre-rope"

    @cached_property
    def model_key(self) -> dict[str, Any]:
        """What every number of this workspace depends on."""
        return {"fingerprint": self.loaded.fingerprint, **self.loaded.numerics}


def _check_lengths(experiment: Experiment, loaded: LoadedModel) -> None:
    """Refuse text that is longer than the model reads.

    Raises:
        UserError: it is.
    """
    limit = max_positions(loaded.model.config)
    if limit is None:
        return
    is_prefix = experiment.protocol.kind == "prefix"
    measured = "protocol.prefix_length with protocol.continuation" if is_prefix else "data.block_length"
    for name, length in (
        (measured, experiment.measured_length),
        ("data.block_length", experiment.data.block_length),
        ("data.selection_block_length", experiment.length_of("selection")),
    ):
        if length > limit:
            raise UserError(f"{name} of {length} tokens is more than the model's {limit} positions; set it to less")
