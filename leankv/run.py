"""One run: fits an experiment's codecs and measures its plans.

Whatever is measured or fitted here is looked up first, by the hash of all it depends on, and stored as soon as it is
known. So any command may be stopped and called again.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from leankv.base_pass import BasePass
from leankv.cache import LeanCache, earlier_layers
from leankv.codec_files import load_codec, save_codec
from leankv.codecs import Codec, CodecSpec, parse_spec
from leankv.data import Blocks
from leankv.errors import UserError
from leankv.experiment import PARTS, Experiment
from leankv.fit import FITTING_REVISION, FittedCodec, Fitting, Problem, fit_chain, fit_codecs
from leankv.output_folder import claim_folder
from leankv.paired import PairedRun, measure_pair, pair_from
from leankv.perplexity import MEASURING_REVISION, BlockNats, measure_nats
from leankv.progress import Progress
from leankv.replay import Replay
from leankv.shards import Shard
from leankv.store import hash_of
from leankv.weighting import Metrics, weigh
from leankv.workplace import Workplace


@dataclass(frozen=True)
class StoredCodec:
    """A fitted codec as found in its file.

    Attributes:
        codec: on the CPU until a cache uses it.
        key: hash of all that it depends on.
        fvu: fraction of variance unexplained on held-out calibration text.
        seconds: what fitting it took.
    """

    codec: Codec
    key: str
    fvu: float
    seconds: float


class Run(Workplace):
    """An experiment under way in its output folder: codecs are fitted, plans are measured.

    Raises:
        UserError: as `Workplace`; or a codec is not understood, or does not suit the model.
    """

    def __init__(self, experiment: Experiment, progress: Progress, shard: Shard | None = None):
        self.specs = _specs_of(experiment)
        super().__init__(experiment, progress, shard)
        self._check_specs()
        self._stored: dict[Problem, StoredCodec] = {}
        self._weighed: dict[tuple[int, ...], Metrics] = {}
        claim_folder(experiment)  # now only: a model that is mistyped must not stand in the way of the right one

    def with_codecs(self, k: str, v: str) -> "Run":
        """The same run with other codecs: model, text, captures, metrics and recorded hidden states are shared.

        Raises:
            UserError: a spec is not understood, or does not suit the model.
        """
        other = copy.copy(self)
        # Made now, so that what one of the two records serves both.
        other._selection_replay, other._base_pass = self._selection_replay, self._base_pass
        other.experiment = replace(self.experiment, codec=replace(self.experiment.codec, k=k, v=v))
        other.specs = _specs_of(other.experiment)
        other._stored = {}
        other._check_specs()
        return other

    def with_window(self, window: int) -> "Run":
        """The same run with another exact window: the same codecs, which depend on none.

        Raises:
            UserError: a strict pass has no exact window.
        """
        other = copy.copy(self)
        protocol = replace(self.experiment.protocol, window=window)
        other.experiment = replace(self.experiment, protocol=protocol)
        other.__dict__.pop("_selection_replay", None)  # it was recorded under the other window
        other._base_pass = self._base_pass  # which has no window
        return other

    def _check_specs(self) -> None:
        for layer in self.loaded.geometry.layers:
            for spec in self.specs.values():
                spec.check_width(layer.width)
        if self.looks_back and len({layer.width for layer in self.loaded.geometry.layers}) > 1:
            raise UserError("share predicts between layers of one width, and this model's differ; use other codecs")
        if self.looks_back >= len(self.loaded.geometry.layers):
            raise UserError(
                f"share:-{self.looks_back} looks outside of a model of {len(self.loaded.geometry.layers)} layers"
            )

    @cached_property
    def _selection_replay(self) -> Replay:
        """Selection blocks are measured under many plans, so each is run from its first changed layer on only."""
        blocks, protocol = self.blocks("selection"), self.experiment.protocol
        memory = round(self.experiment.memory_budget * 1e9)
        return Replay(self.loaded.model, blocks, protocol, memory, self.folder, self.rotation)

    @cached_property
    def _base_pass(self) -> BasePass:
        """Many plans are set beside the base model on the same blocks, so its layers run once for each block."""
        model = self.loaded.model
        memory = round(self.experiment.memory_budget * 1e9)
        return BasePass(model, lambda: LeanCache(model.config, {}), memory)

    # -- codecs ---------------------------------------------------------------------------------------------------

    def fitted(self, layers: Iterable[int]) -> dict[Problem, StoredCodec]:
        """The codecs of these layers, fitted now where they are not yet."""
        wanted = layers = sorted(layers)
        if self.looks_back and layers:
            layers = list(range(max(layers) + 1))  # codecs of the layers before are what theirs are fitted beside
        problems = {(layer, part): spec for layer in layers for part, spec in self.specs.items()}
        if any(not self._load_codec(problem) for problem in problems):
            with self.fit_lock():
                # Another worker with the same shard may have fitted some while this one waited.
                missing = {problem: spec for problem, spec in problems.items() if not self._load_codec(problem)}
                if missing:
                    self._fit(missing)
        return {(layer, part): self._stored[layer, part] for layer in wanted for part in self.specs}

    @cached_property
    def _codecs_depend_on(self) -> dict[str, Any]:
        """What all codecs of this run depend on."""
        experiment = self.experiment
        return {
            "revision": FITTING_REVISION,
            "model": self.model_key,
            "calibration": self.blocks("calibration").hash,
            "batch_size": experiment.protocol.batch_size,
            "codec_dtype": experiment.codec.dtype,
            "key_space": self.key_space,
            "fit": asdict(experiment.fit),
            "sinks": experiment.protocol.sinks,
            "seed": experiment.seed,
        }

    def _codec_key(self, problem: Problem) -> str:
        spec = self.specs[problem[1]]
        depends_on = {**self._codecs_depend_on, "problem": problem, "spec": spec.text, "revisions": spec.revisions()}
        if self.looks_back:  # then the other part's codecs matter too
            depends_on["specs"] = {part: [own.text, own.revisions()] for part, own in self.specs.items()}
        return hash_of(depends_on)

    def codec_path(self, problem: Problem) -> Path:
        """The file of a codec, whether it is fitted or not."""
        layer, part = problem
        return self.folder / "codecs" / f"layer-{layer:03d}-{part}-{self._codec_key(problem)[:16]}.safetensors"

    def _load_codec(self, problem: Problem) -> bool:
        """Whether a codec is fitted; it is then at hand."""
        if problem not in self._stored:
            path = self.codec_path(problem)
            if not path.exists():
                return False
            self._stored[problem] = read_codec(path)
        return True

    def _fit(self, problems: Mapping[Problem, CodecSpec]) -> None:
        """Capture and fit, in groups of layers where the disk does not hold the activations of all."""

        def store(problem: Problem, fitted: FittedCodec) -> None:
            about = {
                "key": self._codec_key(problem),
                "fvu": json.dumps(fitted.fvu),
                "fvu_by_epoch": json.dumps(fitted.fvu_by_epoch),
                "seconds": json.dumps(fitted.seconds),
            }
            # Workers with differently cut shards may fit the same one; the bits agree.
            if not self._load_codec(problem):
                save_codec(self.codec_path(problem), fitted.codec, about)
                self._load_codec(problem)

        layers = sorted({layer for layer, _ in problems})
        if self.looks_back:
            self._fit_chain(max(layers), self.fitting, store)
            return
        for group, activations in self.captures(layers):
            wanted = {problem: spec for problem, spec in problems.items() if problem[0] in group}
            fit_codecs(activations, wanted, self.fitting, self._metrics(group), store, self.progress)

    @property
    def fitting(self) -> Fitting:
        """How this run fits its codecs."""
        return Fitting(
            self.experiment.fit,
            getattr(torch, self.experiment.codec.dtype),
            self.experiment.seed,
            self.experiment.protocol.sinks,
            self.loaded.model.device,
            round(self.experiment.memory_budget * 1e9),
        )

    @property
    def looks_back(self) -> int:
        """How many layers before its own a codec of this run predicts from at most."""
        return max((spec.family.layers_looked_at(spec.arguments) for spec in self.specs.values()), default=0)

    def _fit_chain(self, last: int, fitting: Fitting, store: Callable[[Problem, FittedCodec], None]) -> None:
        """Capture and fit all layers up to `last`, each beside those before it."""
        windows = [layer.window for layer in self.loaded.geometry.layers]
        earlier = {layer: earlier_layers(windows, layer, self.looks_back) for layer in range(last + 1)}
        layers = list(earlier)
        activations = self.captured(layers)
        fit_chain(activations, self.specs, earlier, fitting, self._metrics(layers), store, self.progress)

    def _metrics(self, layers: list[int]) -> Metrics:
        """What the errors of these layers' vectors count by; nothing where they all count alike."""
        kind = self.experiment.fit.weighting
        if kind == "none":
            return {}
        if tuple(layers) not in self._weighed:
            blocks, sinks, seed = self.blocks("calibration"), self.experiment.protocol.sinks, self.experiment.seed
            self._weighed[tuple(layers)] = weigh(
                kind, self.loaded, blocks, layers, self.rotation, sinks, seed, self.progress
            )
        return self._weighed[tuple(layers)]

    def measure(
        self,
        split: str,
        layers: Iterable[int],
        title: str = "",
        only: Sequence[int] | None = None,
        may_grow: bool = False,
        parts: Sequence[str] = PARTS,
    ) -> BlockNats:
        """Nats of a split's blocks with these layers compressed; with none, of the base model.

        Args:
            split: `selection` or `report`.
            layers: which layers hold codes.
            title: shows a progress bar of that name when something has to be measured.
            only: numbers of the blocks to measure, in this order; all of them unless given.
            may_grow: sets that add to this one will be measured too; see `leankv.replay`.
            parts: of these layers, what holds codes; the other part is left as it is.
        """
        layers = sorted(layers)
        self.fitted(layers)
        blocks = self._taken(split, only)

        def measured(on_block: Callable[[], None]) -> BlockNats:
            if split == "selection":
                return self._selection_replay.measure(self.plan(layers, parts), on_block, only, may_grow)
            cache = self.new_cache(layers, parts)
            return measure_nats(self.loaded.model, blocks, self.experiment.protocol, cache.fresh, on_block)

        def compute() -> dict[str, Any]:
            if not title:
                return asdict(measured(lambda: None))
            with self.progress.stage(title, len(blocks)) as step:
                return asdict(measured(step))

        result = self.cells.get_or_compute(f"nats-{split}", self._nats_depend_on(blocks, layers, parts), compute)
        return nats_of(result)

    def measure_pair(
        self, split: str, layers: Iterable[int], title: str, only: Sequence[int] | None = None
    ) -> PairedRun:
        """Base model and model with these layers compressed, side by side: nats of both, and divergence.

        Args:
            split: `selection` or `report`.
            layers: which layers hold codes.
            title: of the progress bar.
            only: numbers of the blocks to measure, in this order; all of them unless given.
        """
        layers = sorted(layers)
        blocks = self._taken(split, only)
        make_cache = self.new_cache(layers).fresh
        return self._measured_pair(blocks, make_cache, self._nats_depend_on(blocks, layers), title)

    def measure_cache_pair(
        self,
        split: str,
        make_cache: Callable[[], Any],
        made_by: Mapping[str, str],
        title: str,
        only: Sequence[int] | None = None,
    ) -> PairedRun:
        """As `measure_pair`, with caches that others wrote.

        Args:
            split: `selection`, `certification` or `report`.
            make_cache: a fresh cache for a batch of blocks.
            made_by: what the cache is, and of which version.
            title: of the progress bar.
            only: numbers of the blocks to measure, in this order; all of them unless given.
        """
        blocks = self._taken(split, only)
        return self._measured_pair(blocks, make_cache, self._cache_depends_on(blocks, made_by), title)

    def _measured_pair(
        self, blocks: Blocks, make_cache: Callable[[], Any], depends_on: dict[str, Any], title: str
    ) -> PairedRun:
        model, protocol = self.loaded.model, self.experiment.protocol

        def compute() -> dict[str, Any]:
            with self.progress.stage(title, len(blocks)) as step:
                return asdict(measure_pair(model, blocks, protocol, self._base_pass, make_cache, step))

        return pair_from(self.cells.get_or_compute(f"pair-{blocks.split}", depends_on, compute))

    def _taken(self, split: str, only: Sequence[int] | None) -> Blocks:
        return self.blocks(split) if only is None else self.blocks(split).take(only)

    def nats_path(self, split: str, layers: Iterable[int]) -> Path:
        """The cell of `measure(split, layers)`, whether it is there or not."""
        return self.cells.path(f"nats-{split}", self._nats_depend_on(self.blocks(split), sorted(layers)))

    def _nats_depend_on(self, blocks: Blocks, layers: list[int], parts: Sequence[str] = PARTS) -> dict[str, Any]:
        protocol = self.experiment.protocol
        asked = asdict(protocol)
        if not layers:  # the base run depends on how tokens are fed, not on what is kept exact
            asked = {"kind": protocol.kind, "chunk": protocol.chunk, "batch_size": protocol.batch_size}
        return {
            "revision": MEASURING_REVISION,
            "model": self.model_key,
            "blocks": blocks.hash,
            "protocol": asked,
            "codecs": {
                f"{layer}.{part}": self._codec_key((layer, part))
                for layer in layers
                for part in self.specs
                if part in parts
            },
        }

    def _cache_depends_on(self, blocks: Blocks, made_by: Mapping[str, str]) -> dict[str, Any]:
        return {**self._nats_depend_on(blocks, []), "cache": dict(made_by), "seed": self.experiment.seed}

    def new_cache(self, layers: Iterable[int], parts: Sequence[str] = PARTS) -> LeanCache:
        """An empty cache with these layers and parts compressed, as this run's protocol keeps sinks and window."""
        model, protocol = self.loaded.model, self.experiment.protocol
        plan = self.plan(layers, parts)
        return LeanCache(model.config, plan, protocol.sinks, protocol.window, rotation=self.rotation)

    def plan(self, layers: Iterable[int], parts: Sequence[str] = PARTS) -> dict[int, dict[str, Codec]]:
        """layer -> part -> codec for these layers and parts, as `LeanCache` takes it."""
        plan: dict[int, dict[str, Codec]] = {}
        for (layer, part), stored in self.fitted(layers).items():
            if part in parts:
                plan.setdefault(layer, {})[part] = stored.codec
        return plan


def _specs_of(experiment: Experiment) -> dict[str, CodecSpec]:
    """part -> spec, of the parts that are compressed."""
    texts = {part: getattr(experiment.codec, part) for part in PARTS}
    return {part: parse_spec(text) for part, text in texts.items() if text != "none"}


def read_codec(path: Path) -> StoredCodec:
    """A fitted codec from its file."""
    codec, about = load_codec(path)
    return StoredCodec(codec, about["key"], json.loads(about["fvu"]), json.loads(about["seconds"]))


def nats_of(result: Mapping[str, Any]) -> BlockNats:
    """Nats as a cell holds them."""
    return BlockNats(tuple(result["nats"]), result["tokens"], result["seconds"])
