"""Spectra: the variances of the principal components of each layer's keys and values."""

from collections.abc import Iterable
from typing import Any

import torch

from leankv.cache.plan import Site
from leankv.calibration.capture import CAPTURE_REVISION
from leankv.codecs.coding.principal_components import covariance_of
from leankv.codecs.statistics import mean_of
from leankv.config.plan_table import PARTS
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.workspace import Workspace


def spectra(evaluator: PlanEvaluator, layers: Iterable[int]) -> dict[Site, list[float]]:
    """Site -> variances `[W]`, falling, of the held-out calibration vectors that codecs' errors are told on.

    They are a sample's: of N vectors of width W the smaller variances come out too small, so that a bound computed from
    them is too low, at high rates by about `2.2 W / N` decibels.
    """
    workspace, activations_of, fitting = evaluator.workspace, evaluator.codecs.activations, evaluator.codecs.fitting
    sites = [Site(layer, part) for layer in sorted(layers) for part in PARTS]
    missing = {site.layer for site in sites if not workspace.cells.has("spectrum", _depends_on(workspace, site))}
    if missing:
        with activations_of.lock():
            for group, activations in activations_of.in_groups(sorted(missing)):
                with workspace.progress.stage(f"spectra of {len(group)} layers", len(group)) as step:
                    for layer in group:
                        for part in PARTS:
                            x = fitting.read(activations, Site(layer, part))
                            heldout = x[fitting.first_heldout(activations.manifest) :]
                            _stored(workspace, Site(layer, part), heldout)
                        step()
    return {site: _stored(workspace, site) for site in sites}


def _stored(workspace: Workspace, site: Site, x: torch.Tensor | None = None) -> list[float]:
    """One spectrum from its cell; from vectors `[N, W]` where it is not there yet."""

    def compute() -> dict[str, Any]:
        assert x is not None
        return {"variances": variances_of(x)}

    depends_on = _depends_on(workspace, site)
    variances: list[float] = workspace.cells.get_or_compute("spectrum", depends_on, compute)["variances"]
    return variances


def variances_of(x: torch.Tensor) -> list[float]:
    """Variances of the principal components of vectors `[N, W]`, falling; their sum is the total variance."""
    return torch.linalg.eigvalsh(covariance_of(x, mean_of(x))).flip(0).clamp_min(0).tolist()


def _depends_on(workspace: Workspace, site: Site) -> dict[str, Any]:
    protocol = workspace.experiment.protocol
    return {
        "revision": CAPTURE_REVISION,
        "model": workspace.model_key,
        "calibration": workspace.blocks("calibration").hash,
        "batch_size": protocol.batch_size,
        "key_space": workspace.key_space,
        "sinks": protocol.sinks,
        "heldout_fraction": workspace.experiment.fit.heldout_fraction,
        "layer": site.layer,
        "part": site.part,
    }
