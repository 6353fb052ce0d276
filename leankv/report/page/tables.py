"""The page's tables: cells of text, and what they are sorted by."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from leankv.config.plan_table import recipes_by_layer
from leankv.report import run_files
from leankv.report.page.contents import Chosen, RunContents
from leankv.report.selection import selection_rows
from leankv.report.summary import Summary
from leankv.report.tables import (
    format_budget,
    format_certified,
    format_interval,
    format_number,
    format_protocol,
    format_ratio,
)
from leankv.report.task_scores import TaskScores, side_by_side

LONG_CONTEXTS = (4096, 32768, 131072)
"""Tokens for which the page says how many bytes are saved."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is read.
        value: what the column is sorted by.
    """

    text: str
    value: float | str

    @classmethod
    def number(cls, value: Any, form: str) -> "Cell":
        """A number in a format; one that is not known is `-`, and sorted last."""
        return cls(format_number(value, form), float("inf") if pd.isna(value) else float(value))

    @classmethod
    def words(cls, text: Any) -> "Cell":
        """Text, sorted as it is."""
        return cls(str(text), str(text))


@dataclass(frozen=True)
class PageTable:
    """A table with a header; its columns can be sorted."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def claim(chosen: Chosen) -> str:
    """What came out in one line: by the bytes that were to be few."""
    summary = chosen.summary
    ratio, what = {
        "stored": (summary.stored_ratio, " stored"),
        "all-in": (summary.all_in_ratio, " all in"),
    }.get(summary.minimize or "live", (summary.cache_ratio, ""))
    return f"{ratio or 1:.1f} times smaller{what} for {summary.delta_percent:+.2f} %"


def headline(chosen: Chosen) -> list[tuple[str, str]]:
    """What was asked and what came out, name and text."""
    summary = chosen.summary
    held, stored = format_ratio(summary.cache_ratio), format_ratio(summary.stored_ratio)
    return [
        ("budget", format_budget(summary.budget)),
        ("certified", format_certified(summary.certificate)),
        ("cost", f"{summary.delta_percent:+.2f} %, from perplexity {summary.base_ppl:.3f} to {summary.ppl:.3f}"),
        ("95 % interval", f"{format_interval(summary.delta_ppl_interval)} points"),
        ("measured on", f"{summary.tokens:,} tokens of {summary.dataset}, {summary.split} split"),
        ("protocol", f"{format_protocol(summary.protocol, summary.sinks, summary.window)}, {summary.context} tokens"),
        ("cache ratio", f"{held} held, {stored} stored, at {summary.context} tokens"),
        ("all-in ratio", f"{format_ratio(summary.all_in_ratio)} with codecs and the peak of a step"),
        ("same likeliest token", f"{format_number(summary.divergence['top1'], '.1f')} %"),
        ("mean KL divergence", f"{format_number(summary.divergence['kl'], '.4f')} nats a token"),
        ("codecs", f"{summary.codec}, {summary.codec_bytes_memory / 1e6:.1f} MB in memory"),
        ("model", f"{summary.model}, {summary.n_layers} layers, {summary.dtype}, on {summary.device}"),
    ]


def bytes_saved(chosen: Chosen) -> PageTable:
    """The 16-bit cache and the compressed one at long contexts, as the codecs claim; without the codecs themselves."""
    summary = chosen.summary
    rows = []
    for tokens in LONG_CONTEXTS:
        ratio = summary.claimed_cache_ratio.get(tokens)
        if ratio is not None:
            base = _base_bytes(summary, tokens) / 1e6
            held = base / ratio
            sizes = [Cell.number(size, ",.1f") for size in (base, held, base - held)]
            rows.append([Cell.number(tokens, ",.0f"), *sizes, Cell.number(ratio, ".1f")])
    return PageTable(["tokens", "16-bit, MB", "held, MB", "saved, MB", "ratio"], rows)


def _base_bytes(summary: Summary, tokens: int) -> float:
    """Of the 16-bit cache; not known of files that do not say, unless every layer's grew with the text so far."""
    if summary.claimed_base_bytes is not None:
        return float(summary.claimed_base_bytes.get(tokens, math.nan))
    widths = summary.width if isinstance(summary.width, list) else [summary.width] * summary.n_layers
    of_both = [sum(width) if isinstance(width, tuple | list) else 2 * width for width in widths]
    per_token = sum(of_both) * 2  # bytes of 16 bits
    return float(per_token * tokens) if summary.base_bytes == per_token * summary.context else math.nan


def plan_table(chosen: Chosen) -> PageTable | None:
    """Recipe of each layer's keys and values."""
    if not isinstance(chosen.plan, dict):
        return None
    rows = [
        [Cell.number(layer, ".0f"), Cell.words(own["k"]), Cell.words(own["v"])]
        for layer, own in enumerate(recipes_by_layer(chosen.plan, chosen.summary.n_layers))
    ]
    return PageTable(["layer", "keys", "values"], rows)


def sweep_table(sweep: pd.DataFrame) -> PageTable:
    """Cost of each layer alone."""
    rows = [
        [
            Cell.number(row.layer, ".0f"),
            Cell.words(row.codec_k),
            Cell.words(row.codec_v),
            Cell.number(row.delta_ppl, "+.4f"),
            Cell.words(format_interval((row.delta_ppl_low, row.delta_ppl_high))),
            Cell.number(100 * row.delta_ppl / row.base_ppl, "+.3f"),
            Cell.number(100 * row.fvu_k, ".2f"),
            Cell.number(100 * row.fvu_v, ".2f"),
            Cell.number(row.tokens, ",.0f"),
        ]
        for _, row in sweep.iterrows()
    ]
    header = ["layer", "keys", "values", "cost, points", "95 %", "cost, %", "K unexplained, %", "V unexplained, %"]
    return PageTable([*header, "tokens"], rows)


def compare_table(table: pd.DataFrame) -> PageTable:
    """Whole caches, ours and others'."""
    rows = [
        [
            Cell.words(row.spec),
            Cell.words(_protocol(row)),
            Cell.number(row.delta_percent, "+.2f"),
            *(Cell.number(value, ".2f") for value in (row.cache_ratio, row.code_ratio_stored, row.all_in_ratio)),
            Cell.number(row.kl, ".4f"),
            Cell.number(row.top1, ".1f"),
        ]
        for _, row in table.iterrows()
    ]
    header = [
        "cache",
        "protocol",
        "cost, %",
        "cache ratio",
        "code ratio stored",
        "all-in",
        "mean KL",
        "same top token, %",
    ]
    return PageTable(header, rows)


def _protocol(row: Any) -> str:
    """Caches of others keep what they keep."""
    if pd.isna(row.sinks):
        return str(row.protocol)
    return format_protocol(row.protocol, int(row.sinks), int(row.window))


def map_table(table: pd.DataFrame) -> PageTable:
    """Each site under each codec."""
    rows = [
        [
            Cell.number(row.layer, ".0f"),
            Cell.words(row.part.upper()),
            Cell.words(row.codec),
            Cell.number(row.bits_per_token / row.width, ".2f"),
            Cell.number(100 * row.delta_ppl / row.base_ppl, "+.3f"),
            Cell.number(100 * row.fvu, ".2f"),
        ]
        for _, row in table.iterrows()
    ]
    return PageTable(["layer", "part", "codec", "bits a value", "cost, %", "unexplained, %"], rows)


def spectra_table(table: pd.DataFrame) -> PageTable:
    """How many principal components hold given shares of each site's variance."""
    shares = (0.5, 0.9, 0.99)
    rows = []
    for (layer, part), own in table.groupby(["layer", "part"], sort=True):
        held = own["variance"].cumsum() / own["variance"].sum()
        counts = [int((held < share).sum()) + 1 for share in shares]
        numbers = [Cell.number(count, ".0f") for count in (*counts, len(own))]
        rows.append([Cell.number(layer, ".0f"), Cell.words(str(part).upper()), *numbers])
    return PageTable(["layer", "part", *(f"{share:.0%}" for share in shares), "of"], rows)


def steps_table(chosen: Chosen) -> PageTable:
    """What a search measured, in order."""
    rows = [
        [
            Cell.number(place, ".0f"),
            Cell.words(step["strategy"]),
            Cell.words(step["what"]),
            Cell.number(step["ratio"], ".2f"),
            Cell.number(step["percent"], "+.2f"),
            Cell.number(step["evaluations"], ".1f"),
        ]
        for place, step in enumerate(chosen.steps, start=1)
    ]
    return PageTable(["step", "strategy", "what", "ratio", "cost on selection text, %", "evaluations so far"], rows)


def task_table(told: TaskScores) -> PageTable:
    """A task or a figure of agreement a row, a cache a column."""
    header, rows = side_by_side(told)
    return PageTable(header, [[Cell.words(text) for text in row] for row in rows])


def greedy_table(run: RunContents) -> PageTable:
    """The steps of LeanLlama's recipe."""
    assert run.selection is not None
    header, rows = selection_rows(dict(run.selection))
    return PageTable(header, [[_sorted_as_number(text) for text in row] for row in rows])


def _sorted_as_number(text: str) -> Cell:
    try:
        return Cell(text, float(text))
    except ValueError:
        return Cell.words(text)


def provenance(run: RunContents) -> list[tuple[str, str]]:
    """Everything that made a run, as it stands in its files."""
    told = []
    if run.manifest is not None:
        told.append(("manifest.json: versions, hashes, settings", json.dumps(run.manifest, indent=2)))
    if run.tasks is not None:
        told.append(("tasks.json: what was asked, and of what", json.dumps(dict(run.tasks.about), indent=2)))
    if run.experiment is not None:
        told.append((run_files.EXPERIMENT, run.experiment))
    return told
