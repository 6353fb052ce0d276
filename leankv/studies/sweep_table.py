"""Gathering: from finished measurements to `sweep.csv`, its report and its figure. No model is needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from leankv.cache.plan import PlanSpec
from leankv.config.experiment import Experiment
from leankv.config.notation import format_layers
from leankv.config.plan_table import EXACT, PARTS
from leankv.errors import UserError
from leankv.evaluation.perplexity import BlockNats, Comparison, compare
from leankv.models.geometry import Width, part_of_width
from leankv.report import run_files
from leankv.report.columns import SWEEP_COLUMNS
from leankv.report.sweep import write_sweep_report
from leankv.storage.files import read_json, write_text
from leankv.studies.activation_store import remove_captures
from leankv.studies.codec_store import StoredCodec, read_codec
from leankv.studies.run_folder import check_folder
from leankv.studies.sweep_index import Index


def gather(experiment: Experiment) -> pd.DataFrame:
    """Write `sweep.csv`, `sweep.md` and the figure from what the workers left; computes nothing, loads no model.

    Raises:
        UserError: layers are missing, or the folder is another experiment's.
    """
    folder = check_folder(experiment)
    PlanSpec.parse(experiment.plan)  # makes the families known that modules of the user's own define
    index = Index.read(folder)
    if index is None:
        raise UserError(f"{folder} holds no sweep to gather; run: leankv sweep --output-dir {folder}")
    if missing := index.missing(experiment):
        again = f"leankv sweep --config {folder / run_files.EXPERIMENT} --output-dir {folder}"
        raise UserError(
            f"the sweep in {folder} lacks layers {format_layers(missing)}; run: {again} (or its shards, with --shard)"
        )
    rows = [finished_row(index, experiment, layer) for layer in index.layers(experiment)]
    return write_sweep(folder, rows)


def finished_row(index: Index, experiment: Experiment, layer: int) -> dict[str, Any]:
    """The row of a layer that some worker has finished."""
    cells = (read_json(index.folder / name)["result"] for name in (index.base, index.cells[layer]))
    base, measured = map(BlockNats.from_cell, cells)
    codecs = {part: read_codec(index.folder / name) for part, name in index.codecs[layer].items()}
    cost = compare(base, measured)
    return row_of(experiment, layer, index.widths[layer], index.key_space, cost, measured.seconds, codecs)


def write_sweep(folder: Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Write a finished sweep's table, its report and its figure, and remove what workers that were stopped left."""
    table = pd.DataFrame(rows, columns=list(SWEEP_COLUMNS))
    write_text(folder / run_files.SWEEP, table.to_csv(index=False))
    write_sweep_report(folder)
    remove_captures(folder)
    return table


def row_of(
    experiment: Experiment,
    layer: int,
    width: Width,
    key_space: str,
    cost: Comparison,
    seconds: float,
    codecs: Mapping[str, StoredCodec],
    predicted: float | None = None,
) -> dict[str, Any]:
    """One row of `sweep.csv`: a layer's cost alone, and its codecs' held-out errors."""
    low, high = cost.interval or (None, None)
    return {
        "layer": layer,
        "codec_k": codecs["k"].codec.recipe.text if "k" in codecs else EXACT,
        "codec_v": codecs["v"].codec.recipe.text if "v" in codecs else EXACT,
        "key_space": key_space,
        "protocol": experiment.protocol.kind,
        "sinks": experiment.protocol.sinks,
        "window": experiment.protocol.window,
        "tokens": cost.tokens,
        "base_ppl": cost.base_ppl,
        "ppl": cost.ppl,
        "delta_ppl": cost.delta_ppl,
        "delta_ppl_low": low,
        "delta_ppl_high": high,
        "fvu_k": codecs["k"].fvu if "k" in codecs else 0.0,
        "fvu_v": codecs["v"].fvu if "v" in codecs else 0.0,
        "bits_per_token": sum(
            codecs[part].codec.bits_per_token if part in codecs else part_of_width(width, part) * 16 for part in PARTS
        ),
        "seconds": seconds,
        "predicted_delta_ppl": predicted,
    }
