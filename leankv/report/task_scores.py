"""What tasks said of caches: the tables that `leankv eval-tasks` writes, and their one page for people."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from leankv.report import run_files
from leankv.report.divergence import DIVERGENCE_COLUMNS, format_divergence
from leankv.report.tables import format_number, markdown_table, plain_table
from leankv.search.statistics import t_interval
from leankv.storage.files import read_json, write_json, write_text

PAGE_FILE = "tasks.md"

BASE = "base"
"""How the tables call the model with its own cache."""

TASK_COLUMNS = {
    "cache": "`base`, the bundle's folder, or the baseline",
    "task": "the harness's name",
    "length": "tokens of a sample, as the harness counts them, of RULER's tasks",
    "metric": "the harness's name; of RULER's tasks, `recall`: the share of the wanted words that the answer has",
    "samples": "how many were asked",
    "score": "as the harness aggregates it",
    "stderr": "its standard error, the harness's",
    "difference": "score less the base's",
    "low": "lower end of its 95 % interval (t, over samples, each paired with itself); empty where it is not known: no "
    "sample scored differently, or the score is not a mean over samples",
    "high": "upper end",
}

AGREEMENT_COLUMNS = {
    "cache": "as above",
    "dataset": "the text",
    "blocks": "how many blocks of report text",
    "context": "tokens in each",
    "cache_ratio": "16-bit cache over what this one holds after one block",
    "delta_percent": "perplexity, percent more than the base's",
    **dict.fromkeys(DIVERGENCE_COLUMNS, "divergence from the base; see comparisons"),
    "prompts": "prompts that both went on from by themselves: half of each block",
    "new_tokens": "tokens that they went on by",
    "equal_percent": "of these the same in both at the same place, percent",
    "first_difference": "median tokens before the first that differs",
}


@dataclass(frozen=True)
class TaskScores:
    """All that was asked of some caches.

    Attributes:
        scores: with `TASK_COLUMNS`.
        agreement: with `AGREEMENT_COLUMNS`; empty where no text was measured.
        about: model, harness, protocol and whatever else the scores depend on.
    """

    scores: pd.DataFrame
    agreement: pd.DataFrame
    about: Mapping[str, Any]


def score_rows(
    cache: str, results: Mapping[str, Any], titles: Mapping[str, tuple[str, int | None]], base: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Rows of `tasks.csv` from what the harness's `evaluate` returned.

    Args:
        cache: how the rows call it.
        results: of this cache.
        titles: the key of each task in `results` -> its name and length.
        base: of the base model; None where this is the base.
    """
    rows = []
    for title, (name, length) in titles.items():
        told = results["results"][title]
        for key, score in told.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(score, int | float):
                continue
            if length is not None and metric != str(length):
                continue  # RULER's tasks fill in -1 for the lengths that they were not asked at
            stderr = told.get(f"{metric}_stderr,{filter_}")
            own = _samples(results, title, filter_)
            row: dict[str, Any] = {
                "cache": cache,
                "task": name,
                "length": length,
                "metric": "recall" if length is not None else metric + ("" if filter_ == "none" else f" ({filter_})"),
                "samples": len(own),
                "score": float(score),
                "stderr": stderr if isinstance(stderr, int | float) else math.nan,
            }
            if base is not None:
                others = _samples(base, title, filter_)
                asked, before = ([sample["prompt_hash"] for sample in each] for each in (own, others))
                assert asked == before, f"{title} was asked the same of all caches"
                base_score = float(base["results"][title][key])
                row["difference"] = float(score) - base_score
                both = [[sample.get(metric) for sample in each] for each in (own, others)]
                if _is_mean(score, both[0]) and _is_mean(base_score, both[1]):
                    row["low"], row["high"] = paired_interval(*both)
            rows.append(row)
    return rows


def _samples(results: Mapping[str, Any], title: str, filter_: str) -> list[Mapping[str, Any]]:
    """Those of one task and filter, in the order of the task's documents."""
    own = [sample for sample in results["samples"][title] if sample["filter"] == filter_]
    return sorted(own, key=lambda sample: int(sample["doc_id"]))


def _is_mean(score: float, values: Sequence[Any]) -> bool:
    """Whether a score is the mean of its samples' values: others, as perplexity, have no paired interval here."""
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return len(numbers) == len(values) > 0 and math.isclose(math.fsum(numbers) / len(numbers), score, abs_tol=1e-9)


def paired_interval(values: Sequence[Any], base: Sequence[Any]) -> tuple[float, float]:
    """95 % interval of the mean difference of samples' scores, each paired with itself; NaN where none differs."""
    differences = [float(own) - float(other) for own, other in zip(values, base, strict=True)]
    interval = t_interval(differences)
    if interval is None or not any(differences):
        return math.nan, math.nan
    return interval


def write_task_scores(folder: Path, told: TaskScores) -> None:
    """Write the tables, what made them, and the page; `tasks.json` comes last."""
    write_text(folder / run_files.TASKS, told.scores.to_csv(index=False))
    write_text(folder / run_files.AGREEMENT, told.agreement.to_csv(index=False))
    header, rows = side_by_side(told)
    about = told.about
    words = [
        "# Task scores",
        "",
        f"{about['model']}, lm-evaluation-harness {about['harness']}; every token read through the cache in chunks of "
        f"{about['chunk']} (protocol stream), {about['samples'] or 'all'} samples a task.",
        "",
        markdown_table(header, rows),
        "",
        note_of(told),
        "",
        "`tasks.csv`:",
        *(f"- `{name}`: {text}" for name, text in TASK_COLUMNS.items()),
        "",
        "`agreement.csv`:",
        *(f"- `{name}`: {text}" for name, text in AGREEMENT_COLUMNS.items() if name not in DIVERGENCE_COLUMNS),
        "",
    ]
    write_text(folder / PAGE_FILE, "\n".join(words))
    write_json(folder / run_files.TASKS_ABOUT, dict(about))


def note_of(told: TaskScores) -> str:
    """What a reader of the table must know."""
    note = (
        "Of each cache the score, and in parentheses its difference from the base; * where the 95 % interval of the "
        "paired difference leaves out 0. Where the base scores nothing, nothing can be lost."
    )
    if told.agreement.empty:
        return note
    return note + (
        " A needle that is found says little: so below stand how far the caches' predictions are from the base's on "
        "report text (Mean KLD in nats a token, Same top p: share of tokens with the same likeliest continuation), and "
        "how much of a text they write alike by themselves."
    )


def read_task_scores(folder: Path) -> TaskScores | None:
    """What was written there; None where nothing was."""
    if not (folder / run_files.TASKS_ABOUT).is_file():
        return None
    scores, agreement = (pd.read_csv(folder / name) for name in (run_files.TASKS, run_files.AGREEMENT))
    return TaskScores(scores, agreement, read_json(folder / run_files.TASKS_ABOUT))


def side_by_side(told: TaskScores) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one table: a task or a figure a row, a cache a column."""
    scores, agreement = told.scores, told.agreement
    caches = list(dict.fromkeys(scores["cache"]))
    rows = []
    for _, own in scores.groupby(["task", "length", "metric"], dropna=False, sort=False):
        by_cache = {row["cache"]: row for _, row in own.iterrows()}
        rows.append([row_name(own.iloc[0]), *(format_score(by_cache.get(cache)) for cache in caches)])
    measured = {row["cache"]: row for _, row in agreement.iterrows()}
    figures = {
        "perplexity, % more": lambda row: format_number(row["delta_percent"], "+.2f"),
        "Mean KLD": lambda row: format_divergence(row, "kl"),
        "Same top p": lambda row: format_divergence(row, "top1"),
        "written alike": lambda row: format_number(row["equal_percent"], ".1f") + " %",
        "cache ratio": lambda row: format_number(row["cache_ratio"], ".2f"),
    }
    for name, form in figures.items() if measured else ():
        rows.append([name, *(form(measured[cache]) if cache in measured else "" for cache in caches)])
    return ["", *caches], rows


def row_name(row: Any) -> str:
    """`ruler_vt 2048`; of tasks without a length `arc_easy, acc`."""
    if pd.isna(row["length"]):
        return f"{row['task']}, {row['metric']}"
    return f"{row['task']} {row['length']:.0f}"


def format_score(row: Any) -> str:
    """`0.580 (-0.040*)`; of the base `0.620 ± 0.069`."""
    if row is None:
        return "-"
    if row["cache"] == BASE:
        return f"{row['score']:.3f} ± {format_number(row['stderr'], '.3f')}"
    sure = not pd.isna(row["low"]) and (row["low"] > 0 or row["high"] < 0)
    return f"{row['score']:.3f} ({row['difference']:+.3f}{'*' if sure else ''})"


def task_scores_table(told: TaskScores) -> Table:
    """The same for a terminal."""
    header, rows = side_by_side(told)
    return plain_table("Task scores", header, rows)
