"""The fitted codecs of a workspace's plans, each looked up by the hash of all it depends on before it is fitted."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from leankv.cache.codec_files import load_codec, save_codec
from leankv.cache.plan import Plan, PlanSpec, Site
from leankv.calibration.fit import FITTING_REVISION, FittedCodec, Fitting, fit_codecs
from leankv.calibration.fit_in_context import SiteInContext, fit_in_context
from leankv.calibration.fit_ladder import fit_ladders
from leankv.codecs import Codec, Recipe
from leankv.storage.files import hash_of
from leankv.studies.activation_store import ActivationStore
from leankv.studies.metric_store import MetricStore
from leankv.studies.workspace import Workspace

Keeper = Callable[[Site, FittedCodec], None]


@dataclass(frozen=True)
class StoredCodec:
    """A fitted codec as the store holds it.

    Attributes:
        codec: on the CPU; caches elsewhere read copies (`leankv.cache.on_device`).
        key: hash of all that it depends on.
        fvu: fraction of variance unexplained on held-out calibration text.
        seconds: what fitting it took.
        error: mean of `e^T M e` over held-out vectors; None in files of an earlier version.
    """

    codec: Codec
    key: str
    fvu: float
    seconds: float
    error: float | None = None


class CodecStore:
    """Fits the codecs of plans, and keeps them: in the workspace's folder, or in memory where it has none.

    A codec that takes its vectors alone depends on its recipe and site only, so plans share it. One that predicts from
    earlier layers was fitted to what the codecs there leave, so its key holds theirs.

    Args:
        workspace: model, text and folder.
        activations: of its calibration text.
        reference: given, codecs that predict are fitted to what this plan leaves of their context, whatever plan they
            stand in; so plans share them too (`leankv.calibration.fit_ladder`).
    """

    def __init__(self, workspace: Workspace, activations: ActivationStore, reference: PlanSpec | None = None):
        self.workspace = workspace
        self.activations = activations
        self.reference = reference
        self._at_hand: dict[str, StoredCodec] = {}
        self._keys: dict[tuple[PlanSpec, Site], str] = {}
        self.metrics = MetricStore(workspace)

    # -- asking -------------------------------------------------------------------------------------------------------

    def plan(self, spec: PlanSpec) -> Plan:
        """The fitted plan; what is not fitted yet is fitted now."""
        return {site: stored.codec for site, stored in self.codecs(spec).items()}

    def codecs(self, spec: PlanSpec) -> dict[Site, StoredCodec]:
        """The codecs of a plan's sites, in order; what is not fitted yet is fitted now."""
        self.fit([spec])
        return {site: self._at_hand[self.key(spec, site)] for site in spec.sites(self.workspace.n_layers)}

    def fit(self, specs: Iterable[PlanSpec]) -> None:
        """See that the codecs of all these plans are fitted; the calibration text is run through the model once."""
        specs = list(specs)
        missing = [self._missing(spec) for spec in specs]
        if any(missing):
            with self.activations.lock():
                if any(recipe.n_context_layers for own in missing for recipe in own.values()):
                    # At once for all: this plan's context, and what the plans to come will predict from.
                    asked = {site.layer for spec in specs for site in self._closure(spec)}
                    layers = sorted({*asked, *self.workspace.layers})
                    self.activations.of(layers)
                    self.metrics.of(layers)
                # Another worker with the same shard may have fitted some while this one waited.
                if self.reference is None:
                    self._fit_alone(specs)
                    self._fit_in_context(specs)
                else:
                    self._fit_ladders(specs, self.reference)

    def forget(self, all_but: Iterable[PlanSpec] = ()) -> None:
        """Give back the memory of the codecs at hand, where there are files to read them from again.

        Args:
            all_but: plans whose codecs stay.
        """
        if self.workspace.folder is not None:
            stay = {self.key(spec, site) for spec in all_but for site in spec.sites(self.workspace.n_layers)}
            for key in set(self._at_hand) - stay:  # in place: stores of other references hold the same ones
                del self._at_hand[key]

    def with_reference(self, reference: PlanSpec) -> "CodecStore":
        """The same codecs, but that those which predict are fitted to what `reference` leaves of their context."""
        other = CodecStore(self.workspace, self.activations, reference)
        other._at_hand, other.metrics = self._at_hand, self.metrics
        return other

    def key(self, spec: PlanSpec, site: Site) -> str:
        """Hash of all that the codec of a site depends on in a plan."""
        # Remembered, as the key of a late layer holds those of the layers before, and theirs again.
        if (spec, site) not in self._keys:
            self._keys[spec, site] = hash_of(self._depends_on(spec, site))
        return self._keys[spec, site]

    def _depends_on(self, spec: PlanSpec, site: Site) -> dict[str, Any]:
        recipe = spec[site]
        assert recipe is not None, "an exact site has no codec"
        depends_on = {
            **self._all_depend_on,
            "problem": site,
            "spec": recipe.text,
            "revisions": recipe.revisions(),
        }
        if context := self.workspace.context_of(site, recipe):
            left_by = self.reference or spec
            depends_on["context"] = [
                "exact" if left_by[source] is None else self.key(left_by, source) for source in context
            ]
        return depends_on

    def path(self, spec: PlanSpec, site: Site) -> Path:
        """The file of a codec, whether it is fitted or not."""
        assert self.workspace.folder is not None
        name = f"layer-{site.layer:03d}-{site.part}-{self.key(spec, site)[:16]}.safetensors"
        return self.workspace.folder / "codecs" / name

    @cached_property
    def _all_depend_on(self) -> dict[str, Any]:
        """What all codecs of the workspace depend on."""
        workspace = self.workspace
        experiment = workspace.experiment
        return {
            "revision": FITTING_REVISION,
            "model": workspace.model_key,
            "calibration": workspace.blocks("calibration").hash,
            "batch_size": experiment.protocol.batch_size,
            "codec_dtype": experiment.codec.dtype,
            "key_space": workspace.key_space,
            # Under the name that it had in version 0.1, so that results of that version are found.
            "fit": {"weighting" if name == "error_metric" else name: v for name, v in asdict(experiment.fit).items()},
            "sinks": experiment.protocol.sinks,
            "seed": experiment.seed,
        }

    # -- fitting ------------------------------------------------------------------------------------------------------

    @property
    def fitting(self) -> Fitting:
        """How codecs are fitted here."""
        experiment = self.workspace.experiment
        return Fitting(
            experiment.fit,
            getattr(torch, experiment.codec.dtype),
            experiment.seed,
            experiment.protocol.sinks,
            self.workspace.loaded.model.device,
            self.workspace.memory_bytes,
        )

    def _missing(self, spec: PlanSpec) -> dict[Site, Recipe]:
        """The sites of a plan whose codecs are not fitted; those that are fitted are then at hand."""
        sites = spec.sites(self.workspace.n_layers)
        return {site: recipe for site, recipe in sites.items() if not self._find(spec, site)}

    def _find(self, spec: PlanSpec, site: Site) -> bool:
        key = self.key(spec, site)
        if key not in self._at_hand and self.workspace.folder is not None and self.path(spec, site).exists():
            self._at_hand[key] = read_codec(self.path(spec, site))
        # A search sets errors beside each other; what an earlier version fitted does not say its own.
        return key in self._at_hand and (self.reference is None or self._at_hand[key].error is not None)

    def _fit_alone(self, specs: Iterable[PlanSpec]) -> None:
        """Fit what takes its vectors alone, in groups of layers where the disk does not hold the activations of all."""
        for recipes in _distinct(self._missing(spec) for spec in specs):
            spec = PlanSpec().with_sites(recipes)
            for group, activations in self.activations.in_groups(sorted({site.layer for site in recipes})):
                wanted = {site: recipe for site, recipe in recipes.items() if site.layer in group}
                fit_codecs(
                    activations,
                    wanted,
                    self.fitting,
                    self.metrics.of(group),
                    self._keeper(spec),
                    self.workspace.progress,
                )

    def _fit_in_context(self, specs: list[PlanSpec]) -> None:
        """Fit what predicts from earlier layers, plan by plan: its context is what the plan leaves of those."""
        missing = {self.key(spec, site): recipe for spec in specs for site, recipe in self._missing(spec).items()}
        if not missing:
            return
        layers = sorted({site.layer for spec in specs for site in self._closure(spec)})
        activations, metrics = self.activations.of(layers), self.metrics.of(layers)
        recipes = sorted({recipe.text for recipe in missing.values()})
        names = recipes[0] if len(recipes) == 1 else f"{len(recipes)} recipes"
        with self.workspace.progress.stage(f"fitting {names} layer by layer", len(missing)) as step:
            for spec in specs:
                keep = self._keeper(spec)

                def on_fitted(site: Site, fitted: FittedCodec, keep: Keeper = keep) -> None:
                    keep(site, fitted)
                    step()

                sites = {site: self._in_context(spec, site) for site in sorted(self._closure(spec))}
                if sites:  # else an earlier plan of these had the same
                    fit_in_context(activations, sites, self.fitting, metrics, on_fitted)

    def _fit_ladders(self, specs: list[PlanSpec], reference: PlanSpec) -> None:
        """Fit all recipes of a site at once; the context of those that predict is what the reference leaves."""
        missing = [rung for spec in specs for rung in self._missing(spec).items()]
        if not missing:
            return
        waiting = [source for site, recipe in missing for source in self.workspace.context_of(site, recipe)]
        sources: set[Site] = set()
        while waiting:  # what is predicted from may itself be predicted
            site = waiting.pop()
            if site not in sources:
                sources.add(site)
                recipe = reference[site]
                waiting += self.workspace.context_of(site, recipe) if recipe is not None else []
        self._find_all(reference, sources)
        sites = {site: self._in_context(reference, site) for site in sorted({*sources, *(site for site, _ in missing)})}
        unfitted = [(site, sites[site].recipe) for site in sources if reference[site] and sites[site].codec is None]
        ladders: dict[Site, list[SiteInContext]] = {}
        for site, recipe in dict.fromkeys([*unfitted, *missing]):
            assert recipe is not None
            ladders.setdefault(site, []).append(SiteInContext(recipe, None, self.workspace.context_of(site, recipe)))
        layers = sorted({site.layer for site in sites})
        # What predicts asks for all layers at once.
        groups = [(layers, self.activations.of(layers))] if sources else self.activations.in_groups(layers)
        with self.workspace.progress.stage("fitting ladders layer by layer", sum(map(len, ladders.values()))) as step:

            def on_fitted(site: Site, recipe: Recipe, fitted: FittedCodec) -> None:
                self._keeper(PlanSpec().with_sites({site: recipe}))(site, fitted)
                step()

            for group, activations in groups:
                own = {site: context for site, context in sites.items() if site.layer in group}
                fit_ladders(activations, ladders, own, self.fitting, self.metrics.of(group), on_fitted)

    def _find_all(self, spec: PlanSpec, sites: Iterable[Site]) -> None:
        """Read the codecs of these sites that are in files."""
        for site in sites:
            if spec[site] is not None:
                self._find(spec, site)

    def _in_context(self, spec: PlanSpec, site: Site) -> SiteInContext:
        recipe = spec[site]
        if recipe is None:
            return SiteInContext(None, None, [])
        stored = self._at_hand.get(self.key(spec, site))
        return SiteInContext(recipe, stored.codec if stored else None, self.workspace.context_of(site, recipe))

    def _closure(self, spec: PlanSpec) -> set[Site]:
        """The sites to fit, and all whose vectors they predict from, directly or through others."""
        found: set[Site] = set()
        waiting = list(self._missing(spec))
        while waiting:
            site = waiting.pop()
            if site not in found:
                found.add(site)
                recipe = spec[site]
                waiting += self.workspace.context_of(site, recipe) if recipe is not None else []
        return found

    def _keeper(self, spec: PlanSpec) -> Keeper:
        """Keeps a codec of a plan as soon as it is fitted."""

        def keep(site: Site, fitted: FittedCodec) -> None:
            key = self.key(spec, site)
            if self.workspace.folder is None:
                self._at_hand[key] = StoredCodec(fitted.codec, key, fitted.fvu, fitted.seconds, fitted.error)
                return
            about = {
                "key": key,
                "fvu": json.dumps(fitted.fvu),
                "fvu_by_epoch": json.dumps(fitted.fvu_by_epoch),
                "seconds": json.dumps(fitted.seconds),
                "error": json.dumps(fitted.error),
            }
            # Workers with differently cut shards may fit the same one; the bits agree.
            if not self._find(spec, site):
                save_codec(self.path(spec, site), fitted.codec, about)
                self._at_hand[key] = read_codec(self.path(spec, site))

        return keep


def _distinct(missing: Iterable[Mapping[Site, Recipe]]) -> list[dict[Site, Recipe]]:
    """Recipes that take their vectors alone, gathered from several plans into as few tables as hold one a site."""
    tables: list[dict[Site, Recipe]] = []
    for recipes in missing:
        for site, recipe in recipes.items():
            if recipe.n_context_layers or any(table.get(site) == recipe for table in tables):
                continue
            free = next((table for table in tables if site not in table), None)
            if free is None:
                tables.append(free := {})
            free[site] = recipe
    return tables


def read_codec(path: Path) -> StoredCodec:
    """A fitted codec from its file.

    Raises:
        UserError: the file is damaged.
    """
    codec, about = load_codec(path)
    fvu, seconds = float(json.loads(about["fvu"])), float(json.loads(about["seconds"]))
    return StoredCodec(codec, about["key"], fvu, seconds, json.loads(about.get("error", "null")))
