"""The command line: commands, exit codes, and what is printed; no logic."""

from leankv.cli import sweeps, rates, bundles, models  # noqa: I001 - the order of `leankv --help`
from leankv.cli.app import app

__all__ = ["app", "bundles", "main", "models", "rates", "sweeps"]


def main() -> None:
    """Entry point of the `leankv` command."""
    app()
