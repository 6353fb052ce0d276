"""The comparison for people: `compare.md`, its figure, and a table for a terminal. Reads `compare.csv` only."""

from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from leankv.report.columns import read_compare
from leankv.report.compare_figure import draw_comparison
from leankv.report.divergence import DIVERGENCE_NAMES, DIVERGENCE_NOTE, format_divergence
from leankv.report.tables import format_number, markdown_table, plain_table
from leankv.storage.files import write_atomically, write_text

FIGURE = "figures/compare.png"

RATIOS = ("code_ratio_live", "code_ratio_stored", "cache_ratio", "stored_ratio", "all_in_ratio")

NOTES = """\
- Every layer's keys and values are compressed alike, by one codec at one rate, but in rows of a plan, which are
  written out in `compare.csv`. All caches saw the same blocks, and every ratio and every byte is of a real cache filled
  with one of these blocks: costs and ratios are at one context.
- **Cost**: rise of perplexity in percent of the base perplexity, and the 95 % interval of the paired difference (blocks
  are the sampling unit).
- **Ratios** are 16-bit bytes over compressed ones. **Code ratio**: of the tokens that the cache took in between half
  and all of its fill, over what it grew by; *live* in memory, *stored* serialized, where codecs of ours entropy-code
  whole chunks (baselines have no such form). Not given where half a fill is not longer than what is held exact, and
  of layers that let go of nothing: what a sliding window drops is not saved (baselines do not say which layer their
  bytes belong to, and have none where there are such windows).
  **Cache ratio**: of the whole cache, over what is held between steps, sinks and window counted; **cache stored**: over
  the same serialized. **All-in ratio**: of one sequence's cache, over what is held, the codecs in memory, and the peak
  of a decoding step.
- Under the protocol **prefix** bytes and ratios are those of a prefix that was computed exactly and then coded whole,
  and costs those of the tokens that are read beside it.
- **Step's peak**: the most that decoding one token takes over what is held: what is decoded to be read, and the model's
  own activations of one token, which are the same for all caches. Exact vectors are counted in the precision the model
  runs in.
- **Codecs**: megabytes of their parameters on disk, and in memory with the tables that decoding builds; once a model.
- Baselines need no codecs and no calibration text, keep no sinks, and take keys after rotary embedding. HQQ and Quanto
  (transformers' quantized cache) quantize all they hold, anew, whenever 128 tokens have gathered, so nothing of theirs
  is exact at contexts of whole 128s, as here when bytes are counted; between those up to 127 tokens are. TurboQuant
  keeps the latest 128 to 255 tokens exact, and at whole 128s the memory of 256: the latest 128 are a view into it.
  Caches are filled 128 tokens at a time, whatever chunks the costs were measured in; in chunks of another length these
  baselines hold other tokens exact, and other ratios follow."""


def write_compare_report(folder: Path) -> None:
    """Render a finished comparison: `compare.md` and the figure."""
    table = read_compare(folder)
    write_text(folder / "compare.md", compare_markdown(table))
    write_atomically(folder / FIGURE, lambda path: draw_comparison(table, compare_title(table), path))


def compare_title(table: pd.DataFrame) -> str:
    """One line that says what was measured how."""
    first = table.iloc[0]
    what = "prefixes" if first.protocol == "prefix" else "blocks"
    title = f"Whole caches: {first.blocks} {what} of {first.context} tokens of the {first.split} split"
    if first.protocol == "prefix":
        title += f", {first.tokens // first.blocks} predictions behind each"
    title += f", protocol {first.protocol}"
    ours = table[table["baseline"] == ""]
    if len(ours):
        own = ours.iloc[0]
        windows = " and ".join(f"{window:.0f}" for window in ours["window"].unique())
        title += f", sinks {own.sinks:.0f}, window {windows}, {own.key_space} keys, error metric {own.error_metric}"
    return f"{title}, base perplexity {first.base_ppl:.3f}"


def compare_markdown(table: pd.DataFrame) -> str:
    """The tables with their notes."""
    parts = ["# Comparison", compare_title(table) + ".", NOTES, "## Cost and ratios"]
    parts += [markdown_table(*cost_rows(table)), "## Divergence", DIVERGENCE_NOTE]
    parts += [markdown_table(*divergence_rows(table)), "## Bytes", "Megabytes, at the context of the costs."]
    return "\n\n".join([*parts, markdown_table(*byte_rows(table)), ""])


def compare_summary(table: pd.DataFrame) -> Table:
    """Cost and ratios, for a terminal."""
    return plain_table(compare_title(table), *cost_rows(table))


def cost_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of cost and ratios, the cheapest first."""
    header = [
        "cache",
        "window",
        "cost %",
        "95 % interval",
        "code live",
        "code stored",
        "cache",
        "cache stored",
        "all-in",
    ]
    rows = [
        [
            row["spec"],
            format_number(row["window"], ".0f"),
            format_number(row["delta_percent"], "+.2f"),
            "not known" if pd.isna(row["low"]) else f"{row['low']:+.2f} to {row['high']:+.2f}",
            *(format_number(row[name], ".2f") for name in RATIOS),
        ]
        for row in _by_cost(table)
    ]
    return header, rows


def divergence_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of divergence from the base model, in the same order; intervals of the mean and the share."""
    header = ["cache", "window"]
    rows = [[row["spec"], format_number(row["window"], ".0f")] for row in _by_cost(table)]
    for column, name in DIVERGENCE_NAMES.items():
        header.append(name)
        bounded = column in ("kl", "top1")
        if bounded:
            header.append("95 % interval")
        for cells, row in zip(rows, _by_cost(table), strict=True):
            cells.append(format_divergence(row, column))
            if bounded:
                low, high = row[f"{column}_low"], row[f"{column}_high"]
                cells.append("not known" if pd.isna(low) else f"{low:.4g} to {high:.4g}")
    return header, rows


def byte_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of bytes, in the same order."""
    header = ["cache", "window", "held", "stored", "step's peak", "codecs on disk", "codecs in memory"]
    columns = ("held_bytes", "stored_bytes", "peak_step_bytes", "codec_bytes", "codec_bytes_memory")
    rows = [
        [
            row["spec"],
            format_number(row["window"], ".0f"),
            *(format_number(row[name] / 1e6, ".2f") for name in columns),
        ]
        for row in _by_cost(table)
    ]
    return header, rows


def _by_cost(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = table.sort_values("delta_percent", kind="stable").to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]
