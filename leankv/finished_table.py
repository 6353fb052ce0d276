"""Reading the tables that commands leave in a run's folder."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from leankv.errors import UserError


def read_table(folder: Path, command: str, thing: str, columns: Sequence[str]) -> pd.DataFrame:
    """The table that `leankv COMMAND` left in `folder`; only empty fields are missing values, as `none` is a codec.

    Raises:
        UserError: there is none, or it has not these columns: an older version made it.
    """
    path = folder / f"{command}.csv"
    if not path.is_file():
        raise UserError(f"{folder} holds no finished {thing}; run: leankv {command} --output-dir {folder}")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    if missing := [name for name in columns if name not in table]:
        raise UserError(
            f"{path} has no column {missing[0]}, as another version of LeanKV made it; run: leankv {command} "
            f"--output-dir {folder}"
        )
    return table
