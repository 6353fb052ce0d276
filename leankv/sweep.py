"""The sweep: what each layer costs alone. Writes `sweep.csv`, one row a layer."""

import random
from collections.abc import Sequence
from typing import Any

import pandas as pd

from leankv.perplexity import Comparison, compare, comparison_of
from leankv.prediction import predict_costs
from leankv.run import Run
from leankv.screening import screen
from leankv.store import write_text
from leankv.sweep_table import COLUMNS

KEY_SPACE = "post-rope"


def sweep(run: Run) -> pd.DataFrame:
    """Fit every asked-for layer's codecs, measure each layer's cost alone on the selection split, write `sweep.csv`."""
    run.begin()
    run.fitted(run.layers)
    base = run.measure("selection", [], "base perplexity, selection split")
    if run.experiment.sweep.screen:
        costs = _screened_costs(run)
    else:
        costs = {}
        with run.progress.stage(f"sweeping {len(run.layers)} layers", len(run.layers)) as step:
            for layer in run.layers:
                costs[layer] = layer_cost(run, layer)
                step(f"layer {layer}: {costs[layer][0].delta_ppl:+.3f}")
    predicted = predict_costs(run, base.perplexity) if run.experiment.sweep.predict else {}
    rows = [layer_row(run, layer, *costs[layer], predicted.get(layer)) for layer in run.layers]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_text(run.folder / "sweep.csv", table.to_csv(index=False))
    return table


def layer_cost(run: Run, layer: int) -> tuple[Comparison, float]:
    """One layer's cost on all selection blocks, and the seconds that measuring it took."""
    measured = run.measure("selection", [layer])
    return compare(run.measure("selection", []), measured), measured.seconds


def _screened_costs(run: Run) -> dict[int, tuple[Comparison, float]]:
    """Each layer's cost as far as the choice depends on it; see `leankv.screening`."""
    base = run.measure("selection", [])
    order = list(range(len(base.nats)))
    random.Random(run.experiment.seed).shuffle(order)
    seconds = dict.fromkeys(run.layers, 0.0)
    with run.progress.stage(f"screening {len(run.layers)} layers", len(run.layers)) as step:
        seen: set[int] = set()

        def measure(layer: int, first: int, end: int) -> Sequence[float]:
            numbers = order[first:end]
            measured = run.measure("selection", [layer], only=numbers)
            seconds[layer] += measured.seconds
            if layer not in seen:
                seen.add(layer)
                step()
            return [
                (nats - base.nats[number]) / base.tokens for number, nats in zip(numbers, measured.nats, strict=True)
            ]

        estimates = screen(run.layers, len(order), measure)
    return {
        layer: (
            comparison_of(base, estimate.mean, (estimate.low, estimate.high), len(estimate.differences)),
            seconds[layer],
        )
        for layer, estimate in estimates.items()
    }


def layer_row(run: Run, layer: int, cost: Comparison, seconds: float, predicted: float | None = None) -> dict[str, Any]:
    """One row of `sweep.csv`: a layer's cost alone, and its codecs' held-out errors."""
    codecs = {part: stored for (_, part), stored in run.fitted([layer]).items()}
    low, high = cost.interval or (None, None)
    width = run.loaded.geometry.layers[layer].width
    return {
        "layer": layer,
        "codec_k": run.experiment.codec.k,
        "codec_v": run.experiment.codec.v,
        "key_space": KEY_SPACE,
        "protocol": run.experiment.protocol.kind,
        "tokens": cost.tokens,
        "base_ppl": cost.base_ppl,
        "ppl": cost.ppl,
        "delta_ppl": cost.delta_ppl,
        "delta_ppl_low": low,
        "delta_ppl_high": high,
        "fvu_k": codecs["k"].fvu if "k" in codecs else 0.0,
        "fvu_v": codecs["v"].fvu if "v" in codecs else 0.0,
        "bits_per_token": sum(codecs[p].codec.bits_per_token if p in codecs else width * 16 for p in ("k", "v")),
        "seconds": seconds,
        "predicted_delta_ppl": predicted,
    }
