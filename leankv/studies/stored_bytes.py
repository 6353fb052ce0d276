"""A plan's bytes, and those of a baseline, counted once and kept as cells."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from leankv.cache.plan import Plan, PlanSpec
from leankv.evaluation.cache_bytes import PIECE, SETTLED, CacheBytes, measure_bytes, pieces_of
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.workspace import Workspace

COUNTING_REVISION = 6
"""Raised when the bytes counted of one cache change: the ruler, the way caches are filled, the peak."""


def bytes_of_plan(evaluator: PlanEvaluator, split: str, spec: PlanSpec) -> CacheBytes:
    """What a cache takes under a plan; see `bytes_of_cache`."""
    protocol, cache = evaluator.protocol, evaluator.new_cache(spec)
    key = evaluator.key(spec, split)  # with all that cost and bytes depend on alike
    settled = protocol.sinks + protocol.window
    return bytes_of_cache(evaluator.workspace, split, cache.fresh, key, cache.plan, settled, protocol.coded_after)


def bytes_of_cache(
    workspace: Workspace,
    split: str,
    make_cache: Callable[[], Any],
    cache_key: str,
    plan: Plan | None = None,
    settled: int = SETTLED,
    context: int | None = None,
) -> CacheBytes:
    """Measure a cache filled with the first block of a split, or look up what was measured.

    Args:
        workspace: its model and its text.
        split: `selection`, `certification` or `report`.
        make_cache: a fresh cache for one sequence.
        cache_key: names all that the cache depends on beside model and text.
        plan: what it holds as codes; None, for baselines: everything.
        settled: tokens after which what it compresses grows by codes alone: sinks and window of ours.
        context: tokens of the block to fill it with; all of them unless given.
    """
    block = workspace.blocks(split).take([0])
    block = replace(block, tokens=block.tokens[:, :context])

    def compute() -> dict[str, Any]:
        with workspace.progress.stage(f"bytes at {block.tokens.shape[1]} tokens", len(pieces_of(block.tokens))) as step:
            loaded = workspace.loaded
            return asdict(measure_bytes(loaded.model, loaded.geometry, block.tokens, make_cache, plan, settled, step))

    depends_on = {
        "revision": COUNTING_REVISION,
        "model": workspace.model_key,
        "block": block.hash,
        "cache": cache_key,
        "piece": PIECE,
    }
    return CacheBytes(**workspace.cells.get_or_compute("cache-bytes", depends_on, compute))
