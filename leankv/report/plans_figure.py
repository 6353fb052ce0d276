"""The figure of searched plans: cost against bytes, every measured plan a dot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

MARKS = {"waterfill": "o", "refine": "^", "evolve": "s"}


def draw_plans(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each kind of bytes that was made few; a colour for each budget, a mark for each strategy."""
    kinds = list(dict.fromkeys(entry["minimize"] for entry in entries))
    budgets = list(dict.fromkeys(entry["budget"] for entry in entries))
    figure = Figure(figsize=(7.5 * len(kinds), 5), dpi=150, layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        own = [entry for entry in entries if entry["minimize"] == kind]
        for entry in own:
            colour = colormaps["viridis"](0.1 + 0.75 * budgets.index(entry["budget"]) / max(1, len(budgets) - 1))
            _draw_search(axes, entry, colour)
        if any(step["percent"] > 0 for entry in own for step in entry["steps"]):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # costs of one search span a decade or less
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=8, which="both")
        axes.grid(linewidth=0.3, which="both")
        axes.set_xlabel(f"16-bit cache over {kind} bytes, as codecs claim, sinks and window counted")
        axes.set_ylabel("rise of perplexity on selection text, %")
        if axes.get_legend_handles_labels()[0]:  # there are none where every plan costs less than nothing
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, format="png")


def _draw_search(axes: Any, entry: Mapping[str, Any], colour: Any) -> None:
    steps = [step for step in entry["steps"] if step["percent"] > 0]
    for strategy in dict.fromkeys(step["strategy"] for step in steps):
        own = [step for step in steps if step["strategy"] == strategy]
        axes.scatter(
            [step["ratio"] for step in own],
            [step["percent"] for step in own],
            s=16,
            color=colour,
            marker=MARKS.get(strategy, "."),
            alpha=0.6,
            label=f"{strategy}, budget +{entry['budget']}",
        )
    best: list[Mapping[str, Any]] = []
    for step in sorted(steps, key=lambda each: each["percent"]):
        if not best or step["ratio"] > best[-1]["ratio"]:
            best.append(step)
    axes.plot([step["ratio"] for step in best], [step["percent"] for step in best], color=colour, linewidth=1)
