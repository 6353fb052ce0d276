"""The sweep: what each layer costs alone."""

import os
import platform
from collections.abc import Sequence
from typing import Any

import pandas as pd

from leankv.config.notation import format_layers
from leankv.errors import UserError
from leankv.evaluation.perplexity import BlockNats, Comparison, compare
from leankv.report.columns import SWEEP_COLUMNS
from leankv.studies.activation_store import remove_captures
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.predict import predict_costs
from leankv.studies.screened_costs import screened_costs
from leankv.studies.sweep_index import Index
from leankv.studies.sweep_table import finished_row, row_of, write_sweep


def sweep(evaluator: PlanEvaluator) -> pd.DataFrame:
    """Fit the codecs of this worker's layers, and measure each layer's cost alone on the selection split.

    Whoever finds all layers finished at the end gathers them; so the last worker does, and one that is alone.

    Returns:
        The whole sweep's table where it was gathered, else that of this worker's shard.

    Raises:
        UserError: a shard alone cannot screen or predict.
    """
    workspace = evaluator.workspace
    options, shard = workspace.experiment.sweep, workspace.shard
    if shard.count > 1 and (options.screen or options.predict):
        raise UserError(
            "screening and prediction look at all layers together; leave --shard out, or give --no-screen and "
            "--no-predict"
        )
    workspace.begin()
    layers = shard.part(workspace.layers)
    if workspace.folder is not None:
        Index.of(evaluator).write()
    if shard.count > 1:
        workspace.progress.say(
            f"shard {shard}: process {os.getpid()} on {platform.node()}, layers {format_layers(layers)}"
        )
    if not layers:
        return pd.DataFrame(columns=list(SWEEP_COLUMNS))
    evaluator.codecs.fit(workspace.plan.only([layer]) for layer in layers)
    base = evaluator.base()
    costs = _screened_costs(evaluator) if options.screen else _exact_costs(evaluator, layers)
    predicted = predict_costs(evaluator, base.perplexity) if options.predict else {}
    rows = [layer_row(evaluator, layer, *costs[layer], predicted.get(layer)) for layer in layers]
    if workspace.folder is None:
        return pd.DataFrame(rows, columns=list(SWEEP_COLUMNS))
    if shard.count > 1:
        index = Index.of(evaluator)
        if index.missing(workspace.experiment):
            remove_captures(workspace.folder, shard)
            return pd.DataFrame(rows, columns=list(SWEEP_COLUMNS))
        rows = [finished_row(index, workspace.experiment, layer) for layer in workspace.layers]
    return write_sweep(workspace.folder, rows)


def layer_row(
    evaluator: PlanEvaluator, layer: int, cost: Comparison, seconds: float, predicted: float | None = None
) -> dict[str, Any]:
    """One row of `sweep.csv`, from a layer's cost and the seconds that measuring it took."""
    workspace = evaluator.workspace
    codecs = {site.part: stored for site, stored in evaluator.codecs.codecs(workspace.plan.only([layer])).items()}
    width = workspace.loaded.geometry.layers[layer].width
    return row_of(workspace.experiment, layer, width, workspace.key_space, cost, seconds, codecs, predicted)


def layer_cost(evaluator: PlanEvaluator, layer: int) -> tuple[Comparison, float]:
    """One layer's cost on all selection blocks, and the seconds that measuring it took."""
    measured = evaluator.nats(evaluator.workspace.plan.only([layer]))
    return compare(evaluator.base(), measured), measured.seconds


def _exact_costs(evaluator: PlanEvaluator, layers: Sequence[int]) -> dict[int, tuple[Comparison, float]]:
    """Each layer's cost on all selection blocks."""
    costs = {}
    with evaluator.workspace.progress.stage(f"sweeping {len(layers)} layers", len(layers)) as step:
        for layer in layers:
            costs[layer] = layer_cost(evaluator, layer)
            step(f"layer {layer}: {costs[layer][0].delta_ppl:+.3f}")
    return costs


def _screened_costs(evaluator: PlanEvaluator) -> dict[int, tuple[Comparison, float]]:
    """Each layer's cost as far as the choice depends on it."""
    layers, plan = evaluator.workspace.layers, evaluator.workspace.plan

    def measure(layer: int, block_ids: Sequence[int]) -> BlockNats:
        return evaluator.nats(plan.only([layer]), block_ids=block_ids)

    return screened_costs(evaluator, layers, measure, f"screening {len(layers)} layers")
