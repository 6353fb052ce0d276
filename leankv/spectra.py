"""Spectra: the variances of the principal components of each layer's keys and values."""

from collections.abc import Iterable
from typing import Any

import torch

from leankv.codecs.base import mean_of
from leankv.codecs.components import covariance_of
from leankv.experiment import PARTS
from leankv.fit import Problem
from leankv.run import Run


def spectra(run: Run, layers: Iterable[int]) -> dict[Problem, list[float]]:
    """(layer, part) -> variances `[W]`, falling, of the held-out calibration vectors that codecs' errors are told on.

    They are a sample's: of N vectors of width W the smaller variances come out too small, so that a bound computed from
    them is too low, at high rates by about `2.2 W / N` decibels.
    """
    problems = [(layer, part) for layer in sorted(layers) for part in PARTS]
    missing = {
        layer for layer, part in problems if not run.cells.path("spectrum", _depends_on(run, layer, part)).exists()
    }
    if missing:
        with run.fit_lock():
            for group, activations in run.captures(sorted(missing)):
                with run.progress.stage(f"spectra of {len(group)} layers", len(group)) as step:
                    for layer in group:
                        for part in PARTS:
                            x = run.fitting.read(activations, (layer, part))
                            heldout = x[run.fitting.first_heldout(activations.manifest) :]
                            _stored(run, layer, part, heldout)
                        step()
    return {problem: _stored(run, *problem) for problem in problems}


def _stored(run: Run, layer: int, part: str, x: torch.Tensor | None = None) -> list[float]:
    """One spectrum from its cell; from vectors `[N, W]` where it is not there yet."""

    def compute() -> dict[str, Any]:
        assert x is not None
        return {"variances": variances_of(x)}

    variances: list[float] = run.cells.get_or_compute("spectrum", _depends_on(run, layer, part), compute)["variances"]
    return variances


def variances_of(x: torch.Tensor) -> list[float]:
    """Variances of the principal components of vectors `[N, W]`, falling; their sum is the total variance."""
    return torch.linalg.eigvalsh(covariance_of(x, mean_of(x))).flip(0).clamp_min(0).tolist()


def _depends_on(run: Run, layer: int, part: str) -> dict[str, Any]:
    protocol = run.experiment.protocol
    return {
        "model": run.model_key,
        "calibration": run.blocks("calibration").hash,
        "batch_size": protocol.batch_size,
        "key_space": run.key_space,
        "sinks": protocol.sinks,
        "heldout_fraction": run.experiment.fit.heldout_fraction,
        "layer": layer,
        "part": part,
    }
