"""The figures of a map, from its table. Dark means costly or far off, in colour and in grey alike."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from leankv.config.plan_table import PARTS
from leankv.storage.files import write_atomically

HEAT, COSTS, ERRORS, BOUND = "map_heat.png", "map_curves.png", "map_error_curves.png", "map_bound.png"

NAMES = {"k": "K", "v": "V"}

STYLES = {"k": ("#b45309", "-", "o"), "v": ("#1d4ed8", "--", "s")}

SHOWN = {
    # Quantity: the ends of its logarithmic colours and axes, and its name.
    "cost_percent": (0.01, 100.0, "perplexity cost, % of base"),
    "fvu_percent": (0.1, 100.0, "variance unexplained (FVU), %"),
}

NUMBERED_COLUMNS = 14  # with more codecs than that, numbers no longer fit the cells

PANEL_COLUMNS = 6


def write_figures(table: pd.DataFrame, folder: Path) -> None:
    """Draw the heat map, the curves and the distances; figures that have nothing to show are removed."""
    table = table.assign(
        rate=table["bits_per_token"] / table["width"],
        cost_percent=100 * table["delta_ppl"] / table["base_ppl"],
        fvu_percent=100 * table["fvu"],
    )
    measured = table["measured"] == "perplexity"
    write_atomically(folder / HEAT, lambda path: draw_heat(table, path))
    write_atomically(folder / BOUND, lambda path: draw_bound(table, path))
    if measured.any():
        write_atomically(folder / COSTS, lambda path: draw_curves(table[measured], "cost_percent", path))
    else:
        (folder / COSTS).unlink(missing_ok=True)
    if not measured.all():
        write_atomically(folder / ERRORS, lambda path: draw_curves(table[~measured], "fvu_percent", path))
    else:
        (folder / ERRORS).unlink(missing_ok=True)


def codecs_by_bits(table: pd.DataFrame) -> list[str]:
    """The codecs of a map in order of their mean live bits a value."""
    bits = (table["bits_per_token"] / table["width"]).groupby(table["codec"]).mean()
    return [str(codec) for codec in bits.sort_values(kind="stable").index]


# -- the heat map ---------------------------------------------------------------------------------------------------


def draw_heat(table: pd.DataFrame, path: Path) -> None:
    """A row a layer, a column a codec in order of bits, K and V side by side; a number in each cell where it fits."""
    layers, codecs = sorted(table["layer"].unique()), codecs_by_bits(table)
    measured = table[table["measured"] == "perplexity"]
    scales = [
        ("cost_percent", measured, "YlOrBr", ""),
        ("fvu_percent", table.drop(measured.index), "Greens", "\n(cost not measured)"),
    ]
    wide = max(3.0, 0.46 * len(codecs))
    size = (2 * wide + 2.2, max(4.8, 0.21 * len(layers) + 2.1))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for values, rows, colours, remark in scales:
        if rows.empty:
            continue
        low, high, label = SHOWN[values]
        norm = LogNorm(low, high)
        image: Any = None
        for axes, part in zip(both, PARTS, strict=True):
            grid = rows[rows["part"] == part].pivot(index="layer", columns="codec", values=values)
            grid = grid.reindex(index=layers, columns=codecs)
            image = axes.imshow(grid.clip(lower=low).to_numpy(float), norm=norm, cmap=colours, aspect="auto")
            if len(codecs) <= NUMBERED_COLUMNS:
                _write_numbers(axes, grid.to_numpy(float), norm)
        bar = figure.colorbar(image, ax=both, fraction=0.03, pad=0.015, extend="both", format="%g")
        bar.set_label(label + remark, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    rates = table.groupby("codec")["rate"].mean()
    unmeasured = set(layers) - set(measured["layer"])
    for axes, part in zip(both, PARTS, strict=True):
        axes.set_title(NAMES[part], fontsize=10)
        axes.set_xticks(range(len(codecs)), [f"{c}  ({rates[c]:.2f})" for c in codecs], rotation=55, ha="right")
        axes.set_yticks(range(len(layers)), [f"{n} (FVU)" if n in unmeasured else str(n) for n in layers])
        axes.tick_params(labelsize=7, length=2)
        axes.set_xlabel("codec (live bits a value)", fontsize=8)
    both[0].set_ylabel("layer", fontsize=8)
    figure.suptitle("Each layer's keys or values alone compressed, by codec", fontsize=10)
    figure.savefig(path, format="png")


def _write_numbers(axes: Any, grid: Any, norm: Any) -> None:
    for (row, column), value in _cells(grid):
        dark = norm(min(max(value, norm.vmin), norm.vmax)) > 0.6
        text = _short(value)
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")


def _cells(grid: Any) -> list[tuple[tuple[int, int], float]]:
    every = [((i, j), float(grid[i, j])) for i in range(grid.shape[0]) for j in range(grid.shape[1])]
    return [(at, value) for at, value in every if not math.isnan(value)]


def _short(value: float) -> str:
    """At most four or five characters: `0.02`, `3.1`, `74`, `8e3`."""
    size = abs(value)
    if size >= 999.5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    if 0 < size < 0.005:
        return "0.00"
    return f"{value:.2f}" if size < 0.995 else f"{value:.1f}" if size < 9.95 else f"{value:.0f}"


# -- curves ---------------------------------------------------------------------------------------------------------


def draw_curves(table: pd.DataFrame, values: str, path: Path) -> None:
    """A panel a layer: every codec as a mark, and a line through those that no cheaper one does better than.

    Args:
        table: with `rate` and the column `values`.
        values: a key of `SHOWN`.
        path: of the PNG.
    """
    low, high, label = SHOWN[values]
    layers = sorted(table["layer"].unique())
    columns = min(PANEL_COLUMNS, len(layers))
    lines = math.ceil(len(layers) / columns)
    figure = Figure(
        figsize=(max(6.4, 1.75 * columns + 1.2), max(3.4, 1.5 * lines + 1.1)), dpi=150, layout="constrained"
    )
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(panels.flat):
        if number >= len(layers):
            axes.set_visible(False)
            continue
        for part in PARTS:
            rows = table[(table["layer"] == layers[number]) & (table["part"] == part)].sort_values("rate")
            # What is below the axis (or a gain) stands at its foot: a logarithmic axis has no place for it.
            heights = rows[values].clip(low, high).tolist()
            colour, dashes, mark = STYLES[part]
            axes.plot(rows["rate"], heights, mark, color=colour, markersize=3, alpha=0.45, markeredgewidth=0)
            front = _front(rows["rate"].tolist(), heights)
            axes.plot(*zip(*front, strict=True), color=colour, linestyle=dashes, marker=mark, markersize=3, lw=1.1)
        axes.set_title(f"layer {layers[number]}", fontsize=7.5, pad=2)
        axes.set_xscale("symlog", base=2, linthresh=0.25)  # codecs of no bits have a place too
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(low * 0.8, high * 1.25)
        axes.tick_params(labelsize=6.5)
        axes.grid(linewidth=0.3)
        if number + columns >= len(layers):  # the lowest of its column
            axes.tick_params(labelbottom=True)
    handles = [
        Line2D([], [], color=c, linestyle=d, marker=m, markersize=4, label=f"{NAMES[part]}: best at so many bits")
        for part, (c, d, m) in STYLES.items()
    ]
    handles.append(
        Line2D([], [], color="grey", linestyle="", marker="o", markersize=4, alpha=0.5, label="other codecs")
    )
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.supxlabel(f"live bits a value (marks at the edge: beyond {low:g} to {high:g} %)", fontsize=9)
    figure.supylabel(label, fontsize=9)
    figure.savefig(path, format="png")


def _front(rates: Sequence[float], heights: Sequence[float]) -> list[tuple[float, float]]:
    """Of points in order of bits, those lower than all before them."""
    front: list[tuple[float, float]] = []
    for rate, height in zip(rates, heights, strict=True):
        if not front or height < front[-1][1]:
            front.append((rate, height))
    return front


# -- distance from the bound ----------------------------------------------------------------------------------------


def draw_bound(table: pd.DataFrame, path: Path) -> None:
    """Distance from the Gaussian bound over layers, a line a codec; above at live bits, below at stored bits."""
    codecs = codecs_by_bits(table)
    figure = Figure(figsize=(10.5, 6.6), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    columns = [("error_db_over_bound", "live bits"), ("stored_error_db_over_bound", "stored bits")]
    for line, (column, bits) in zip(panels, columns, strict=True):
        for axes, part in zip(line, PARTS, strict=True):
            for number, codec in enumerate(codecs):
                rows = table[(table["codec"] == codec) & (table["part"] == part)].sort_values("layer")
                axes.plot(rows["layer"], rows[column], label=codec, **_line_of(number, len(codecs)))
            axes.axhline(0, color="black", linewidth=0.8)
            axes.grid(axis="y", linewidth=0.3)
            axes.set_title(f"{NAMES[part]}, {bits}", fontsize=9)
            axes.tick_params(labelsize=7.5)
            axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, title="codec, by bits", title_fontsize=8)
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel("squared error over the Gaussian bound at the same bits, dB (0: the bound)", fontsize=9)
    figure.savefig(path, format="png")


def _line_of(number: int, count: int) -> dict[str, Any]:
    """Told apart by colour, and without it by dashes and marks."""
    return {
        "color": colormaps["viridis"](0.88 * number / max(1, count - 1)),
        "linestyle": ("-", "--", "-.", ":")[number % 4],
        "marker": "os^Dv<>P*X"[number % 10],
        "markersize": 3.5,
        "linewidth": 1,
    }
