"""`compare.csv`: the table that `leankv compare` leaves behind."""

from pathlib import Path

import pandas as pd

from leankv.finished_table import read_table

COLUMNS = (
    "method",
    "peer",
    "spec",
    "key_space",
    "weighting",
    "protocol",
    "sinks",
    "window",
    "tokens",
    "code_ratio_live",
    "code_ratio_stored",
    "cache_ratio_4096",
    "codec_bytes",
    "base_ppl",
    "ppl",
    "delta_percent",
    "low",
    "high",
    "seconds",
)
"""One row a cache in which every layer's keys and values are compressed alike.

`method` is the codec's family, or the kind of a peer's cache; `peer` is empty for ours, else who made it. `tokens` were
predicted, on the report split; `delta_percent` is the rise of perplexity in percent of `base_ppl`, `low` and `high` its
95 % interval. Ratios are 16-bit bytes over bytes of real caches, filled with report text. `codec_bytes` are the codecs'
parameters, once a model. `seconds` is what measuring the perplexity took. A peer's sinks and window are its own affair.
"""


def read_compare(folder: Path) -> pd.DataFrame:
    """The finished comparison in a run's folder.

    Raises:
        UserError: there is none.
    """
    table = read_table(folder, "compare", "comparison")
    return table.assign(peer=table["peer"].astype(object).fillna(""))
