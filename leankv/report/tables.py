"""How numbers, intervals, budgets and tables are written for people."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text

# -- text -----------------------------------------------------------------------------------------------------------


def format_interval(interval: Iterable[Any] | None) -> str:
    """`-0.010 to +0.230`; `not known` without one (a single block)."""
    if interval is None:
        return "not known"
    low, high = interval
    return "not known" if pd.isna(low) else f"{low:+.3f} to {high:+.3f}"


def format_number(value: Any, form: str) -> str:
    """`value` in the format `form`; `-` where it is not known."""
    return "-" if pd.isna(value) else format(value, form)


def format_ratio(ratio: float | None) -> str:
    """`1.11x`; `-` where there are no codes."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def format_budget(budget: str) -> str:
    """`+2.5 points`, `+7 %`."""
    return f"+{budget.removesuffix('%')} {'%' if budget.endswith('%') else 'points'}"


def format_certified(certificate: "Mapping[str, Any] | pd.Series[Any] | None") -> str:
    """`at 95 % confidence, on 31 documents`, `no, after 8 documents`; `not asked for` without a certificate.

    Args:
        certificate: whether it is `certified`, at which `confidence`, on how many `documents`.
    """
    if certificate is None or pd.isna(certificate["certified"]):
        return "not asked for"
    documents = f"{certificate['documents']:.0f} documents"
    if not certificate["certified"]:
        return f"no, after {documents}"
    return f"at {100 * certificate['confidence']:g} % confidence, on {documents}"


def format_duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_protocol(protocol: str, sinks: int | None, window: int | None) -> str:
    """`strict, sinks 0, window 0`."""
    return f"{protocol}, sinks {sinks}, window {window}"


# -- tables ---------------------------------------------------------------------------------------------------------


def plain_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """A table for a terminal; all columns are aligned right."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right", overflow="fold")  # a spec that is cut off says nothing
    for row in rows:
        table.add_row(*row)
    return table


def text_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """A table of words for a terminal: columns are aligned left, and long cells are broken."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as it is: square brackets would be taken for markup
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
