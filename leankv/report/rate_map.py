"""The map for people: `map.md`, its figures, and a table for a terminal. Reads `map.csv` only."""

from pathlib import Path

import pandas as pd
from rich.table import Table

from leankv.report.columns import read_map
from leankv.report.rate_map_figures import codecs_by_bits, write_figures
from leankv.report.tables import format_number, format_protocol, markdown_table, plain_table
from leankv.storage.files import write_text

RATES = (0.5, 1.0, 2.0, 3.0, 5.0)
"""Live bits a value at which the best codecs are named."""

NOTES = """\
- **Bits** are those of one value of a vector, side information included. *Live*: any token is decoded at random.
  *Stored*: the same codes serialized, where lossless entropy coding may be used. Both on calibration text.
- **Cost**: perplexity with that layer and that part alone compressed, less the base perplexity. It is given where it
  was measured. **FVU**: fraction of variance unexplained on held-out calibration text; it is known everywhere.
- **Distance from the bound**, in decibels: the codec's squared error over the least that a Gaussian source of the same
  spectrum allows at the same bits (reverse water-filling, Cover and Thomas, 10.3.3). 6.02 dB are one bit for every
  component in use; rounding with perfect entropy coding stays 1.53 dB away at high rates. The spectrum is that of the
  held-out vectors, a sample's, which puts the bound too low by about 2.2 dB times width over vectors.
- A distance may be negative: keys and values are not Gaussian (values of layer 0, and its keys before rotation, are a
  function of the token alone), the bound takes each vector alone, and codecs that predict from other layers (`share`)
  know more than it. Such a codec without bits of its own is compared with storing nothing, which says little."""

ERROR_METRIC_NOTE = """\
- The codecs were fitted with error metric `{error_metric}`. They lessen another error than the plain squared one that
  FVU and the distance from the bound tell of, so they are further from this bound than they would be from their own."""


def write_map_report(folder: Path) -> None:
    """Render a finished map: `map.md` and the figures."""
    table = read_map(folder)
    write_text(folder / "map.md", map_markdown(table))
    write_figures(table, folder / "figures")


def map_title(table: pd.DataFrame) -> str:
    """One line that says what was measured how."""
    first = table.iloc[0]
    layers, codecs = table["layer"].nunique(), table["codec"].nunique()
    title = (
        f"{layers} layers, K and V, under {codecs} codecs: {first.key_space} keys, error metric {first.error_metric}"
    )
    measured = table[table["measured"] == "perplexity"]
    if measured.empty:
        return f"{title}; reconstruction errors only"
    least, most = measured["tokens"].min(), measured["tokens"].max()
    tokens = f"{most:.0f}" if least == most else f"{least:.0f} to {most:.0f}"  # screened: rows saw different blocks
    protocol = format_protocol(first.protocol, first.sinks, first.window)
    how = f"protocol {protocol}, {tokens} tokens of the selection split"
    rest = layers - measured["layer"].nunique()
    of = f"; of {rest} layers reconstruction errors only" if rest else ""
    return f"{title}, {how}, base perplexity {measured['base_ppl'].iloc[0]:.3f}{of}"


def map_markdown(table: pd.DataFrame) -> str:
    """The codecs' summary, then the best codec of each layer and part at some rates."""
    notes = [NOTES]
    if (error_metric := table["error_metric"].iloc[0]) != "none":
        notes.append(ERROR_METRIC_NOTE.format(error_metric=error_metric))
    return "\n\n".join(
        [
            "# Map",
            map_title(table) + ".",
            "\n".join(notes),
            "## By codec",
            "Means over layers; cost in perplexity points, over the layers where it was measured.",
            markdown_table(*codec_rows(table)),
            "## The best codec of each layer and part",
            "The codec with the least cost among those of no more live bits a value than the column says, and its "
            "cost; of layers that were not measured the one with the least FVU, and `FVU`.",
            markdown_table(*best_rows(table)),
            "",
        ]
    )


def map_summary(table: pd.DataFrame) -> Table:
    """The codecs' summary at live bits, which a terminal has room for."""
    header, rows = codec_rows(table)
    kept = [index for index, name in enumerate(header) if not name.startswith("stored")]
    return plain_table(map_title(table), [header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def codec_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the codecs in order of bits: means over layers, K and V side by side."""
    header = ["codec", "live bits", "stored bits", "cost K", "cost V", "FVU K", "FVU V", "dB K", "dB V"]
    header += ["stored dB K", "stored dB V"]
    means = {part: rows.groupby("codec").mean(numeric_only=True) for part, rows in table.groupby("part")}
    rows = []
    for codec in codecs_by_bits(table):
        own = table[table["codec"] == codec]
        bits = [(own[name] / own["width"]).mean() for name in ("bits_per_token", "stored_bits_per_token")]
        cells = [f"{value:.2f}" for value in bits]
        for column, form in (
            ("delta_ppl", "+.3f"),
            ("fvu", ".3f"),
            ("error_db_over_bound", "+.1f"),
            ("stored_error_db_over_bound", "+.1f"),
        ):
            cells += [format_number(means[part][column].get(codec), form) for part in ("k", "v")]
        rows.append([codec, *cells])
    return header, rows


def best_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the best codec of each layer and part within each of `RATES`."""
    header = ["layer", "part", *(f"{rate:g} bits" for rate in RATES)]
    rows = []
    for (layer, part), own in table.groupby(["layer", "part"]):
        cells = []
        for rate in RATES:
            affordable = own[own["bits_per_token"] <= rate * own["width"]]
            cells.append("-" if affordable.empty else _best(affordable))
        rows.append([str(layer), str(part).upper(), *cells])
    return header, rows


def _best(rows: pd.DataFrame) -> str:
    """`transform:1 (+0.020)`, or `pca:8 (FVU 0.310)`."""
    if (rows["measured"] == "perplexity").all():
        best = rows.sort_values("delta_ppl", kind="stable").iloc[0]
        return f"{best['codec']} ({best['delta_ppl']:+.3f})"
    best = rows.sort_values("fvu", kind="stable").iloc[0]
    return f"{best['codec']} (FVU {best['fvu']:.3f})"
