"""The sweep: what each layer costs alone. Writes `sweep.csv`, one row a layer."""

from typing import Any

import pandas as pd

from leankv.perplexity import compare
from leankv.run import Run
from leankv.store import write_text
from leankv.sweep_table import COLUMNS

KEY_SPACE = "post-rope"


def sweep(run: Run) -> pd.DataFrame:
    """Fit every asked-for layer's codecs, measure each layer's cost alone on the selection split, write `sweep.csv`."""
    run.begin()
    run.fitted(run.layers)
    run.measure("selection", [], "base perplexity, selection split")
    rows = []
    with run.progress.stage(f"sweeping {len(run.layers)} layers", len(run.layers)) as step:
        for layer in run.layers:
            rows.append(layer_row(run, layer))
            step(f"layer {layer}: {rows[-1]['delta_ppl']:+.3f}")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_text(run.folder / "sweep.csv", table.to_csv(index=False))
    return table


def layer_row(run: Run, layer: int) -> dict[str, Any]:
    """One layer compressed alone: its cost on the selection split and its codecs' held-out errors."""
    codecs = {part: stored for (_, part), stored in run.fitted([layer]).items()}
    measured = run.measure("selection", [layer])
    cost = compare(run.measure("selection", []), measured)
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
        "seconds": measured.seconds,
    }
