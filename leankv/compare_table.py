"""`compare.csv`: the table that `leankv compare` leaves behind."""

from pathlib import Path

import pandas as pd

from leankv.divergence_table import DIVERGENCE_COLUMNS
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
    "split",
    "blocks",
    "context",
    "tokens",
    "code_ratio_live",
    "code_ratio_stored",
    "cache_ratio",
    "all_in_ratio",
    "all_in_ratio_4096",
    "held_bytes",
    "stored_bytes",
    "peak_step_bytes",
    "codec_bytes",
    "codec_bytes_memory",
    "base_ppl",
    "ppl",
    "delta_percent",
    "low",
    "high",
    *DIVERGENCE_COLUMNS,
    "seconds",
)
"""One row a cache in which every layer's keys and values are compressed alike.

`method` is the codec's family, or the kind of a baseline's cache; `peer` is empty for ours, else who made it. Costs are
of `blocks` blocks of `context` tokens of the split, of which `tokens` were predicted; `delta_percent` is the rise of
perplexity in percent of `base_ppl`, `low` and `high` its 95 % interval. All bytes and ratios are of real caches filled
with one such block, so ratio and cost stand at one context (see `leankv.cache_bytes.CacheBytes`); `all_in_ratio_4096`
is given where that is 4,096 tokens. `codec_bytes` are the codecs' parameters on disk, once a model,
`codec_bytes_memory` what they take in memory. How far predictions stray from the base model's is told as
`leankv.divergence_table` says. `seconds` is what measuring took, base model and compressed one side by side. A
baseline's sinks and window are its own affair.
"""


def read_compare(folder: Path) -> pd.DataFrame:
    """The finished comparison in a run's folder.

    Raises:
        UserError: there is none, or an older version made it.
    """
    table = read_table(folder, "compare", "comparison", COLUMNS)
    return table.assign(peer=table["peer"].astype(object).fillna(""))
