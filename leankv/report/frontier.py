"""Several runs in one table and one figure: searched plans, controls, and the caches of comparisons beside them.

Reads files only: `plans.json` of a search, `summary.json` of a selection by layers, `compare.csv` of a comparison.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from leankv.report import run_files
from leankv.report.columns import on_report_text, read_compare
from leankv.report.plans import plans_frame, read_entries
from leankv.report.tables import format_budget, format_certified, format_number, markdown_table
from leankv.storage.files import write_atomically, write_text

TABLE, TEXT, FIGURE = "plans.csv", "plans.md", "figures/frontier.png"

PANELS = {"cache_ratio": "16-bit cache over what is held", "stored_ratio": "16-bit cache over what is stored"}

LEAST_PERCENT = 0.1  # costs below, and those that are none, stand at this end of the logarithmic axis

MARKS = "os^DvP*X<>hd"


def write_together(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Write `plans.csv` (a row a selection), `plans.md` and the figure of the selections among some runs.

    Args:
        runs: folders of runs. Caches of comparisons on report text are drawn beside; maps, task scores, unfinished runs
            play no part.
        folder: what is written goes there.

    Returns:
        What was written: nothing where no run is a finished selection.
    """
    selections = [run for run in runs if _is_selection(run)]
    caches = [read_compare(run) for run in runs if run not in selections and (run / run_files.COMPARE).is_file()]
    caches = [table for table in (on_report_text(table) for table in caches) if len(table)]
    if not selections:
        return []
    plans = pd.concat([_plans_of(run) for run in selections], ignore_index=True)
    write_text(folder / TABLE, plans.to_csv(index=False))
    write_text(folder / TEXT, plans_markdown(plans))
    write_atomically(folder / FIGURE, lambda path: draw_frontier(plans, caches, path))
    return [folder / name for name in (TABLE, TEXT, FIGURE)]


def _is_selection(run: Path) -> bool:
    return (run / run_files.PLANS).is_file() or (run / run_files.SUMMARY).is_file()


def _plans_of(run: Path) -> pd.DataFrame:
    own = plans_frame(read_entries(run))
    own.insert(0, "run", run.name)
    return own


def plans_markdown(plans: pd.DataFrame) -> str:
    """The table for people."""
    header = ["run", "codecs", "protocol", "budget", "cost on report text (95 %)", "certified", "code ratio live"]
    header += ["stored", "cache ratio", "stored", "all-in", "codecs MB", "Mean KLD", "Same top p"]
    rows = []
    for _, row in plans.iterrows():
        interval = f" ({row.low:+.2f} to {row.high:+.2f})" if pd.notna(row.low) else ""
        rows.append(
            [
                row.run,
                f"`{row.codec}`",
                f"{row.protocol}, {row.sinks} sinks, window {row.window}, {row.block_length} tokens",
                format_budget(str(row.budget)),
                f"{row.delta_percent:+.2f} %{interval}",
                format_certified(row),
                *(format_number(row[name], ".1f") for name in ("live", "stored", "cache_ratio", "stored_ratio")),
                format_number(row.all_in_ratio, ".2f"),
                f"{row.codec_bytes_memory / 1e6:.1f}",
                f"{row.kl:.4f}",
                f"{row.top1:.1f} %",
            ]
        )
    return "\n\n".join(["# Plans", markdown_table(header, rows), ""])


def draw_frontier(plans: pd.DataFrame, comparisons: Sequence[pd.DataFrame], path: Path) -> None:
    """Cost on report text against what is saved: selections coloured, filled where certified; other caches grey."""
    figure = Figure(figsize=(13, 5.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (column, label) in zip(panels, PANELS.items(), strict=True):
        _draw_comparisons(axes, comparisons, column)
        _draw_selections(axes, plans, column)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(linewidth=0.3, which="both")
        axes.tick_params(labelsize=8)
        axes.set_xlabel(f"{label}, sinks and window counted", fontsize=9)
    panels[0].set_ylabel(f"rise of perplexity on report text, % (at the foot: {LEAST_PERCENT:g} or less)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format="png")


def _draw_comparisons(axes: Any, comparisons: Sequence[pd.DataFrame], column: str) -> None:
    number = 0
    for table in comparisons:
        for (method, baseline), rows in table.groupby(["method", "baseline"], sort=False):
            rows = rows.sort_values(column)
            axes.plot(
                rows[column],
                rows["delta_percent"].clip(LEAST_PERCENT),
                color="0.45",
                marker=MARKS[number % len(MARKS)],
                markersize=5,
                markerfacecolor="white" if baseline else "0.75",
                linestyle=":",
                linewidth=0.9,
                label=_label(str(method), str(baseline)),
            )
            number += 1


def _label(method: str, baseline: str) -> str:
    if baseline:
        return f"{method} (baseline)"
    return "plans, their codecs fitted anew" if method == "plan" else f"{method}, one rate everywhere"


def _draw_selections(axes: Any, plans: pd.DataFrame, column: str) -> None:
    names = plans["run"] + ", " + plans["protocol"]
    runs = list(names.unique())
    for number, name in enumerate(runs):
        rows = plans[names == name].sort_values(column)
        colour = colormaps["turbo"](0.08 + 0.84 * number / max(1, len(runs) - 1))
        heights = rows["delta_percent"].clip(LEAST_PERCENT)
        low, high = ((rows[end].fillna(rows["delta_percent"])).clip(LEAST_PERCENT) for end in ("low", "high"))
        spread = [(heights - low).clip(lower=0), (high - heights).clip(lower=0)]
        axes.errorbar(rows[column], heights, yerr=spread, color=colour, elinewidth=0.9, linewidth=1.3)
        filled = [colour if certified is True else "white" for certified in rows["certified"]]
        axes.scatter(rows[column], heights, s=52, color=filled, edgecolors=[colour], zorder=3)
        axes.scatter([], [], s=52, color=[colour], label=f"{name} (filled: certified)")
        for budget, ratio, height in zip(rows["budget"], rows[column], heights, strict=True):
            text = f"+{budget}" if str(budget).endswith("%") else f"+{budget} points"
            axes.annotate(text, (ratio, height), (6, 4), textcoords="offset points", fontsize=8, color=colour)
