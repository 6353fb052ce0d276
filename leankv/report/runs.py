"""Finished runs side by side: what each chose, what it costs, what it saves, and what it says. Reads files only."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from leankv.report import run_files
from leankv.report.summary import read_summary
from leankv.report.tables import (
    format_budget,
    format_certified,
    format_interval,
    format_number,
    format_protocol,
    format_ratio,
    text_table,
)
from leankv.storage.files import read_json


def runs_rows(folders: Sequence[Path]) -> list[list[str]]:
    """Name of a figure, and its text for each run.

    Raises:
        UserError: a folder holds no finished selection.
    """
    summaries = [read_summary(folder) for folder in folders]
    rows: list[list[str]] = [["", *(folder.name for folder in folders)]]

    def add(name: str, texts: Sequence[str]) -> None:
        rows.append([name, *texts])

    add("codecs", [s.codec for s in summaries])
    add("protocol", [format_protocol(s.protocol, s.sinks, s.window) for s in summaries])
    add("budget", [format_budget(s.budget) for s in summaries])
    add("text", [f"{s.dataset}, {s.tokens} tokens" for s in summaries])
    add("joint cost", [f"{s.delta_percent:+.2f} %, {s.delta_ppl:+.2f} points" for s in summaries])
    add("95 % interval, points", [format_interval(s.delta_ppl_interval) for s in summaries])
    add("budget on report text", ["kept" if s.within_budget else "exceeded" for s in summaries])
    add("certified", [format_certified(s.certificate) for s in summaries])
    add("Same top p", [f"{format_number(s.divergence['top1'], '.1f')} %" for s in summaries])
    add("cache ratio", [f"{format_ratio(s.cache_ratio)} at {s.context} tokens" for s in summaries])
    add("stored", [format_ratio(s.stored_ratio) for s in summaries])
    add("all-in ratio", [format_ratio(s.all_in_ratio) for s in summaries])
    add("cache held", [f"{s.held_bytes / 1e6:.2f} of {s.base_bytes / 1e6:.2f} MB" for s in summaries])
    add("codecs in memory", [f"{s.codec_bytes_memory / 1e6:.2f} MB" for s in summaries])
    completions = [_completion(folder) for folder in folders]
    add("it says", completions)
    return rows


def runs_table(folders: Sequence[Path]) -> Table:
    """The rows, for a terminal.

    Raises:
        UserError: as `runs_rows`.
    """
    header, *rows = runs_rows(folders)
    return text_table("Runs side by side", header, rows)


def _completion(folder: Path) -> str:
    path = folder / run_files.COMPLETION
    if not path.is_file():
        return "-"
    completion = read_json(path)
    return f"{completion['prompt']}{completion['text']}"
