"""The figure of a comparison: cost against what each cache saves."""

from pathlib import Path
from typing import Any

import pandas as pd

LOW, HIGH = 0.1, 300.0
"""Percent, the ends of the logarithmic axis of costs."""
PANELS = {
    "cache_ratio_4096": "cache ratio at 4,096 tokens (live, all counted)",
    "code_ratio_live": "code ratio, live",
    "code_ratio_stored": "code ratio, stored",
}
MARKS = "os^Dv<>pX*Phd"


def draw_comparison(table: pd.DataFrame, path: Path) -> None:
    """A panel a ratio; a line a method, through its rates. Ours in colour and filled, peers grey and hollow."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    ours = [method for method, rows in table.groupby("method", sort=False) if (rows["peer"] == "").all()]
    peers = [method for method in table["method"].unique() if method not in ours]
    figure = Figure(figsize=(13, 5.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (column, label) in zip(panels, PANELS.items(), strict=True):
        for number, method in enumerate([*ours, *peers]):
            rows = table[(table["method"] == method) & table[column].notna()].sort_values(column)
            _draw_method(axes, rows, column, method, _style(number, len(ours), method in ours))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(LOW * 0.85, HIGH * 1.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.3, which="both")
        axes.set_xlabel(label, fontsize=9)
    panels[0].set_ylabel(f"rise of perplexity, % (at the edges: beyond {LOW:g} to {HIGH:g})", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(7, len(labels)), fontsize=8.5, frameon=False)
    figure.savefig(path, format="png")


def _draw_method(axes: Any, rows: pd.DataFrame, column: str, method: str, style: dict[str, Any]) -> None:
    heights = rows["delta_percent"].clip(LOW, HIGH)
    spread = [
        heights - rows["low"].clip(LOW, HIGH).fillna(heights),
        rows["high"].clip(LOW, HIGH).fillna(heights) - heights,
    ]
    axes.errorbar(
        rows[column], heights, yerr=[one.clip(lower=0) for one in spread], label=method, elinewidth=0.7, **style
    )
    for spec, ratio, height in zip(rows["spec"], rows[column], heights, strict=True):
        axes.annotate(_rate(spec), (ratio, height), (3, 3), textcoords="offset points", fontsize=6)


def _rate(spec: str) -> str:
    """What tells a spec from others of its method: `4` of `int:4`, `s0.03` of `resid(share:-2,transform:s0.03)`."""
    return spec.rstrip(")").rpartition(":")[2]


def _style(number: int, count: int, ours: bool) -> dict[str, Any]:
    """Told apart by colour, and without it by marks."""
    from matplotlib import colormaps

    colour = colormaps["turbo"](0.05 + 0.9 * number / max(1, count - 1)) if ours else "0.35"
    return {
        "color": colour,
        "marker": MARKS[number % len(MARKS)],
        "markersize": 5,
        "markerfacecolor": colour if ours else "white",
        "linestyle": "-" if ours else ":",
        "linewidth": 1.1,
    }
