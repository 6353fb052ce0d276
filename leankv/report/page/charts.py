"""The page's charts, as plotly has them. Text and grid take the page's colours, so light and dark both read well."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from leankv.report.columns import on_report_text
from leankv.report.page.contents import Chosen, RunContents
from leankv.report.tables import format_budget
from leankv.report.task_scores import TaskScores, row_name

LEAST_PERCENT = 0.01  # costs below, and those that are none, stand at this end of logarithmic axes

POINTS = 64
"""Components of a spectrum that are drawn, evenly on a logarithmic axis."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#999933")
"""Told apart by most eyes, and seen on white and on black (after Okabe and Ito, 2008)."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x")


def layer_costs(sweep: pd.DataFrame) -> go.Figure:
    """Cost of compressing each layer alone, with its 95 % interval."""
    percent = 100 / sweep["base_ppl"]
    cost = sweep["delta_ppl"] * percent
    low, high = (cost - sweep["delta_ppl_low"] * percent), (sweep["delta_ppl_high"] * percent - cost)
    figure = go.Figure(
        go.Bar(
            x=sweep["layer"],
            y=cost,
            error_y={"type": "data", "array": high, "arrayminus": low, "thickness": 1, "color": "#8c8c8c"},
            marker_color=COLOURS[0],
            customdata=sweep[["codec_k", "codec_v", "tokens"]],
            hovertemplate="layer %{x}<br>%{y:+.3f} %<br>K %{customdata[0]}, V %{customdata[1]}<br>"
            "%{customdata[2]} tokens<extra></extra>",
        )
    )
    return _titled(figure, "layer", "rise of perplexity, %")


def rate_map(table: pd.DataFrame) -> go.Figure:
    """What each site costs under each codec: a panel for keys, one for values."""
    bits = (table["bits_per_token"] / table["width"]).groupby(table["codec"]).mean().sort_values(kind="stable")
    layers = sorted(table["layer"].unique())
    cost = 100 * table["delta_ppl"] / table["base_ppl"]
    shown = table.assign(cost=cost, fvu_percent=100 * table["fvu"])
    figure = go.Figure()
    for number, part in enumerate(("k", "v")):
        own = shown[shown["part"] == part].pivot_table(index="layer", columns="codec", values="cost", dropna=False)
        own = own.reindex(index=layers, columns=bits.index)
        fvu = shown[shown["part"] == part].pivot_table(index="layer", columns="codec", values="fvu_percent")
        fvu = fvu.reindex(index=layers, columns=bits.index)
        figure.add_heatmap(
            x=[f"{codec}" for codec in bits.index],
            y=layers,
            z=np.log10(own.clip(lower=LEAST_PERCENT)),
            zmin=-2,
            zmax=2,
            customdata=_stacked(own, fvu),
            colorscale="YlOrBr",
            showscale=number == 1,
            colorbar={"tickvals": [-2, -1, 0, 1, 2], "ticktext": ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"]},
            hovertemplate=f"{part.upper()} of layer %{{y}}, %{{x}}<br>cost %{{customdata[0]:+.3f}} %<br>"
            "variance unexplained %{customdata[1]:.2f} %<extra></extra>",
            xaxis=f"x{number + 1}",
            yaxis=f"y{number + 1}",
        )
    figure.update_layout(
        grid={"rows": 1, "columns": 2, "pattern": "independent"},
        xaxis={"title": {"text": "keys"}},
        xaxis2={"title": {"text": "values"}},
        yaxis={"title": {"text": "layer"}, "autorange": "reversed"},
        yaxis2={"autorange": "reversed", "showticklabels": False},
        height=160 + 18 * len(layers),
    )
    return figure


def spectra(table: pd.DataFrame) -> go.Figure:
    """How variance falls over the principal components of each site's vectors: a panel for keys, one for values."""
    figure = go.Figure()
    layers = sorted(table["layer"].unique())
    colours = sample_colorscale("Viridis", np.linspace(0, 1, max(len(layers), 2)))
    for number, part in enumerate(("k", "v")):
        for place, layer in enumerate(layers):
            own = table[(table["part"] == part) & (table["layer"] == layer)]
            share = 100 * own["variance"] / own["variance"].sum()
            shown = np.unique(np.geomspace(1, len(own), POINTS).round().astype(int)) - 1
            figure.add_scatter(
                x=own["component"].iloc[shown],
                y=share.iloc[shown],
                customdata=share.cumsum().iloc[shown],
                mode="lines",
                line={"color": colours[place], "width": 1},
                showlegend=False,
                hovertemplate=f"{part.upper()} of layer {layer}, component %{{x}}<br>%{{y:.3g}} % of the variance<br>"
                "%{customdata:.1f} % with those before<extra></extra>",
                xaxis=f"x{number + 1}",
                yaxis=f"y{number + 1}",
            )
    axis = {"type": "log", "range": [-3, 2]}
    figure.update_layout(
        grid={"rows": 1, "columns": 2, "pattern": "independent"},
        xaxis={"title": {"text": "keys: component"}, "type": "log"},
        xaxis2={"title": {"text": "values: component"}, "type": "log"},
        yaxis={"title": {"text": "share of the variance, %"}, **axis},
        yaxis2={"showticklabels": False, **axis},
        height=420,
    )
    return figure


def frontier(runs: Sequence[RunContents]) -> go.Figure:
    """Cost on report text against what is saved: what was selected, and the caches of comparisons."""
    figure = go.Figure()
    number = 0
    for run in runs:
        if run.compare is not None:
            groups = on_report_text(run.compare).groupby(["method", "baseline"], sort=False, dropna=False)
            for (method, baseline), rows in groups:
                rows = rows.sort_values("cache_ratio")
                figure.add_scatter(
                    x=rows["cache_ratio"],
                    y=rows["delta_percent"].clip(lower=LEAST_PERCENT),
                    mode="lines+markers",
                    line={"color": "#8c8c8c", "dash": "dot", "width": 1},
                    marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8},
                    name=f"{method}{' (baseline)' if baseline else ''}",
                    customdata=rows[["spec", "protocol", "context", "delta_percent"]],
                    hovertemplate="%{customdata[0]}<br>%{customdata[1]}, %{customdata[2]} tokens<br>"
                    "ratio %{x:.2f}, cost %{customdata[3]:+.2f} %<extra></extra>",
                )
                number += 1
    for place, run in enumerate(run for run in runs if run.chosen):
        summaries = sorted((one.summary for one in run.chosen), key=lambda each: each.cache_ratio or 1)
        figure.add_scatter(
            x=[each.cache_ratio for each in summaries],
            y=[max(each.delta_percent, LEAST_PERCENT) for each in summaries],
            mode="lines+markers+text",
            text=[format_budget(each.budget) for each in summaries],
            textposition="top left",
            line={"color": COLOURS[place % len(COLOURS)], "width": 2},
            marker={
                "size": 13,
                "symbol": [
                    "circle" if (each.certificate or {}).get("certified") else "circle-open" for each in summaries
                ],
            },
            name=f"{run.name} (filled: certified)",
            customdata=[[each.codec, each.context, each.delta_percent] for each in summaries],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]} tokens<br>ratio %{x:.2f}, cost %{customdata[2]:+.2f} %"
            "<extra></extra>",
        )
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    titled = _titled(figure, "16-bit cache over what is held, sinks and window counted", "rise of perplexity, %")
    return titled.update_layout(height=560)


def task_scores(told: TaskScores) -> go.Figure:
    """Each cache's score in each task, with twice the harness's standard error."""
    figure = go.Figure()
    names = list(dict.fromkeys(row_name(row) for _, row in told.scores.iterrows()))
    for number, (cache, own) in enumerate(told.scores.groupby("cache", sort=False)):
        figure.add_bar(
            x=[row_name(row) for _, row in own.iterrows()],
            y=own["score"],
            error_y={"type": "data", "array": 2 * own["stderr"], "thickness": 1, "color": "#8c8c8c"},
            marker_color=COLOURS[number % len(COLOURS)],
            name=str(cache),
            customdata=own[["metric", "samples", "difference"]],
            hovertemplate="%{x}: %{customdata[0]} %{y:.3f}<br>%{customdata[1]} samples<br>"
            "less the base %{customdata[2]:+.3f}",
        )
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.3}, xaxis={"categoryarray": names})
    return _titled(figure, "", "score")


def search_steps(chosen: Chosen) -> go.Figure:
    """Every plan that a search measured."""
    figure = go.Figure()
    for number, strategy in enumerate(dict.fromkeys(step["strategy"] for step in chosen.steps)):
        own = [step for step in chosen.steps if step["strategy"] == strategy]
        figure.add_scatter(
            x=[step["ratio"] for step in own],
            y=[max(step["percent"], LEAST_PERCENT) for step in own],
            mode="markers",
            marker={"size": 9, "color": COLOURS[number % len(COLOURS)], "symbol": SYMBOLS[number % len(SYMBOLS)]},
            name=strategy,
            customdata=[[step["what"], step["percent"], place] for place, step in enumerate(own, start=1)],
            hovertemplate="%{customdata[0]}<br>step %{customdata[2]}: ratio %{x:.2f}, cost %{customdata[1]:+.2f} %"
            "<extra></extra>",
        )
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    kind = chosen.summary.minimize or ""
    return _titled(figure, f"16-bit cache over {kind} bytes, as codecs claim", "cost on selection text, %")


def _titled(figure: go.Figure, x: str, y: str) -> go.Figure:
    return figure.update_layout(xaxis_title=x, yaxis_title=y, height=420)


def _stacked(*tables: pd.DataFrame) -> list[list[list[Any]]]:
    """Tables of one shape as one, each cell a list."""
    rows = zip(*(table.to_numpy().tolist() for table in tables), strict=True)
    return [[list(cell) for cell in zip(*row, strict=True)] for row in rows]
