"""The sweep: what each layer costs alone. Writes `sweep.csv`, one row a layer.

Several workers may share a sweep and its folder, each with a shard of the layers; see `leankv.sweep_index`.
"""

import os
import platform
from collections.abc import Mapping
from typing import Any

import pandas as pd

from leankv.errors import UserError
from leankv.experiment import Experiment
from leankv.output_folder import EXPERIMENT_FILE, check_folder
from leankv.perplexity import BlockNats, compare
from leankv.report import write_sweep_report
from leankv.run import Run, StoredCodec, nats_of, read_codec, remove_captures
from leankv.store import read_json, write_text
from leankv.sweep_index import Index
from leankv.sweep_table import COLUMNS

KEY_SPACE = "post-rope"


def sweep(run: Run) -> pd.DataFrame:
    """Fit the codecs of this worker's layers, and measure each layer's cost alone on the selection split.

    Whoever finds all layers finished at the end gathers them; so the last worker does, and one that is alone.

    Returns:
        The whole sweep's table where it was gathered, else that of this worker's shard.
    """
    run.begin()
    index = Index.of(run)
    index.write()
    layers = run.shard.part(run.layers)
    if run.shard.count > 1:
        run.progress.say(f"shard {run.shard}: process {os.getpid()} on {platform.node()}, layers {_words(layers)}")
    if layers:
        run.fitted(layers)
        run.measure("selection", [], "base perplexity, selection split")
        with run.progress.stage(f"sweeping {len(layers)} layers", len(layers)) as step:
            for layer in layers:
                row = layer_row(run, layer)
                step(f"layer {layer}: {row['delta_ppl']:+.3f}")
    if not index.missing(run.experiment):
        return _gather(index, run.experiment)
    return _table(index, run.experiment, layers)


def gather(experiment: Experiment) -> pd.DataFrame:
    """Write `sweep.csv`, `sweep.md` and the figure from what the workers left; computes nothing, loads no model.

    Raises:
        UserError: layers are missing, or the folder is another experiment's.
    """
    folder = check_folder(experiment)
    index = Index.read(folder)
    if index is None:
        raise UserError(f"{folder} holds no sweep to gather; run: leankv sweep --output-dir {folder}")
    if missing := index.missing(experiment):
        again = f"leankv sweep --config {folder / EXPERIMENT_FILE} --output-dir {folder}"
        raise UserError(
            f"the sweep in {folder} lacks layers {_words(missing)}; run: {again} (or its shards, with --shard)"
        )
    return _gather(index, experiment)


def layer_row(run: Run, layer: int) -> dict[str, Any]:
    """One layer compressed alone: its cost on the selection split and its codecs' held-out errors."""
    codecs = {part: stored for (_, part), stored in run.fitted([layer]).items()}
    measured = run.measure("selection", [layer])
    width = run.loaded.geometry.layers[layer].width
    return _row(run.experiment, layer, width, run.measure("selection", []), measured, codecs)


def _gather(index: Index, experiment: Experiment) -> pd.DataFrame:
    table = _table(index, experiment, index.layers(experiment))
    write_text(index.folder / "sweep.csv", table.to_csv(index=False))
    write_sweep_report(index.folder)
    remove_captures(index.folder)
    return table


def _table(index: Index, experiment: Experiment, layers: tuple[int, ...]) -> pd.DataFrame:
    def row(layer: int) -> dict[str, Any]:
        base, measured = (
            nats_of(read_json(index.folder / name)["result"]) for name in (index.base, index.cells[layer])
        )
        codecs = {part: read_codec(index.folder / name) for part, name in index.codecs[layer].items()}
        return _row(experiment, layer, index.widths[layer], base, measured, codecs)

    return pd.DataFrame([row(layer) for layer in layers], columns=list(COLUMNS))


def _row(
    experiment: Experiment,
    layer: int,
    width: int,
    base: BlockNats,
    measured: BlockNats,
    codecs: Mapping[str, StoredCodec],
) -> dict[str, Any]:
    cost = compare(base, measured)
    low, high = cost.interval or (None, None)
    return {
        "layer": layer,
        "codec_k": experiment.codec.k,
        "codec_v": experiment.codec.v,
        "key_space": KEY_SPACE,
        "protocol": experiment.protocol.kind,
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


def _words(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"
