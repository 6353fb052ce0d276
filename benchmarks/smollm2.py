"""What the benchmarks on SmolLM2-135M share: the model, its text, and a folder."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from leankv.cache.bundle import Bundle
from leankv.cache.plan import PlanSpec
from leankv.config.loading import load_experiment
from leankv.models.loading import describe
from leankv.progress import Progress
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.workspace import Workspace

GENERATING: dict[str, Any] = {
    "data__calibration_blocks": 8,
    "data__block_length": 1024,
    "codec__key_space": "pre-rope",
    "fit__error_metric": "gradient",
    "fit__epochs": 1,
    "protocol__kind": "stream",
    "protocol__sinks": 4,
    "protocol__window": 128,
}
"""Of caches as one generates with them."""

CHUNK = 512  # tokens that a context is computed by


def prepared(folder: Path, **changes: Any) -> PlanEvaluator:
    """SmolLM2-135M in a folder, without sinks unless `changes` say so; WikiText-2 from the folder on the command line,
    else gensim's Wikipedia sample.
    """
    data = {"data.dataset": "wikitext-2", "data.data_dir": sys.argv[1]} if len(sys.argv) > 1 else {}
    dataset = data or {"data.dataset": "wikipedia-sample"}
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    experiment = load_experiment(None, {**dataset, "output_dir": str(folder), "protocol.sinks": 0, **settings})
    return PlanEvaluator(Workspace.open(experiment, Progress()))


def bundle_of(evaluator: PlanEvaluator, spec: str) -> Bundle:
    """A bundle of one recipe at every site, with the sinks and the window that costs are measured with."""
    workspace, protocol = evaluator.workspace, evaluator.protocol
    plan, loaded = evaluator.codecs.plan(PlanSpec.uniform(spec)), workspace.loaded
    made_for = describe(loaded)
    return Bundle(plan, protocol.sinks, protocol.window, workspace.rotation, loaded.model.config, made_for, {}, {})


@torch.no_grad()
def stock_cache(model: Any, tokens: torch.Tensor) -> DynamicCache:
    """The stock cache of a context."""
    cache = DynamicCache(config=model.config)
    for piece in tokens.split(CHUNK, dim=1):
        model.base_model(input_ids=piece, past_key_values=cache)
    return cache
