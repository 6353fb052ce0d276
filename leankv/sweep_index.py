"""What is finished of a sweep that several workers share, and gathering it.

What ties the workers together is `sweep.json`: the names of the files in which each layer's codecs and measurement are,
or will be. So a program that has no model can tell what is finished, and gather it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from leankv.errors import UserError
from leankv.experiment import Experiment, parse_layers
from leankv.output_folder import EXPERIMENT_FILE, check_folder, write_if_changed
from leankv.perplexity import Comparison, compare
from leankv.report import write_sweep_report
from leankv.run import Run, StoredCodec, nats_of, read_codec, remove_captures
from leankv.store import read_json, write_text
from leankv.sweep_table import COLUMNS

KEY_SPACE = "post-rope"
INDEX_FILE = "sweep.json"


@dataclass(frozen=True)
class Index:
    """Where a sweep's results are, in its folder.

    Attributes:
        folder: the output folder; the other names are relative to it.
        base: the base perplexity's cell.
        cells: each of the model's layers' cell, whether asked for or not.
        codecs: each layer's codec files, by part.
        widths: each layer's width.
    """

    folder: Path
    base: str
    cells: tuple[str, ...]
    codecs: tuple[Mapping[str, str], ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, run: Run) -> "Index":
        """The names under which this run finds and writes its results."""
        numbers = range(len(run.loaded.geometry.layers))

        def name(path: Path) -> str:
            return path.relative_to(run.folder).as_posix()

        return cls(
            run.folder,
            name(run.nats_path("selection", [])),
            tuple(name(run.nats_path("selection", [layer])) for layer in numbers),
            tuple({part: name(run.codec_path((layer, part))) for part in run.specs} for layer in numbers),
            tuple(layer.width for layer in run.loaded.geometry.layers),
        )

    @classmethod
    def read(cls, folder: Path) -> "Index | None":
        """That of the latest run in `folder`; None where none has begun."""
        path = folder / INDEX_FILE
        return cls(folder, **read_json(path)) if path.is_file() else None

    def write(self) -> None:
        """Write it to its folder; workers that share the sweep write the same."""
        about = {"base": self.base, "cells": self.cells, "codecs": self.codecs, "widths": self.widths}
        write_if_changed(self.folder / INDEX_FILE, json.dumps(about, indent=1) + "\n")

    def layers(self, experiment: Experiment) -> tuple[int, ...]:
        """The layers that an experiment asks for."""
        return parse_layers(experiment.layers, len(self.cells))

    def missing(self, experiment: Experiment) -> tuple[int, ...]:
        """The asked-for layers that are not finished; all of them while there is no base perplexity."""

        def finished(layer: int) -> bool:
            return all((self.folder / name).exists() for name in (self.cells[layer], *self.codecs[layer].values()))

        has_base = (self.folder / self.base).exists()
        return tuple(layer for layer in self.layers(experiment) if not (has_base and finished(layer)))

    def row(self, experiment: Experiment, layer: int) -> dict[str, Any]:
        """A finished layer's row."""
        base, measured = (nats_of(read_json(self.folder / name)["result"]) for name in (self.base, self.cells[layer]))
        codecs = {part: read_codec(self.folder / name) for part, name in self.codecs[layer].items()}
        return row_of(experiment, layer, self.widths[layer], compare(base, measured), measured.seconds, codecs)


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
            f"the sweep in {folder} lacks layers {layer_words(missing)}; run: {again} (or its shards, with --shard)"
        )
    rows = [index.row(experiment, layer) for layer in index.layers(experiment)]
    return write_sweep(folder, rows)


def write_sweep(folder: Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Write a finished sweep's table, its report and its figure, and remove what workers that were stopped left."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_text(folder / "sweep.csv", table.to_csv(index=False))
    write_sweep_report(folder)
    remove_captures(folder)
    return table


def row_of(
    experiment: Experiment,
    layer: int,
    width: int,
    cost: Comparison,
    seconds: float,
    codecs: Mapping[str, StoredCodec],
    predicted: float | None = None,
) -> dict[str, Any]:
    """One row of `sweep.csv`: a layer's cost alone, and its codecs' held-out errors."""
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
        "seconds": seconds,
        "predicted_delta_ppl": predicted,
    }


def layer_words(layers: Sequence[int]) -> str:
    """`0, 3, 6`; `none`."""
    return ", ".join(map(str, layers)) or "none"
