"""How far caches' predictions are from the base model's on report text, and how much of a text they write alike."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation.base_pass import BasePass
from leankv.evaluation.cache_bytes import measure_bytes
from leankv.evaluation.divergence import divergence_columns
from leankv.evaluation.free_run import free_run, prompts_of
from leankv.evaluation.paired import measure_pair
from leankv.evaluation.perplexity import MEASURING_REVISION, compare
from leankv.models.loading import LoadedModel
from leankv.models.structure import text_config
from leankv.progress import Progress
from leankv.storage.cells import StoredCells
from leankv.storage.memory_budget import MemoryBudget
from leankv.studies.contestants import Contestant
from leankv.studies.stored_bytes import COUNTING_REVISION

AGREEING_REVISION = 1
"""Raised when agreement on a text changes otherwise than by how it is measured, or bytes counted."""


def agreement_of(
    contestants: Sequence[Contestant],
    blocks: Blocks,
    new_tokens: int,
    protocol: ProtocolConfig,
    loaded: LoadedModel,
    folder: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Rows of `agreement.csv`, a cell each, of all contestants but the first, against the first.

    Args:
        contestants: the base model's cache, then the others.
        blocks: of report text.
        new_tokens: that both write from half of each block on.
        protocol: how text and prompts are fed.
        loaded: the model.
        folder: where cells are kept.
        progress: shows what takes long.
    """
    base, *others = contestants
    model, cells = loaded.model, StoredCells(folder / "cells")
    states = blocks.tokens.numel() * text_config(model.config).hidden_size * 4
    base_pass = BasePass(model, base.make, MemoryBudget(states))
    prompts = prompts_of(model, blocks, new_tokens)

    def measured(one: Contestant) -> dict[str, Any]:
        with progress.stage(f"{one.name}: predictions on report text", len(blocks)) as step:
            pair = measure_pair(model, blocks, protocol, base_pass, one.make, step)
        with progress.stage(f"{one.name}: writing {new_tokens} tokens", len(prompts)) as step:
            ran = free_run(model, prompts, new_tokens, 1, base.make, one.make, step, protocol.chunk)
        bytes_ = measure_bytes(model, loaded.geometry, blocks.tokens[:1], one.make_counted, one.plan)
        return {
            "dataset": blocks.source,
            "blocks": len(blocks),
            "context": blocks.tokens.shape[1],
            "cache_ratio": bytes_.cache_ratio,
            "delta_percent": compare(pair.base, pair.compressed).delta_percent,
            **divergence_columns(pair.divergence),
            "prompts": ran.prompts,
            "new_tokens": ran.new_tokens,
            "equal_percent": ran.equal_percent,
            "first_difference": ran.first_difference,
        }

    rows = []
    for one in others:
        depends_on = {
            "revision": [AGREEING_REVISION, MEASURING_REVISION, COUNTING_REVISION],
            "model": {"fingerprint": loaded.fingerprint, **loaded.numerics},
            "cache": dict(one.key),
            "blocks": blocks.hash,
            "chunk": protocol.chunk,
            "new_tokens": new_tokens,
            "generation": model.generation_config.to_diff_dict(),  # of which the fingerprint knows nothing
        }
        found = cells.get_or_compute("agreement", depends_on, partial(measured, one))
        rows.append({"cache": one.name, **found})
    return rows
