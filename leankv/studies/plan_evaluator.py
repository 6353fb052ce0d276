"""What plans cost: nats of a split's blocks under a plan, measured once and looked up ever after."""

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import PlanSpec
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation.base_pass import BasePass
from leankv.evaluation.exact_prefixes import ExactPrefixes
from leankv.evaluation.paired import PairedRun, measure_pair
from leankv.evaluation.perplexity import MEASURING_REVISION, BlockNats, exact_window, measure_nats
from leankv.evaluation.replay import Replay
from leankv.storage.cells import StoredCells, cell_name
from leankv.studies.activation_store import ActivationStore
from leankv.studies.codec_store import CodecStore
from leankv.studies.distilled_codecs import DistilledCodecs
from leankv.studies.workspace import Workspace

EVERYTHING_EXACT = PlanSpec()


KEYED = {
    "prefix": (("kind", "batch_size", "prefix_length", "continuation"), ("sinks",)),
    "other": (("kind", "chunk", "batch_size"), ("sinks", "window")),
}
"""What of a protocol nats depend on: how tokens are fed, and what is kept exact, on which the base run does not."""


class PlanEvaluator:
    """Measures plans in a workspace: fits their codecs where they are missing, and runs the model.

    Attributes:
        workspace: model, text and folder.
        codecs: the plans' codecs.
        protocol: how perplexity is measured.
    """

    def __init__(self, workspace: Workspace, protocol: ProtocolConfig | None = None):
        self.workspace = workspace
        self.protocol = protocol or workspace.experiment.protocol
        self.codecs = CodecStore(workspace, ActivationStore(workspace))

    def with_window(self, window: int) -> "PlanEvaluator":
        """The same with another exact window; codecs, which depend on none, and the base model's pass are shared.

        Raises:
            UserError: a strict pass and a prefix have no exact window.
        """
        protocol = replace(self.protocol, window=window)
        replace(self.workspace.experiment, protocol=protocol)  # refuses a protocol that cannot be
        other = PlanEvaluator(self.workspace, protocol)
        other.codecs = self.codecs
        other._base_pass = self._base_pass
        return other

    def with_reference(self, reference: PlanSpec) -> "PlanEvaluator":
        """The same with codecs that are fitted to what `reference` leaves; see `CodecStore.with_reference`."""
        other = copy.copy(self)
        other.codecs = self.codecs.with_reference(reference)
        return other

    def with_distilled_codecs(self) -> "PlanEvaluator":
        """The same with codecs that are trained together; see `DistilledCodecs`."""
        other = copy.copy(self)
        other.codecs = DistilledCodecs(self.codecs)
        return other

    def with_long_blocks(self) -> "PlanEvaluator":
        """The same with selection blocks as long as those of reports; codecs are shared."""
        experiment = self.workspace.experiment
        if experiment.length_of("selection") == experiment.measured_length:
            return self  # so is all that was recorded of these blocks
        other = PlanEvaluator(self.workspace.with_long_selection_blocks(), self.protocol)
        other.codecs = self.codecs
        return other

    @cached_property
    def _selection_replay(self) -> Replay:
        """Selection blocks are measured under many plans, so each is run from its first changed layer on only."""
        workspace = self.workspace
        return Replay(
            workspace.loaded.model,
            workspace.blocks("selection"),
            self.protocol,
            workspace.memory,
            workspace.folder or Path(tempfile.gettempdir()),
            workspace.rotation,
        )

    @cached_property
    def _base_pass(self) -> BasePass:
        """Many plans are set beside the base model on the same blocks, so its layers run once for each block."""
        model = self.workspace.loaded.model
        return BasePass(model, lambda: LeanCache(model.config, {}, sinks=0, window=0), self.workspace.memory)

    @cached_property
    def _prefixes(self) -> ExactPrefixes | None:
        """Many plans are measured behind the same prefixes, so these are computed once; None under other protocols."""
        if self.protocol.coded_after is None:
            return None
        return ExactPrefixes(self.workspace.loaded.model, self.workspace.memory)

    def new_cache(self, spec: PlanSpec, decode_once: bool = False) -> LeanCache:
        """An empty cache under a plan, with the protocol's sinks and window.

        Args:
            spec: the plan.
            decode_once: for measuring perplexity, which is faster then; such a cache saves no memory.
        """
        model, protocol = self.workspace.loaded.model, self.protocol
        plan = self.codecs.plan(spec)
        return LeanCache(
            model.config,
            plan,
            sinks=protocol.sinks,
            window=exact_window(protocol),
            rotation=self.workspace.rotation,
            decode_once=decode_once,
        )

    def nats(
        self,
        spec: PlanSpec,
        split: str = "selection",
        title: str = "",
        block_ids: Sequence[int] | None = None,
        extends_to_supersets: bool = False,
    ) -> BlockNats:
        """Nats of a split's blocks under a plan; with everything exact, of the base model.

        Args:
            spec: the plan.
            split: whose blocks.
            title: shows a progress bar of that name when something has to be measured.
            block_ids: numbers of the blocks to measure, in this order; all of them unless given.
            extends_to_supersets: plans that add to this one will be measured too; see `leankv.evaluation.replay`.
        """
        blocks = self._blocks(split, block_ids)

        def compute() -> dict[str, Any]:
            if not title:
                return self._measured(spec, split, block_ids, lambda: None, extends_to_supersets).cell()
            with self.workspace.progress.stage(title, len(blocks)) as step:
                return self._measured(spec, split, block_ids, step, extends_to_supersets).cell()

        cell = self.workspace.cells.get_or_compute(f"nats-{split}", self.depends_on(spec, blocks), compute)
        return BlockNats.from_cell(cell)

    def nats_by_batch(self, spec: PlanSpec, title: str, block_ids: Sequence[int] | None = None) -> BlockNats:
        """As `nats` of selection text, each batch of blocks a cell of its own.

        Workers that ask for the same share the batches, and a run that is killed loses the one that it was at.
        """
        size, cells = self.protocol.batch_size, self.workspace.cells
        numbers = range(len(self.workspace.blocks("selection"))) if block_ids is None else block_ids
        batches = [list(numbers[first : first + size]) for first in range(0, len(numbers), size)]
        keys = [self.depends_on(spec, self._blocks("selection", batch)) for batch in batches]

        def found(step: Callable[[], None]) -> list[Any]:
            def compute(batch: list[int]) -> dict[str, Any]:
                return self._measured(spec, "selection", batch, step).cell()

            asked = [(key, partial(compute, batch)) for key, batch in zip(keys, batches, strict=True)]
            return list(cells.in_order("nats-selection", asked))

        missing = [len(b) for key, b in zip(keys, batches, strict=True) if not cells.has("nats-selection", key)]
        if missing:
            with self.workspace.progress.stage(title, sum(missing)) as step:
                results = found(step)
        else:
            results = found(lambda: None)
        parts = [BlockNats.from_cell(result) for result in results]
        nats = tuple(each for part in parts for each in part.nats)
        return BlockNats(nats, parts[0].tokens_per_block, sum(part.seconds for part in parts))

    def _measured(
        self,
        spec: PlanSpec,
        split: str,
        block_ids: Sequence[int] | None,
        on_block: Callable[[], None],
        extends_to_supersets: bool = False,
    ) -> BlockNats:
        if split == "selection" and self._prefixes is None:
            plan = self.codecs.plan(spec)
            return self._selection_replay.measure(plan, on_block, block_ids, extends_to_supersets)
        cache, model = self.new_cache(spec, decode_once=True), self.workspace.loaded.model
        blocks = self._blocks(split, block_ids)
        return measure_nats(model, blocks, self.protocol, cache.fresh, on_block, self._prefixes)

    def base(self, split: str = "selection") -> BlockNats:
        """Nats of the base model."""
        return self.nats(EVERYTHING_EXACT, split, f"base perplexity, {split} split")

    def documents_nats(self, specs: Sequence[PlanSpec], documents: Sequence[Blocks]) -> Iterator[tuple[BlockNats, ...]]:
        """Nats of one document after another under some plans; with everything exact, of the base model.

        Each is a cell of its own; workers that ask for the same share them.

        Args:
            specs: the plans.
            documents: blocks of one row, of any length; see `leankv.data.documents`.
        """

        def compute(spec: PlanSpec, document: Blocks) -> dict[str, Any]:
            make_cache = self.new_cache(spec, decode_once=True).fresh
            model = self.workspace.loaded.model
            return measure_nats(model, document, self.protocol, make_cache, prefixes=self._prefixes).cell()

        pairs = [(spec, document) for document in documents for spec in specs]
        asked = [(self.depends_on(spec, document), partial(compute, spec, document)) for spec, document in pairs]
        if not asked:
            return
        found = map(BlockNats.from_cell, self.workspace.cells.in_order(f"nats-{documents[0].split}", asked))
        for first in found:
            yield first, *itertools.islice(found, len(specs) - 1)

    def pair(self, spec: PlanSpec, split: str, title: str, block_ids: Sequence[int] | None = None) -> PairedRun:
        """Base model and model under a plan, side by side: nats of both, and divergence.

        Args:
            spec: the plan.
            split: whose blocks.
            title: of the progress bar.
            block_ids: numbers of the blocks to measure, in this order; all of them unless given.
        """
        blocks = self._blocks(split, block_ids)
        return self._pair(blocks, self.new_cache(spec, decode_once=True).fresh, self.depends_on(spec, blocks), title)

    def baseline_pair(
        self, make_cache: Callable[[], Any], made_by: Mapping[str, str], split: str, title: str
    ) -> PairedRun:
        """As `pair`, with a baseline's caches.

        Args:
            make_cache: a fresh cache for a batch of blocks.
            made_by: what the cache is, and of which version.
            split: whose blocks.
            title: of the progress bar.
        """
        blocks = self.workspace.blocks(split)
        seed = self.workspace.experiment.seed
        depends_on = {**self.depends_on(EVERYTHING_EXACT, blocks), "cache": dict(made_by), "seed": seed}
        return self._pair(blocks, make_cache, depends_on, title)

    def key(self, spec: PlanSpec, split: str) -> str:
        """Names all that a plan's nats on a split depend on, as their cell does."""
        return cell_name(f"nats-{split}", self.depends_on(spec, self.workspace.blocks(split)))

    def nats_path(self, spec: PlanSpec, split: str = "selection") -> Path:
        """The cell of `nats(spec, split)` in the workspace's folder, whether it is there or not."""
        assert isinstance(self.workspace.cells, StoredCells)
        return self.workspace.cells.path(f"nats-{split}", self.depends_on(spec, self.workspace.blocks(split)))

    def _pair(self, blocks: Blocks, make_cache: Callable[[], Any], depends_on: dict[str, Any], title: str) -> PairedRun:
        model = self.workspace.loaded.model

        def compute() -> dict[str, Any]:
            with self.workspace.progress.stage(title, len(blocks)) as step:
                run = measure_pair(model, blocks, self.protocol, self._base_pass, make_cache, step, self._prefixes)
                return run.cell()

        return PairedRun.from_cell(self.workspace.cells.get_or_compute(f"pair-{blocks.split}", depends_on, compute))

    def _blocks(self, split: str, block_ids: Sequence[int] | None) -> Blocks:
        blocks = self.workspace.blocks(split)
        return blocks if block_ids is None else blocks.take(block_ids)

    def depends_on(self, spec: PlanSpec, blocks: Blocks) -> dict[str, Any]:
        """All that what is measured of a plan on some blocks depends on."""
        sites = spec.sites(self.workspace.n_layers)
        fed, kept = KEYED["prefix" if self.protocol.kind == "prefix" else "other"]
        asked = {name: getattr(self.protocol, name) for name in (fed if not sites else fed + kept)}
        return {
            "revision": MEASURING_REVISION,
            "model": self.workspace.model_key,
            "blocks": blocks.hash,
            "protocol": asked,
            "codecs": {f"{site.layer}.{site.part}": self.codecs.key(spec, site) for site in sites},
        }
