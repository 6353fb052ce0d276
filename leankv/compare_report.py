"""The comparison for people: `compare.md`, its figure, and a table for a terminal. Reads `compare.csv` only."""

from pathlib import Path

import pandas as pd
from rich.table import Table

from leankv.compare_figure import draw_comparison
from leankv.compare_table import read_compare
from leankv.report import markdown_table, number_text, plain_table
from leankv.store import write_atomically, write_text

FIGURE = "figures/compare.png"
SHORT_HEADER = ["cache", "cost %", "95 % interval", "live", "stored", "at 4096", "MB"]
"""For a terminal: code ratios live and stored, cache ratio at 4,096 tokens, megabytes of codec parameters."""
NOTES = """\
- Every layer's keys and values are compressed alike, by one codec at one rate. All caches saw the same blocks.
- **Cost**: rise of perplexity in percent of the base perplexity, and the 95 % interval of the paired difference (blocks
  are the sampling unit).
- **Code ratio**: 16-bit bytes of the tokens that a real cache took in between half and all of its fill, over the bytes
  that it grew by. *Live* is what is in memory while attention reads it; *stored* is the same cache parked, where codecs
  of ours entropy-code whole chunks. Peers know no parking.
- **Cache ratio**: 16-bit bytes of a cache of 4,096 tokens over the bytes held then, sinks and window counted.
- **Codecs**: megabytes of codec parameters, once a model, in no ratio. Peers need none.
- Peers keep what they keep exact (128 recent tokens or so, no sinks), take keys after rotary embedding, and need no
  calibration text."""


def write_compare_report(folder: Path) -> None:
    """Render a finished comparison: `compare.md` and the figure."""
    table = read_compare(folder)
    write_text(folder / "compare.md", compare_markdown(table))
    write_atomically(folder / FIGURE, lambda path: draw_comparison(table, path))


def compare_title(table: pd.DataFrame) -> str:
    """One line that says what was measured how."""
    first = table.iloc[0]
    words = f"Whole caches: protocol {first.protocol}, {first.tokens} tokens of the report split"
    ours = table[table["peer"] == ""]
    if len(ours):
        own = ours.iloc[0]
        words += f", sinks {own.sinks:.0f}, window {own.window:.0f}, {own.key_space} keys, weighting {own.weighting}"
    return f"{words}, base perplexity {first.base_ppl:.3f}"


def compare_markdown(table: pd.DataFrame) -> str:
    """The table with its notes."""
    return "\n\n".join(["# Comparison", compare_title(table) + ".", NOTES, markdown_table(*compare_rows(table)), ""])


def compare_summary(table: pd.DataFrame) -> Table:
    """The table for a terminal."""
    return plain_table(compare_title(table), SHORT_HEADER, compare_rows(table)[1])


def compare_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows, the cheapest first."""
    header = ["cache", "cost %", "95 % interval", "code live", "code stored", "cache 4096", "codecs MB"]
    rows = [
        [
            row["spec"],
            number_text(row["delta_percent"], "+.2f"),
            "not known" if pd.isna(row["low"]) else f"{row['low']:+.2f} to {row['high']:+.2f}",
            number_text(row["code_ratio_live"], ".2f"),
            number_text(row["code_ratio_stored"], ".2f"),
            number_text(row["cache_ratio_4096"], ".2f"),
            number_text(row["codec_bytes"] / 1e6, ".1f") if row["peer"] == "" else "-",
        ]
        for row in table.sort_values("delta_percent", kind="stable").to_dict("records")
    ]
    return header, rows
