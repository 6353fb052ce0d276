"""Perplexity of a model, and of a bundle beside it, on any split: what `leankv eval-ppl` prints."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from leankv.cache import LeanCache
from leankv.data import TextSource
from leankv.experiment import Experiment
from leankv.model import load_model
from leankv.perplexity import compare, measure_nats
from leankv.progress import Progress


def evaluate(
    experiment: Experiment, bundle: Path | None, split: str, n_blocks: int, progress: Progress
) -> dict[str, Any]:
    """Measure the base model and, where a bundle is given, the model with its cache, on the same blocks.

    Args:
        experiment: model, data and protocol, sinks and window included.
        bundle: folder of a bundle; None measures the base alone.
        split: a split, or `all` for the text from its beginning.
        n_blocks: how many blocks.
        progress: shows both passes.

    Returns:
        `base_ppl, ppl, delta_ppl, delta_percent, interval, tokens, protocol, split` and what else names the figures;
        `ppl` and the differences are None without a bundle.

    Raises:
        UserError: see the rooms that own model, data and bundle.
    """
    source = TextSource(experiment.data)
    progress.say(f"loading {experiment.model.name}")
    loaded = load_model(experiment.model)
    blocks = source.blocks(split, loaded.tokenizer, n_blocks, experiment.data.block_length)
    protocol, model = experiment.protocol, loaded.model
    # Before the first long pass, so that a bad bundle is refused at once.
    kept = {"sinks": protocol.sinks, "window": protocol.window}
    first_cache = LeanCache.from_pretrained(bundle, model, **kept) if bundle is not None else None
    with progress.stage("base perplexity", len(blocks)) as step:
        base = measure_nats(model, blocks, protocol, lambda: LeanCache(model.config, {}), step)
    result: dict[str, Any] = {
        "model": loaded.name,
        "bundle": None if bundle is None else str(bundle),
        "dataset": blocks.source,
        "split": split,
        "protocol": protocol.kind,
        "block_length": blocks.tokens.shape[1],
        "blocks": len(blocks),
        "tokens": base.tokens * len(base.nats),
        "base_ppl": base.perplexity,
        "ppl": None,
        "delta_ppl": None,
        "delta_percent": None,
        "interval": None,
    }
    if first_cache is not None:
        result.update(kept)
        with progress.stage("perplexity with the bundle", len(blocks)) as step:
            compressed = measure_nats(model, blocks, protocol, first_cache.fresh, step)
        result.update(asdict(compare(base, compressed)))
    return result
