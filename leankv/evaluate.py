"""A model, and a bundle beside it, on any split: what `leankv eval-ppl` prints."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from leankv.base_pass import BasePass
from leankv.cache import LeanCache
from leankv.data import TextSource
from leankv.divergence import divergence_columns
from leankv.divergence_table import DIVERGENCE_COLUMNS
from leankv.errors import UserError
from leankv.experiment import Experiment
from leankv.free_run import free_run, prompts_of
from leankv.model import load_model
from leankv.paired import measure_pair
from leankv.perplexity import compare, measure_nats
from leankv.progress import Progress


def evaluate(
    experiment: Experiment,
    bundle: Path | None,
    split: str,
    n_blocks: int,
    progress: Progress,
    new_tokens: int | None = None,
) -> dict[str, Any]:
    """Measure the base model and, where a bundle is given, the model with its cache, on the same blocks.

    Args:
        experiment: model, data and protocol, sinks and window included.
        bundle: folder of a bundle; None measures the base alone.
        split: a split, or `all` for the text from its beginning.
        n_blocks: how many blocks.
        progress: shows the passes.
        new_tokens: given, both models continue half of every block by so many tokens of their own (`leankv.free_run`).

    Returns:
        `base_ppl, ppl, delta_ppl, delta_percent, interval, tokens, protocol, split`, those of `DIVERGENCE_COLUMNS`,
        `free_run` (the attributes of `FreeRun`, or None) and what else names the figures; without a bundle, `ppl`, the
        differences and divergences are None.

    Raises:
        UserError: free running is asked for without a bundle, or beyond the model's positions; or see the modules that
            own model, data and bundle.
    """
    if new_tokens is not None and bundle is None:
        raise UserError("--free-run compares a bundle's cache with the base model; give --bundle, or leave it out")
    source = TextSource(experiment.data)
    progress.say(f"loading {experiment.model.name}")
    loaded = load_model(experiment.model)
    blocks = source.blocks(split, loaded.tokenizer, n_blocks, experiment.data.block_length)
    protocol, model = experiment.protocol, loaded.model
    # Before the first long pass, so that a bad bundle is refused at once.
    kept = {"sinks": protocol.sinks, "window": protocol.window}
    first_cache = LeanCache.from_pretrained(bundle, model, **kept) if bundle is not None else None
    prompts = None if new_tokens is None else prompts_of(model, blocks, new_tokens)

    def make_base() -> LeanCache:
        return LeanCache(model.config, {})

    pair = None
    if first_cache is None:
        with progress.stage("base perplexity", len(blocks)) as step:
            base = measure_nats(model, blocks, protocol, make_base, step)
    else:
        with progress.stage("perplexity, base and bundle side by side", len(blocks)) as step:
            pair = measure_pair(model, blocks, protocol, BasePass(model, make_base, 0), first_cache.fresh, step)
        base = pair.base
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
        **dict.fromkeys(DIVERGENCE_COLUMNS),
        "free_run": None,
    }
    if pair is not None:
        result.update({**kept, **asdict(compare(base, pair.compressed)), **divergence_columns(pair.divergence)})
    if first_cache is not None and prompts is not None and new_tokens is not None:
        with progress.stage(f"free running, {new_tokens} tokens", len(prompts)) as step:
            ran = free_run(model, prompts, new_tokens, protocol.batch_size, make_base, first_cache.fresh, step)
        result["free_run"] = asdict(ran)
    return result
