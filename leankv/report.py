"""Tables and figures from result files. Reads files only: nothing here knows a model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from leankv.divergence_table import divergence_rows
from leankv.store import read_json, write_atomically, write_text
from leankv.sweep_table import read_sweep

STEP_WORDS = {
    "kept": "kept",
    "over budget": "left out",
    "over budget alone": "not tried",
}
FIGURE = "figures/cost_by_layer.png"


def write_sweep_report(folder: Path) -> None:
    """Render a finished sweep: `sweep.md` and the figure, nothing chosen in it."""
    sweep = read_sweep(folder)
    write_text(folder / "sweep.md", sweep_markdown(sweep))
    write_atomically(folder / FIGURE, lambda path: draw_costs(sweep, None, path))


def write_reports(folder: Path) -> None:
    """Render a finished run: `sweep.md`, `selection.md`, and the figure with the chosen layers marked."""
    sweep, selection = read_sweep(folder), read_json(folder / "selection.json")
    write_text(folder / "sweep.md", sweep_markdown(sweep))
    write_text(folder / "selection.md", selection_markdown(selection, read_json(folder / "summary.json")))
    write_atomically(folder / FIGURE, lambda path: draw_costs(sweep, selection, path))


# -- the sweep ------------------------------------------------------------------------------------------------------


def sweep_rows(sweep: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the sweep for people, in the order of `sweep`; `rank` 1 is the cheapest layer."""
    header = ["layer", "rank", "cost", "95 % interval", "FVU K", "FVU V", "bits/token"]
    ranks = sweep["delta_ppl"].rank(method="first").astype(int)
    rows = [
        [
            str(row.layer),
            str(rank),
            f"{row.delta_ppl:+.3f}",
            interval_text((row.delta_ppl_low, row.delta_ppl_high)),
            f"{row.fvu_k:.3f}",
            f"{row.fvu_v:.3f}",
            str(row.bits_per_token),
        ]
        for row, rank in zip(sweep.itertuples(), ranks, strict=True)
    ]
    if sweep["tokens"].nunique() > 1:  # screened: layers saw different numbers of blocks
        header.append("tokens")
        rows = [[*row, str(tokens)] for row, tokens in zip(rows, sweep["tokens"], strict=True)]
    if _is_predicted(sweep):
        header.append("predicted")
        rows = [[*row, f"{cost:+.3f}"] for row, cost in zip(rows, sweep["predicted_delta_ppl"], strict=True)]
    return header, rows


def _is_predicted(sweep: pd.DataFrame) -> bool:
    return "predicted_delta_ppl" in sweep and bool(sweep["predicted_delta_ppl"].notna().all())


def prediction_words(sweep: pd.DataFrame) -> str | None:
    """How well the predicted costs rank the measured ones; None where nothing was predicted."""
    if not _is_predicted(sweep) or len(sweep) < 3:
        return None
    rank_correlation = sweep["predicted_delta_ppl"].corr(sweep["delta_ppl"], method="spearman")
    return f"costs predicted from gradients rank as the measured ones do with Spearman's rho = {rank_correlation:.2f}"


def sweep_title(sweep: pd.DataFrame) -> str:
    """One line that says how the costs were measured."""
    first = sweep.iloc[0]
    codec = first.codec_k if first.codec_k == first.codec_v else f"k={first.codec_k} v={first.codec_v}"
    return (
        f"Cost of each layer alone: {codec}, {first.key_space} keys, protocol {protocol_text(first)}, "
        f"{sweep['tokens'].max()} tokens of the selection split, base perplexity {first.base_ppl:.3f}"
    )


def sweep_table(sweep: pd.DataFrame) -> Table:
    """The sweep by layer, for a terminal."""
    return plain_table(sweep_title(sweep), *sweep_rows(sweep))


def sweep_markdown(sweep: pd.DataFrame) -> str:
    """The sweep by layer, by cost and by error."""
    worst_fvu = sweep.assign(fvu=sweep[["fvu_k", "fvu_v"]].max(axis=1))
    return "\n\n".join(
        [
            "# Sweep",
            sweep_title(sweep) + ". FVU: fraction of variance unexplained on held-out calibration text.",
            *([words[0].upper() + words[1:] + "."] if (words := prediction_words(sweep)) else []),
            "## By layer",
            markdown_table(*sweep_rows(sweep)),
            "## By cost",
            markdown_table(*sweep_rows(sweep.sort_values("delta_ppl", kind="stable"))),
            "## By reconstruction error (the worse of K and V)",
            markdown_table(*sweep_rows(worst_fvu.sort_values("fvu", kind="stable"))),
            "",
        ]
    )


# -- the selection --------------------------------------------------------------------------------------------------


def selection_rows(selection: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the selection's steps for people."""
    header = [
        "layers",
        "layer tried",
        "its cost",
        "sum of costs (predicted)",
        "joint cost (measured)",
        "what became of it",
    ]
    rows = [
        [
            str(len(step["layers"])),
            str(step["layer"]),
            f"{step['cost']:+.3f}",
            f"{step['predicted']:+.3f}",
            "-" if step["joint_cost"] is None else f"{step['joint_cost']:+.3f}",
            STEP_WORDS[step["verdict"]],
        ]
        for step in selection["steps"]
    ]
    return header, rows


def selection_title(selection: dict[str, Any]) -> str:
    """One line that says what the steps were measured on."""
    return (
        f"Layers added in order of cost, budget {budget_text(selection['budget'])}, measured jointly on the "
        f"{selection['split']} split (base perplexity {selection['base_ppl']:.3f}); not tried: over budget alone"
    )


def selection_table(selection: dict[str, Any]) -> Table:
    """The selection's steps, for a terminal."""
    return plain_table(selection_title(selection), *selection_rows(selection))


def selection_markdown(selection: dict[str, Any], summary: dict[str, Any]) -> str:
    """The selection's steps and the result on report text."""
    return "\n\n".join(
        [
            "# Selection",
            selection_title(selection) + ".",
            markdown_table(*selection_rows(selection)),
            "## Joint result on report text",
            markdown_table(["", ""], [[name, value] for name, value in summary_rows(summary)]),
            "",
        ]
    )


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as name and value, for people."""
    layers = summary["selected_layers"]
    rows = [
        ("model", f"{summary['model']}, {summary['n_layers']} layers, width {summary['width']}"),
        ("codec, protocol", f"{summary['codec']}, {protocol_text(summary)}"),
        ("layers compressed", f"{len(layers)} of {summary['n_layers']}: {', '.join(map(str, layers)) or 'none'}"),
        ("text", f"{summary['dataset']}, {summary['split']} split, {summary['tokens']} tokens"),
        ("base perplexity", f"{summary['base_ppl']:.3f}"),
        ("perplexity", f"{summary['ppl']:.3f}"),
        ("joint cost", f"{summary['delta_ppl']:+.3f} points ({summary['delta_percent']:+.1f} %)"),
        ("95 % interval", interval_text(summary["delta_ppl_interval"])),
        (
            "budget",
            f"{budget_text(summary['budget'])}, {'kept' if summary['within_budget'] else 'exceeded'} on this text",
        ),
        *divergence_rows(summary),
        ("measured at", f"{summary['context']} tokens, one sequence, exact vectors in {summary['dtype']}"),
        ("code ratio (compressed vectors only)", ratio_text(summary["code_ratio"])),
        ("cache ratio", ratio_text(summary["cache_ratio"])),
        ("all-in ratio (with codecs and a step's peak)", ratio_text(summary["all_in_ratio"])),
        ("cache, 16-bit", f"{summary['base_bytes'] / 1e6:.2f} MB"),
        ("cache, held", f"{summary['held_bytes'] / 1e6:.2f} MB, stored {summary['stored_bytes'] / 1e6:.2f} MB"),
        ("peak of a decoding step", f"{summary['peak_step_bytes'] / 1e6:.2f} MB over what is held"),
        (
            "codecs",
            f"{summary['codec_parameters']} parameters, {summary['codec_bytes'] / 1e6:.2f} MB on disk, "
            f"{summary['codec_bytes_memory'] / 1e6:.2f} MB in memory",
        ),
    ]
    claimed = summary["claimed_cache_ratio"]
    rows += [(f"claimed cache ratio at {tokens} tokens", ratio_text(ratio)) for tokens, ratio in claimed.items()]
    return rows


def summary_table(summary: dict[str, Any]) -> Table:
    """The summary, for a terminal."""
    return name_value_table("Joint result on report text", summary_rows(summary))


def evaluation_table(result: dict[str, Any]) -> Table:
    """Base and compressed model side by side, for a terminal."""
    rows = [
        ("model", result["model"]),
        ("text", f"{result['dataset']}, {result['split']} split, {result['tokens']} tokens"),
        ("blocks", f"{result['blocks']} of {result['block_length']} tokens"),
        ("base perplexity", f"{result['base_ppl']:.3f}"),
    ]
    if result["bundle"] is not None:
        rows += [
            ("bundle", result["bundle"]),
            ("protocol", protocol_text(result)),
            ("perplexity", f"{result['ppl']:.3f}"),
            ("difference", f"{result['delta_ppl']:+.3f} points ({result['delta_percent']:+.1f} %)"),
            ("95 % interval", interval_text(result["interval"])),
            *divergence_rows(result),
        ]
    if result["free_run"] is not None:
        rows += free_run_rows(result["free_run"])
    return name_value_table("Perplexity", rows)


def free_run_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What `leankv.free_run.FreeRun` holds as name and value, for people."""
    new_tokens, first = figures["new_tokens"], figures["first_difference"]
    low, high = figures["equal_interval"] or (None, None)
    interval = "not known" if low is None else f"{low:.1f} to {high:.1f} %"
    return [
        (
            "free running",
            f"{figures['prompts']} prompts of {figures['prompt_tokens']} tokens (half a block), {new_tokens} greedy "
            "tokens each",
        ),
        ("equal tokens", f"{figures['equal_percent']:.1f} % (95 % interval over prompts {interval})"),
        ("first difference, median", "none" if first == new_tokens else f"after {first:g} equal tokens"),
        ("prompts without a difference", f"{figures['without_difference']} of {figures['prompts']}"),
    ]


# -- words ----------------------------------------------------------------------------------------------------------


def interval_text(interval: Iterable[Any] | None) -> str:
    """`-0.010 to +0.230`; `not known` without one (a single block)."""
    if interval is None:
        return "not known"
    low, high = interval
    return "not known" if pd.isna(low) else f"{low:+.3f} to {high:+.3f}"


def number_text(value: Any, form: str) -> str:
    """`value` in the format `form`; `-` where it is not known."""
    return "-" if pd.isna(value) else format(value, form)


def ratio_text(ratio: float | None) -> str:
    """`1.11x`; `-` where there are no codes."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def budget_text(budget: str) -> str:
    """`+2.5 points`, `+7 %`."""
    return f"+{budget.removesuffix('%')} {'%' if budget.endswith('%') else 'points'}"


def protocol_text(summary: Mapping[str, Any] | pd.Series) -> str:
    """`strict, sinks 0, window 0`."""
    return f"{summary['protocol']}, sinks {summary['sinks']}, window {summary['window']}"


# -- tables ---------------------------------------------------------------------------------------------------------


def plain_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right", overflow="fold")  # a spec that is cut off says nothing
    for row in rows:
        table.add_row(*row)
    return table


def name_value_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a header, for a terminal."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; columns without a name are aligned left."""
    rule = ["---" if cell == "" else "---:" for cell in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


# -- the figure -----------------------------------------------------------------------------------------------------


def draw_costs(sweep: pd.DataFrame, selection: dict[str, Any] | None, path: Path) -> None:
    """Cost by layer with 95 % intervals, the chosen layers marked; outliers are cut off and written."""
    from matplotlib.figure import Figure

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
    axes.set_title(sweep_title(sweep).replace(", protocol", "\nprotocol"), fontsize=9, loc="left")
    axes.legend(fontsize=8)
    axes.grid(axis="y", linewidth=0.3)
    figure.savefig(path, format="png")
