"""Reading the tables that commands leave in a run's folder."""

from pathlib import Path

import pandas as pd

from leankv.errors import UserError


def read_table(folder: Path, command: str, thing: str) -> pd.DataFrame:
    """The table that `leankv COMMAND` left in `folder`; only empty fields are missing values, as `none` is a codec.

    Raises:
        UserError: there is none.
    """
    path = folder / f"{command}.csv"
    if not path.is_file():
        raise UserError(f"{folder} holds no finished {thing}; run: leankv {command} --output-dir {folder}")
    return pd.read_csv(path, keep_default_na=False, na_values=[""])
