"""`sweep.csv`: the table that a sweep leaves behind."""

from pathlib import Path

import pandas as pd

from leankv.finished_table import read_table

COLUMNS = (
    "layer",
    "codec_k",
    "codec_v",
    "key_space",
    "protocol",
    "sinks",
    "window",
    "tokens",
    "base_ppl",
    "ppl",
    "delta_ppl",
    "delta_ppl_low",
    "delta_ppl_high",
    "fvu_k",
    "fvu_v",
    "bits_per_token",
    "seconds",
    "predicted_delta_ppl",
)
"""Costs (`delta_ppl*`) in perplexity points; `bits_per_token` is K and V of the layer together; seconds to measure; the
prediction is empty unless it was asked for."""


def read_sweep(folder: Path) -> pd.DataFrame:
    """The finished sweep in a run's folder.

    Raises:
        UserError: there is none, or an older version made it.
    """
    return read_table(folder, "sweep", "sweep", COLUMNS)
