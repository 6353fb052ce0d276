"""The sweep: what each layer costs alone."""

import os
import platform
from collections.abc import Sequence
from typing import Any

import pandas as pd

from leankv.errors import UserError
from leankv.gathering import finished_row, layer_words, row_of, write_sweep
from leankv.perplexity import BlockNats, Comparison, compare
from leankv.prediction import predict_costs
from leankv.run import Run
from leankv.screened_costs import screened_costs
from leankv.sweep_index import Index
from leankv.sweep_table import COLUMNS
from leankv.workplace import remove_captures


def sweep(run: Run) -> pd.DataFrame:
    """Fit the codecs of this worker's layers, and measure each layer's cost alone on the selection split.

    Whoever finds all layers finished at the end gathers them; so the last worker does, and one that is alone.

    Returns:
        The whole sweep's table where it was gathered, else that of this worker's shard.

    Raises:
        UserError: a shard alone cannot screen or predict.
    """
    options = run.experiment.sweep
    if run.shard.count > 1 and (options.screen or options.predict):
        raise UserError(
            "screening and prediction look at all layers together; leave --shard or --screen and --predict out"
        )
    run.begin()
    index = Index.of(run)
    index.write()
    layers = run.shard.part(run.layers)
    if run.shard.count > 1:
        run.progress.say(f"shard {run.shard}: process {os.getpid()} on {platform.node()}, layers {layer_words(layers)}")
    if not layers:
        return pd.DataFrame(columns=list(COLUMNS))
    run.fitted(layers)
    base = run.measure("selection", [], "base perplexity, selection split")
    costs = _screened_costs(run) if options.screen else _exact_costs(run, layers)
    predicted = predict_costs(run, base.perplexity) if options.predict else {}
    rows = [layer_row(run, layer, *costs[layer], predicted.get(layer)) for layer in layers]
    if run.shard.count > 1:
        if index.missing(run.experiment):
            remove_captures(run.folder, run.shard)
            return pd.DataFrame(rows, columns=list(COLUMNS))
        rows = [finished_row(index, run.experiment, layer) for layer in run.layers]
    return write_sweep(run.folder, rows)


def layer_row(run: Run, layer: int, cost: Comparison, seconds: float, predicted: float | None = None) -> dict[str, Any]:
    """One row of `sweep.csv`, from a layer's cost and the seconds that measuring it took."""
    codecs = {part: stored for (_, part), stored in run.fitted([layer]).items()}
    width = run.loaded.geometry.layers[layer].width
    return row_of(run.experiment, layer, width, run.key_space, cost, seconds, codecs, predicted)


def layer_cost(run: Run, layer: int) -> tuple[Comparison, float]:
    """One layer's cost on all selection blocks, and the seconds that measuring it took."""
    measured = run.measure("selection", [layer])
    return compare(run.measure("selection", []), measured), measured.seconds


def _exact_costs(run: Run, layers: Sequence[int]) -> dict[int, tuple[Comparison, float]]:
    """Each layer's cost on all selection blocks."""
    costs = {}
    with run.progress.stage(f"sweeping {len(layers)} layers", len(layers)) as step:
        for layer in layers:
            costs[layer] = layer_cost(run, layer)
            step(f"layer {layer}: {costs[layer][0].delta_ppl:+.3f}")
    return costs


def _screened_costs(run: Run) -> dict[int, tuple[Comparison, float]]:
    """Each layer's cost as far as the choice depends on it."""

    def measure(layer: int, numbers: Sequence[int]) -> BlockNats:
        return run.measure("selection", [layer], only=numbers)

    return screened_costs(run, run.layers, measure, f"screening {len(run.layers)} layers")
