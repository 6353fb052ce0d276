"""The sweep for people: `sweep.md`, its figure, and a table for a terminal. Reads `sweep.csv` only."""

from pathlib import Path

import pandas as pd
from rich.table import Table

from leankv.report.columns import read_sweep
from leankv.report.sweep_figure import draw_costs
from leankv.report.tables import format_interval, format_protocol, markdown_table, plain_table
from leankv.storage.files import write_atomically, write_text

FIGURE = "figures/cost_by_layer.png"


def write_sweep_report(folder: Path) -> None:
    """Render a finished sweep: `sweep.md` and the figure, nothing chosen in it."""
    sweep = read_sweep(folder)
    write_text(folder / "sweep.md", sweep_markdown(sweep))
    write_atomically(folder / FIGURE, lambda path: draw_costs(sweep, None, sweep_title(sweep), path))


def sweep_rows(sweep: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the sweep for people, in the order of `sweep`; `rank` 1 is the cheapest layer."""
    header = ["layer", "rank", "cost", "95 % interval", "FVU K", "FVU V", "bits/token"]
    ranks = sweep["delta_ppl"].rank(method="first").astype(int)
    rows = [
        [
            str(row.layer),
            str(rank),
            f"{row.delta_ppl:+.3f}",
            format_interval((row.delta_ppl_low, row.delta_ppl_high)),
            f"{row.fvu_k:.3f}",
            f"{row.fvu_v:.3f}",
            f"{row.bits_per_token:.1f}".removesuffix(".0"),
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


def format_prediction(sweep: pd.DataFrame) -> str | None:
    """How well the predicted costs rank the measured ones; None where nothing was predicted."""
    if not _is_predicted(sweep) or len(sweep) < 3:
        return None
    rank_correlation = sweep["predicted_delta_ppl"].corr(sweep["delta_ppl"], method="spearman")
    return f"costs predicted from gradients rank as the measured ones do with Spearman's rho = {rank_correlation:.2f}"


def sweep_title(sweep: pd.DataFrame) -> str:
    """One line that says how the costs were measured."""
    first = sweep.iloc[0]
    pairs = sweep[["codec_k", "codec_v"]].drop_duplicates()
    codec = first.codec_k if first.codec_k == first.codec_v else f"k={first.codec_k} v={first.codec_v}"
    if len(pairs) > 1:
        codec = f"a plan of {len(pairs)} pairs of codecs (sweep.csv has each layer's)"
    protocol = format_protocol(first.protocol, first.sinks, first.window)
    return (
        f"Cost of each layer alone: {codec}, {first.key_space} keys, protocol {protocol}, "
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
            *([f"{text[0].upper()}{text[1:]}."] if (text := format_prediction(sweep)) else []),
            "## By layer",
            markdown_table(*sweep_rows(sweep)),
            "## By cost",
            markdown_table(*sweep_rows(sweep.sort_values("delta_ppl", kind="stable"))),
            "## By reconstruction error (the worse of K and V)",
            markdown_table(*sweep_rows(worst_fvu.sort_values("fvu", kind="stable"))),
            "",
        ]
    )
