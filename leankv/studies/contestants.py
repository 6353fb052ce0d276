"""Caches that are asked the same, side by side: the base model's, a bundle's, and those of others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from leankv.cache.bundle import Bundle
from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan
from leankv.config.experiment import ProtocolConfig
from leankv.evaluation.baselines import Baseline
from leankv.models.loading import LoadedModel
from leankv.report.task_scores import BASE


@dataclass(frozen=True)
class Contestant:
    """A cache that answers.

    Attributes:
        name: how tables call it.
        make: gives a fresh cache that answers.
        key: all that it is.
        make_counted: gives a fresh cache whose bytes are counted; of ours another than the one that answers.
        plan: what it holds as codes; None for baselines.
    """

    name: str
    make: Callable[[], Any]
    key: Mapping[str, Any]
    make_counted: Callable[[], Any]
    plan: Plan | None = None


def stock(loaded: LoadedModel) -> Contestant:
    """The base model's own cache."""

    def make() -> LeanCache:
        return LeanCache(loaded.model.config, {}, sinks=0, window=0)

    return Contestant(BASE, make, {"cache": "stock"}, make)


def of_bundle(folder: Path, bundle: Bundle, protocol: ProtocolConfig) -> Contestant:
    """A bundle's cache, with the protocol's sinks and window."""

    def make(decode_once: bool) -> LeanCache:
        return bundle.new_cache(None, protocol.sinks, protocol.window, decode_once, encode_every=1)

    key = {"codecs": bundle.checksum, "sinks": protocol.sinks, "window": protocol.window}
    # One that decodes once gives the same numbers as the one that saves memory, sooner.
    return Contestant(name_of(folder), partial(make, True), key, partial(make, False), bundle.plan)


def name_of(folder: Path) -> str:
    """`demo-plan` for results/demo-plan/bundle."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name == "bundle" else folder.name
    return f"{name}, bundle" if name == BASE else name


def of_baseline(baseline: Baseline, loaded: LoadedModel, seed: int) -> Contestant:
    """A cache that someone else wrote."""

    def make() -> Any:
        torch.manual_seed(seed)  # for caches that draw a rotation or a sketch
        return baseline.make(loaded.model.config)

    key = {"baseline": baseline.spec, "maker": baseline.maker, "seed": seed}
    return Contestant(baseline.spec, make, key, make)
