"""The sweep's figure: each layer's cost."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure


def draw_costs(sweep: pd.DataFrame, selection: dict[str, Any] | None, title: str, path: Path) -> None:
    """Cost by layer with 95 % intervals, the chosen layers marked; outliers are cut off and written."""
    budget = selection["budget_points"] if selection else 0.0
    chosen = set(selection["selected_layers"]) if selection else set()
    top = 3 * max(budget, float(sweep["delta_ppl"].quantile(0.75)), 0.01)
    figure = Figure(figsize=(max(6.4, 0.16 * len(sweep) + 3), 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for picked, colour, label in ((False, "#8a8f98", "not chosen"), (True, "#c2410c", "chosen")):
        rows = sweep[sweep["layer"].isin(chosen) == picked]
        inside = rows[rows["delta_ppl"] <= top]
        if not inside.empty:
            cost = inside["delta_ppl"]
            spread = [cost - inside["delta_ppl_low"], inside["delta_ppl_high"] - cost]
            axes.errorbar(
                inside["layer"],
                cost,
                yerr=spread if inside["delta_ppl_low"].notna().all() else None,
                fmt="o",
                color=colour,
                markersize=5,
                elinewidth=1.2,
                capsize=2.5,
                label=label if selection else "cost",
            )
        above = rows[rows["delta_ppl"] > top]
        for layer, cost in zip(above["layer"].tolist(), above["delta_ppl"].tolist(), strict=True):
            axes.plot(layer, top * 0.97, "^", color=colour, markersize=6)
            axes.annotate(f"{cost:+.3g}", (layer, top * 0.93), ha="center", va="top", fontsize=7)
    axes.axhline(0, color="black", linewidth=0.6)
    if selection:
        axes.axhline(budget, color="#1d4ed8", linewidth=0.9, linestyle="--", label="budget of the whole set")
    if (sweep["delta_ppl"] > top).any() or (sweep["delta_ppl_high"] > top).any():
        axes.set_ylim(top=top)
    axes.set_xlabel("layer")
    axes.set_ylabel("perplexity cost, points (95 % interval)")
    axes.set_title(title.replace(", protocol", "\nprotocol"), fontsize=9, loc="left")
    axes.legend(fontsize=8)
    axes.grid(axis="y", linewidth=0.3)
    figure.savefig(path, format="png")
