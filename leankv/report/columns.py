"""The tables that `sweep`, `map` and `compare` leave in a run's folder: which columns they have, and reading them."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from leankv.errors import UserError
from leankv.report import run_files
from leankv.report.divergence import DIVERGENCE_COLUMNS

SWEEP_COLUMNS = (
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
"""Of `sweep.csv`: one row a layer, it alone compressed. Costs (`delta_ppl*`) are in perplexity points, with a 95 %
interval; `fvu_*` is the fraction of variance unexplained on held-out calibration text; `bits_per_token` is of K and V
of the layer together; `seconds` is what measuring took; the prediction is empty unless it was asked for."""

MAP_COLUMNS = (
    "layer",
    "part",
    "codec",
    "key_space",
    "error_metric",
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
"""Of `map.csv`: one row a layer, part and codec. Bits are of one token's vector of `width` numbers; `fvu` and the
decibels from the Gaussian bound (at live and at stored bits) are of held-out calibration text. `measured` says what is
known of the cost: `perplexity`, with that layer and part alone compressed (points), or `error`, and then the perplexity
columns are empty. `tokens` were predicted for the row's cost; rows of a screened map saw different numbers."""

SPECTRA_COLUMNS = ("layer", "part", "component", "variance")
"""Of `spectra.csv`, which a map leaves too: one row a layer, part and principal component of its vectors on held-out
calibration text, counted from 1, the largest variance first."""

COMPARE_COLUMNS = (
    "method",
    "baseline",
    "spec",
    "plan",
    "key_space",
    "error_metric",
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
    "stored_ratio",
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
"""Of `compare.csv`: one row a cache. All its layers' keys and values are compressed alike, unless `plan` says not.

`method` is the codec's family, `plan`, or the kind of a baseline's cache; `spec` is the recipe, or the file of the
plan, which `plan` writes out; `baseline` is empty for ours, else who made it. Costs
are of `blocks` blocks of `context` tokens of the split, of which `tokens` were predicted; `delta_percent` is the rise
of perplexity in percent of `base_ppl`, `low` and `high` its 95 % interval. All bytes and ratios are of real caches
filled with one such block, so ratio and cost stand at one context; `all_in_ratio_4096` is given where that is 4,096.
Under the protocol `prefix` those are the tokens of the prefix, coded whole, while costs are of the continuation's.
`stored_bytes` are those of the cache serialized, sinks and window included, `stored_ratio` is of these,
`peak_step_bytes` the most that one decoding step takes over `held_bytes`. `codec_bytes` are the codecs' parameters on
disk, once a model, `codec_bytes_memory` what they take in memory. `leankv.report.divergence` tells of the columns of
divergence. `seconds` is what measuring took, base model and compressed one side by side. A baseline's sinks and window
are its own affair.
"""

COMMANDS = {"sweep": "sweep", "map": "map", "comparison": "compare"}
"""What is finished -> the command that leaves it."""

NAMES_BEFORE = {"peer": "baseline", "weighting": "error_metric"}
"""Name that an earlier version wrote -> today's name, of columns and of the keys of `summary.json`."""


def read_sweep(folder: Path) -> pd.DataFrame:
    """The finished sweep in a run's folder.

    Raises:
        UserError: there is none, or it lacks columns.
    """
    return _read(folder, run_files.SWEEP, "sweep", SWEEP_COLUMNS)


def read_map(folder: Path) -> pd.DataFrame:
    """The finished map in a run's folder.

    Raises:
        UserError: there is none, or it lacks columns.
    """
    return _read(folder, run_files.MAP, "map", MAP_COLUMNS)


def read_spectra(folder: Path) -> pd.DataFrame:
    """The spectra that a map left in a run's folder.

    Raises:
        UserError: there are none, or columns are lacking.
    """
    return _read(folder, run_files.SPECTRA, "map", SPECTRA_COLUMNS)


def read_compare(folder: Path) -> pd.DataFrame:
    """The finished comparison in a run's folder.

    Raises:
        UserError: there is none, or it lacks columns.
    """
    # An earlier version knew no plans of several recipes, and did not write the ratio of the cache serialized.
    needed = [name for name in COMPARE_COLUMNS if name not in ("plan", "stored_ratio")]
    table = _read(folder, run_files.COMPARE, "comparison", needed)
    table = table if "plan" in table else table.assign(plan="")
    if "stored_ratio" not in table:
        table["stored_ratio"] = table["cache_ratio"] * table["held_bytes"] / table["stored_bytes"]
    return table.assign(**{name: table[name].astype(object).fillna("") for name in ("baseline", "plan")})


def on_report_text(comparison: pd.DataFrame) -> pd.DataFrame:
    """The rows that may stand beside what selections cost: other splits are what plans are chosen on."""
    return comparison[comparison["split"] == "report"]


def _read(folder: Path, name: str, thing: str, columns: Sequence[str]) -> pd.DataFrame:
    """A table that a command left; only empty fields are missing values, as `none` is a codec."""
    path = folder / name
    command = COMMANDS[thing]
    if not path.is_file():
        raise UserError(f"{folder} holds no finished {thing}; run: leankv {command} --output-dir {folder}")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""]).rename(columns=NAMES_BEFORE)
    if missing := [name for name in columns if name not in table]:
        raise UserError(
            f"{path} has no column {missing[0]}, as another version of LeanKV made it; run: leankv {command} "
            f"--output-dir {folder}"
        )
    return table
