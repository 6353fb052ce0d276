"""The figures of divergence as columns, and as text for people.

They are the ones that llama.cpp's perplexity tool prints with `--kl-divergence`, under its names.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

DIVERGENCE_NAMES = {
    "kl": "Mean KLD",
    "kl_median": "Median KLD",
    "kl_p99": "99.0% KLD",
    "kl_p999": "99.9% KLD",
    "rms_dp": "RMS Δp",
    "top1": "Same top p",
}
"""Column -> its name for people. KLD columns are nats a token; `rms_dp` and `top1` are percent."""

WITH_INTERVAL = ("kl", "kl_median", "rms_dp", "top1")
"""Figures with a 95 % interval over blocks. Of the far percentiles none is sound: see
`leankv.evaluation.divergence.jackknife`."""

DIVERGENCE_COLUMNS = tuple(
    column + end for column in DIVERGENCE_NAMES for end in (("", "_low", "_high") if column in WITH_INTERVAL else ("",))
)
"""Every figure, and its interval; that is empty where there is one block only."""

DIVERGENCE_NOTE = (
    "**KLD**: Kullback-Leibler divergence of the next token's distribution with the compressed cache from the base "
    "model's, in nats a token: its mean, median, and the 99 % and 99.9 % points over all tokens. **RMS Δp**: root mean "
    "square change of the true token's probability, in percentage points. **Same top p**: share of tokens whose "
    "likeliest continuation is the base model's. Names and figures are those of llama.cpp's perplexity tool. Intervals "
    "are over blocks; the two far percentiles have none, as it would be too narrow with so few blocks."
)


def format_divergence(row: Mapping[str, Any], column: str) -> str:
    """One figure for a table: `0.0123`, `95.12 %`; `-` where it was not measured."""
    value = row.get(column)
    return "-" if value is None or pd.isna(value) else _format(column, value)


def divergence_rows(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value with its 95 % interval, of each figure; nothing where none was measured."""
    return [
        (name, format_divergence(row, column) + (_interval(row, column) if column in WITH_INTERVAL else ""))
        for column, name in DIVERGENCE_NAMES.items()
        if row.get(column) is not None
    ]


def _interval(row: Mapping[str, Any], column: str) -> str:
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    if low is None or pd.isna(low):
        return " (95 % interval not known)"
    return f" (95 % interval {_format(column, low)} to {_format(column, high)})"


def _format(column: str, value: float) -> str:
    return f"{value:.2f} %" if column in ("rms_dp", "top1") else f"{value:.4g}"
