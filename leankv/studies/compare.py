"""The comparison: whole caches, ours and those of others, in perplexity and in bytes, on the same blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from leankv.cache.plan import PlanSpec
from leankv.codecs import Recipe
from leankv.errors import UserError
from leankv.evaluation.baselines import Baseline, try_baseline
from leankv.evaluation.cache_bytes import CacheBytes
from leankv.evaluation.divergence import divergence_columns
from leankv.evaluation.paired import PairedRun
from leankv.evaluation.perplexity import compare
from leankv.report import run_files
from leankv.report.columns import COMPARE_COLUMNS
from leankv.report.compare import write_compare_report
from leankv.report.tables import format_number
from leankv.storage.files import write_text
from leankv.studies.activation_store import remove_captures
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.stored_bytes import bytes_of_cache, bytes_of_plan

CONTEXT = 4096
"""Tokens at which the all-in ratio has a column of its own."""


def compare_caches(
    evaluator: PlanEvaluator,
    plans: Mapping[str, PlanSpec],
    baselines: Sequence[Baseline] = (),
    split: str = "report",
    windows: Sequence[int] = (),
) -> pd.DataFrame:
    """Measure caches under every plan, and every baseline; write the table and its report.

    Args:
        evaluator: the workspace's own plan plays no part.
        plans: by the name of their rows; `plans_of` makes uniform ones.
        baselines: caches that someone else wrote.
        split: whose blocks are measured: `selection` to choose with, else `report` or `certification`.
        windows: latest tokens kept exact, a row for each plan and window; the protocol's own unless given.

    Returns:
        The table, as `leankv.report.columns.COMPARE_COLUMNS` describes it.

    Raises:
        UserError: a plan or a baseline does not suit the model, or baselines or windows are asked for in a strict pass
            or with a prefix.
    """
    workspace, protocol = evaluator.workspace, evaluator.protocol
    if baselines and protocol.kind == "strict":
        raise UserError(
            "baselines hand out what they are given exact at first, so one strict pass shows no loss of theirs; "
            "use --protocol stream, or leave --baseline out"
        )
    if baselines and protocol.kind == "prefix":
        raise UserError(
            "baselines cannot be filled exactly and coded whole afterwards, as a prefix is; use --protocol "
            "stream, or leave --baseline out"
        )
    wanted = dict.fromkeys(windows or (protocol.window,))
    evaluators = [evaluator if window == protocol.window else evaluator.with_window(window) for window in wanted]
    checked = {name: workspace.checked(plan) for name, plan in plans.items()}
    workspace.begin()
    for baseline in baselines:
        try_baseline(baseline, workspace.loaded, workspace.blocks(split).tokens[:1], protocol.chunk)
    rows = []
    for name, plan in checked.items():
        for own in evaluators:
            rows.append(_row_of_plan(own, name, plan, split))
            workspace.progress.say(format_row(rows[-1]))
        evaluator.codecs.forget()  # so that the codecs of one plan only are in memory
    for baseline in baselines:
        rows.append(_row_of_baseline(evaluator, baseline, split))
        workspace.progress.say(format_row(rows[-1]))
    table = pd.DataFrame(rows, columns=list(COMPARE_COLUMNS))
    if workspace.folder is not None:
        write_text(workspace.folder / run_files.COMPARE, table.to_csv(index=False))
        write_compare_report(workspace.folder)
        remove_captures(workspace.folder)
    return table


def plans_of(recipes: Sequence[Recipe]) -> dict[str, PlanSpec]:
    """The uniform plans of recipes, named by them."""
    return {recipe.text: PlanSpec.uniform(recipe) for recipe in recipes}


def _row_of_plan(evaluator: PlanEvaluator, name: str, plan: PlanSpec, split: str) -> dict[str, Any]:
    workspace, protocol = evaluator.workspace, evaluator.protocol
    pair = evaluator.pair(plan, split, f"base model and {name}, window {protocol.window}, {split} split")
    codecs = evaluator.codecs.plan(plan).values()
    return {
        "method": _method(plan),
        "baseline": "",
        "spec": name,
        "plan": "" if plan.is_alike(workspace.n_layers) else str(plan),
        "key_space": workspace.key_space,
        "error_metric": workspace.experiment.fit.error_metric,
        "sinks": protocol.sinks,
        "window": protocol.window,
        "codec_bytes": sum(codec.nbytes for codec in codecs),
        **_figures(evaluator, split, pair, bytes_of_plan(evaluator, split, plan)),
    }


def _row_of_baseline(evaluator: PlanEvaluator, baseline: Baseline, split: str) -> dict[str, Any]:
    seed = evaluator.workspace.experiment.seed

    def make_cache() -> Any:
        torch.manual_seed(seed)  # for caches that draw a rotation or a sketch
        return baseline.make(evaluator.workspace.loaded.model.config)

    made_by = {"peer": baseline.spec, "maker": baseline.maker}
    pair = evaluator.baseline_pair(make_cache, made_by, split, f"base model and {baseline.spec}, {split} split")
    bytes_ = bytes_of_cache(evaluator.workspace, split, make_cache, f"{baseline.spec} {baseline.maker} seed {seed}")
    return {
        "method": baseline.method,
        "baseline": baseline.maker,
        "spec": baseline.spec,
        "codec_bytes": 0,
        **_figures(evaluator, split, pair, bytes_),
    }


def _figures(evaluator: PlanEvaluator, split: str, pair: PairedRun, bytes_: CacheBytes) -> dict[str, Any]:
    """The columns that every row has."""
    cost = compare(pair.base, pair.compressed)
    low, high = cost.interval or (None, None)
    return {
        "protocol": evaluator.protocol.kind,
        "split": split,
        "blocks": len(pair.base.nats),
        "context": bytes_.context,
        "tokens": cost.tokens,
        "code_ratio_live": bytes_.code_ratio_live,
        "code_ratio_stored": bytes_.code_ratio_stored,
        "cache_ratio": bytes_.cache_ratio,
        "stored_ratio": bytes_.stored_ratio,
        "all_in_ratio": bytes_.all_in_ratio,
        "all_in_ratio_4096": bytes_.all_in_ratio if bytes_.context == CONTEXT else None,
        "held_bytes": bytes_.held,
        "stored_bytes": bytes_.stored,
        "peak_step_bytes": bytes_.peak_step,
        "codec_bytes_memory": bytes_.codecs,
        "base_ppl": cost.base_ppl,
        "ppl": cost.ppl,
        "delta_percent": cost.delta_percent,
        "low": None if low is None else 100 * low / cost.base_ppl,
        "high": None if high is None else 100 * high / cost.base_ppl,
        **divergence_columns(pair.divergence),
        "seconds": pair.seconds,
    }


def _method(plan: PlanSpec) -> str:
    """The one recipe of a plan without rates: `transform`, `resid(share,transform)`; `plan` where it has several."""
    recipes = list(plan.recipes())
    return recipes[0].method if len(recipes) == 1 else "plan"


def format_row(row: dict[str, Any]) -> str:
    """A row in one line; `-` for a ratio that is not known."""
    window = f", window {row['window']}" if row["baseline"] == "" else ""
    ratios = [format_number(row[name], ".2f") for name in ("cache_ratio", "all_in_ratio", "stored_ratio")]
    return (
        f"{row['spec']}{window}: {row['delta_percent']:+.2f} % perplexity; at {row['context']} tokens cache ratio "
        f"{ratios[0]}, all-in ratio {ratios[1]}, stored {ratios[2]}"
    )
