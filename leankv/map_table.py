"""`map.csv`: the table that `leankv map` leaves behind."""

from pathlib import Path

import pandas as pd

from leankv.finished_table import read_table

COLUMNS = (
    "layer",
    "part",
    "codec",
    "key_space",
    "weighting",
    "protocol",
    "sinks",
    "window",
    "width",
    "bits_per_token",
    "stored_bits_per_token",
    "fvu",
    "error_db_over_bound",
    "stored_error_db_over_bound",
    "measured",
    "delta_ppl",
    "delta_ppl_low",
    "delta_ppl_high",
    "base_ppl",
    "tokens",
)
"""One row a layer, part and codec. Bits of one token's vector of `width` numbers; `fvu` and the decibels from the
Gaussian bound (at live and at stored bits) on held-out calibration text. `measured` says what is known of the cost:
`perplexity`, with that layer and part alone compressed (points), or `error`, and then the perplexity columns are empty.
`tokens` were predicted for the row's cost; rows of a screened map saw different numbers.
"""


def read_map(folder: Path) -> pd.DataFrame:
    """The finished map in a run's folder.

    Raises:
        UserError: there is none, or an older version made it.
    """
    return read_table(folder, "map", "map", COLUMNS)


def by_bits(table: pd.DataFrame) -> list[str]:
    """The codecs in order of their mean live bits a value."""
    bits = (table["bits_per_token"] / table["width"]).groupby(table["codec"]).mean()
    return [str(codec) for codec in bits.sort_values(kind="stable").index]
