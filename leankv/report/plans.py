"""Searched plans for people: `plans.csv`, `selection.md` and the frontier's figure. Reads `plans.json` only."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from leankv.report import run_files
from leankv.report.plans_figure import draw_plans
from leankv.report.selection import summary_rows
from leankv.report.summary import Summary, read_summary
from leankv.report.tables import format_budget, format_number, markdown_table, plain_table
from leankv.search.certificate import Certificate
from leankv.storage.files import read_json, write_atomically, write_text

FIGURE = "figures/plans.png"

PLANS_COLUMNS = (
    "codec",
    "budget",
    "strategy",
    "minimize",
    "refit",
    "protocol",
    "sinks",
    "window",
    "block_length",
    "live",
    "stored",
    "stored_ratio",
    "cache_ratio",
    "cache_ratio_4096",
    "all_in_ratio",
    "all_in_ratio_4096",
    "codec_bytes_memory",
    "base_ppl",
    "ppl",
    "delta_percent",
    "low",
    "high",
    "kl",
    "top1",
    "certified",
    "confidence",
    "documents",
    "evaluations",
    "seconds",
)
"""Of `plans.csv`: one row a selection. `live` and `stored` are code ratios of a real cache; `stored_ratio` counts
all that is serialized, sinks and window included, and `cache_ratio` all
that is held at `block_length` tokens, the context that the cost was measured at, and `cache_ratio_4096` is given where
that is 4,096. `delta_percent` with its 95 % interval, `kl` (nats a token) and `top1` (percent) are of report text;
`certified` says whether the budget was proved at `confidence` on `documents` certification documents. `evaluations` are
passes over all selection blocks, `seconds` those of search, long blocks and certification together, in the last process
that came to the end: what was found finished took it none. Fitting ladders comes before and is not among them."""

CONTEXT = 4096


def write_plans_report(folder: Path) -> None:
    """Render `plans.json`: the table, the path of every search, and the figure."""
    entries = read_json(folder / run_files.PLANS)
    write_text(folder / "plans.csv", plans_frame(entries).to_csv(index=False))
    write_text(folder / "selection.md", plans_markdown(entries))
    write_atomically(folder / FIGURE, lambda path: draw_plans(entries, path))


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """The selections of a run: those of searches, as `plans.json` has them, and of layers, of which there is a summary.

    The last one made stands in `summary.json`: where it is none of the searches', it comes first.
    """
    path, last = folder / run_files.PLANS, folder / run_files.SUMMARY
    entries: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    if last.is_file():
        summary = read_summary(folder).to_json()
        if all(Summary.from_json(entry["summary"]).to_json() != summary for entry in entries):
            entries = [{"summary": summary}, *entries]
    return entries


def plans_frame(entries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """`plans.csv` as a table, as `PLANS_COLUMNS` describes it."""
    return pd.DataFrame([_row(entry) for entry in entries], columns=list(PLANS_COLUMNS))


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    summary = Summary.from_json(entry["summary"])
    low, high = summary.delta_ppl_interval or (None, None)
    certificate = summary.certificate or {}
    is_4096 = summary.context == CONTEXT
    return {
        "codec": summary.codec,
        "budget": summary.budget,
        "strategy": summary.strategy,
        "minimize": summary.minimize,
        "refit": summary.refit,
        "protocol": summary.protocol,
        "sinks": summary.sinks,
        "window": summary.window,
        "block_length": summary.context,
        "live": summary.code_ratio,
        "stored": summary.code_ratio_stored,
        "stored_ratio": summary.stored_ratio,
        "cache_ratio": summary.cache_ratio,
        "cache_ratio_4096": summary.cache_ratio if is_4096 else None,
        "all_in_ratio": summary.all_in_ratio,
        "all_in_ratio_4096": summary.all_in_ratio if is_4096 else None,
        "codec_bytes_memory": summary.codec_bytes_memory,
        "base_ppl": summary.base_ppl,
        "ppl": summary.ppl,
        "delta_percent": summary.delta_percent,
        "low": None if low is None else 100 * low / summary.base_ppl,
        "high": None if high is None else 100 * high / summary.base_ppl,
        "kl": summary.divergence["kl"],
        "top1": summary.divergence["top1"],
        "certified": certificate.get("certified"),
        "confidence": certificate.get("confidence"),
        "documents": certificate.get("documents"),
        "evaluations": summary.evaluations,
        "seconds": sum(seconds for name, seconds in summary.seconds.items() if name != "report"),
    }


def plans_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The selections in short, for a terminal of 100 columns."""
    header = ["budget", "cost (report)", "certified", "live", "stored", "cache ratio", "all-in", "codecs MB", "top-1"]
    rows = []
    for _, row in plans_frame(entries).iterrows():
        rows.append(
            [
                format_budget(row.budget),
                f"{row.delta_percent:+.2f} %",
                f"{row.documents:.0f} documents" if row.certified else "no",  # nothing longer fits
                *(format_number(row[name], ".1f") for name in ("live", "stored", "cache_ratio", "all_in_ratio")),
                f"{row.codec_bytes_memory / 1e6:.1f}",
                f"{row.top1:.1f} %",
            ]
        )
    return plain_table("Plans", header, rows)


def plans_markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """Each selection: its result, its candidates for certification, and the path of its search."""
    parts = ["# Selection"]
    for entry in entries:
        summary = Summary.from_json(entry["summary"])
        bytes_ = f", fewest bytes {summary.minimize}" if summary.minimize else ""
        parts.append(f"## Budget {format_budget(summary.budget)}, {summary.strategy}{bytes_}, {summary.protocol}")
        parts.append(markdown_table(["", ""], [[name, value] for name, value in summary_rows(summary)]))
        parts += ["### Candidates, from safe to bold", markdown_table(*_candidate_rows(entry))]
        parts += ["### Path of the search", markdown_table(*_step_rows(entry))]
    return "\n\n".join([*parts, ""])


def _candidate_rows(entry: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            f"{each['ratio']:.1f}",
            f"{each['cost_percent']:+.2f} %",
            str(each["window"]),
            "not tested" if each["certificate"] is None else Certificate.from_json(each["certificate"]).sentence(),
        ]
        for each in entry["candidates"]
    ]
    return ["ratio", "cost on selection text", "window", "certification"], rows


def _step_rows(entry: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            step["strategy"],
            step["what"],
            f"{step['ratio']:.2f}",
            "-" if step["predicted"] is None else f"{100 * math.expm1(step['predicted']):+.2f} %",
            f"{step['percent']:+.2f} %",
            f"{step['evaluations']:.1f}",
        ]
        for step in entry["steps"]
    ]
    return ["strategy", "step", "ratio", "predicted", "measured", "evaluations"], rows
