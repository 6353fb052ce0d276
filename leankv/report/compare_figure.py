"""The figure of a comparison: cost against what each cache saves."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

LOW, HIGH = 0.1, 300.0
"""Percent, the ends of the logarithmic axis of costs."""

PANELS = {
    "all_in_ratio": "all-in ratio at {context:,} tokens",
    "cache_ratio": "cache ratio at {context:,} tokens",
    "code_ratio_live": "code ratio, live",
    "code_ratio_stored": "code ratio, stored",
}

MARKS = "os^Dv<>pX*Phd"


def draw_comparison(table: pd.DataFrame, title: str, path: Path) -> None:
    """A panel a ratio; a line a method and window, through its rates. Ours coloured and filled, baselines grey."""
    is_ours = table["baseline"] == ""
    # Where there is one window, the title says which.
    several = table.loc[is_ours, "window"].nunique() > 1
    windows = table["window"].map("{:.0f}".format).where(is_ours & several, "")
    lines = table["method"] + windows.map(lambda window: f", window {window}" if window else "")
    ours = list(lines[is_ours].unique())
    names = [*ours, *lines[~is_ours].unique()]
    figure = Figure(figsize=(16, 5.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (column, label) in zip(panels, PANELS.items(), strict=True):
        for number, name in enumerate(names):
            rows = table[(lines == name) & (is_ours == (number < len(ours))) & table[column].notna()]
            style = _style(number, len(ours), number < len(ours))
            _draw_method(axes, rows.sort_values(column), column, name, style)
        known = table[column].dropna()
        axes.set_xscale("log")
        if len(known):
            axes.set_xlim(known.min() / 1.25, known.max() * 1.4)  # one value alone has no width; labels stand right
        axes.set_yscale("log")
        axes.set_ylim(LOW * 0.85, HIGH * 1.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.3, which="both")
        axes.set_xlabel(label.format(context=table["context"].iloc[0]), fontsize=9)
    panels[0].set_ylabel(f"rise of perplexity, % (at the edges: beyond {LOW:g} to {HIGH:g})", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)), fontsize=8.5, frameon=False)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
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
    """What tells a spec from others of its method: `4` of `int:4`, `s0.03` of `resid(share:-2,transform:s0.03)`.

    Of a plan's file, its name alone.
    """
    if spec.endswith(".json"):
        return Path(spec).stem
    return spec.rstrip(")").rpartition(":")[2]


def _style(number: int, count: int, ours: bool) -> dict[str, Any]:
    """Told apart by colour, and without it by marks."""
    colour = colormaps["turbo"](0.05 + 0.9 * number / max(1, count - 1)) if ours else "0.35"
    return {
        "color": colour,
        "marker": MARKS[number % len(MARKS)],
        "markersize": 5,
        "markerfacecolor": colour if ours else "white",
        "linestyle": "-" if ours else ":",
        "linewidth": 1.1,
    }
