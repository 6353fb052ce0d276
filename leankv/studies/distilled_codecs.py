"""The codecs of plans, trained together (`leankv.calibration.distillation`), and kept as all codecs are."""

from collections.abc import Iterable
from typing import Any

import torch

from leankv.cache.plan import Plan, PlanSpec, Site
from leankv.calibration.distillation import DISTILLING_REVISION, LENGTH, PASSES, Distillation, Distilled
from leankv.calibration.fit import FittedCodec
from leankv.calibration.fit_in_context import SiteInContext, fit_in_context
from leankv.studies.codec_store import CodecStore

CHECKED_BLOCKS = 4  # assumption: of selection text, spread over it; what training gains shows on few, being paired


class DistilledCodecs(CodecStore):
    """Trains the codecs of each plan that is asked for, all of them together, and keeps them.

    The codecs begin as another store fits them. All of them depend on the whole plan.

    Args:
        undistilled: that store.
    """

    def __init__(self, undistilled: CodecStore):
        super().__init__(undistilled.workspace, undistilled.activations)
        self._undistilled = undistilled
        self.metrics = undistilled.metrics

    def fit(self, specs: Iterable[PlanSpec]) -> None:
        """See that the codecs of all these plans are trained."""
        for spec in specs:
            if self._missing(spec):
                begin = self._undistilled.plan(spec)
                with self.activations.lock():
                    if self._missing(spec):  # another worker may have trained them while this one waited
                        self._settle(spec, self._train(spec, begin))

    def _depends_on(self, spec: PlanSpec, site: Site) -> dict[str, Any]:
        workspace = self.workspace
        return {
            "revision": DISTILLING_REVISION,
            "problem": site,
            "codecs": [self._undistilled.key(spec, each) for each in spec.sites(workspace.n_layers)],
            "selection": workspace.blocks("selection").hash,
        }

    def _train(self, spec: PlanSpec, begin: Plan) -> Distilled:
        workspace, fitting, context = self.workspace, self.fitting, self._contexts(spec)
        model, sinks = workspace.loaded.model, workspace.experiment.protocol.sinks
        training = Distillation(model, begin, context, sinks, workspace.rotation)
        calibration, selection = (workspace.blocks(split).tokens for split in ("calibration", "selection"))
        texts = _rows(calibration[: len(calibration) - fitting.heldout_blocks(len(calibration))])
        checked = _rows(selection)
        checked = checked[:: max(1, len(checked) // CHECKED_BLOCKS)][:CHECKED_BLOCKS]
        with workspace.progress.stage("training all codecs together", PASSES * len(texts)) as step:
            found = training.train(texts, checked, workspace.experiment.seed, step)
        workspace.progress.say(
            f"distilled in {found.steps} steps: {found.before.divergence:.4f} -> {found.after.divergence:.4f} nats at "
            f"{found.before.bits:.0f} -> {found.after.bits:.0f} bits a token (selection text, all tokens coded)"
        )
        return found

    def _settle(self, spec: PlanSpec, found: Distilled) -> None:
        """Fit ranges and probabilities to what the trained codecs make of calibration text, and keep the codecs."""
        workspace, context = self.workspace, self._contexts(spec)
        recipes = spec.sites(workspace.n_layers)
        sites = {
            site: SiteInContext(recipes.get(site), None, context.get(site, []), found.codecs[site].settled)
            if site in recipes
            else SiteInContext(None, None, [])
            for site in sorted({*recipes, *(source for sources in context.values() for source in sources)})
        }
        layers = sorted({site.layer for site in sites})
        activations, metrics = self.activations.of(layers), self.metrics.of(layers)
        keep = self._keeper(spec)
        with workspace.progress.stage("ranges of trained codecs", len(recipes)) as step, torch.no_grad():

            def on_fitted(site: Site, fitted: FittedCodec) -> None:
                keep(site, fitted)
                step()

            fit_in_context(activations, sites, self.fitting, metrics, on_fitted)

    def _contexts(self, spec: PlanSpec) -> dict[Site, list[Site]]:
        """What each site of a plan predicts from."""
        workspace = self.workspace
        return {site: workspace.context_of(site, recipe) for site, recipe in spec.sites(workspace.n_layers).items()}


def _rows(tokens: torch.Tensor) -> torch.Tensor:
    """Blocks `[n, T]` cut into rows of `LENGTH` tokens, or left whole where they are shorter."""
    length = min(LENGTH, tokens.shape[1])
    return tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
